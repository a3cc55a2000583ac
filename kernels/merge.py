"""Merging attention partials (out, lse), flat or over the canonical tree of leaves.

    m = max_i l_i,  m0 = 0 if m = -inf else m,  w_i = exp(l_i - m0)
    O = sum_i w_i O_i / sum_i w_i  (0 if the sum is 0),  L = m0 + log(sum_i w_i)

with O_i (..., D), normalised, and l_i (...) in natural log; an empty partial has out 0 and lse -inf, and merging with
it changes nothing of the other. All in fp32, or fp64 where the inputs are. Floating-point sums depend on their order,
so the order is part of the operation:

- :func:`merge` is flat, in the order given;
- a **leaf** is a sequence's keys at positions [leaf_size * i, leaf_size * (i + 1)), attended on their own; a **node**
  of level k is 2^k leaves, aligned; its partial is ``combine(left half, right half)``. Leaves that do not exist or are
  wholly masked are empty. The root is the result, so its bits depend on the tree alone: whoever owns a run of
  leaves folds them into the maximal nodes of the run (as RFC 9162 does with subtrees) and passes only those on.

Each step works on single elements with correctly rounded operations, ``exp`` and ``log``, whose bits in torch do not
depend on where in a tensor an element stands (the tests look).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from countersign.kernels.dispatch import Backend, choose


@dataclass(frozen=True, slots=True, order=True)
class Node:
    """The leaves [index << level, (index + 1) << level) of a sequence."""

    level: int
    index: int

    @property
    def first(self) -> int:
        """Its first leaf."""
        return self.index << self.level

    @property
    def last(self) -> int:
        """Its last leaf."""
        return ((self.index + 1) << self.level) - 1

    @property
    def parent(self) -> Node:
        return Node(self.level + 1, self.index >> 1)


def nodes_of(first: int, end: int, count: int | None = None) -> list[Node]:
    """The fewest nodes that together are the leaves [first, end), from left to right.

    Args:
        first: the first leaf.
        end: one past the last.
        count: the sequence's number of leaves. Where the run ends there, its last node may also hold leaves that do
            not exist, since these are empty: one node then covers a whole sequence.

    Raises:
        ValueError: not 0 <= first <= end, or end > count.
    """
    if not 0 <= first <= end or (count is not None and end > count):
        raise ValueError(f"leaves [{first}, {end}) of {count} are no run: 0 <= first <= end <= count is needed")
    nodes = []
    while first < end:
        left = end - first
        # The largest node that may start here: as aligned as `first` is.
        aligned = (first & -first).bit_length() - 1 if first else left.bit_length()
        reach = (left - 1).bit_length() if end == count else left.bit_length() - 1
        level = min(aligned, reach)
        nodes.append(Node(level, first >> level))
        first += 1 << level
    return nodes


def combine(a_out: Tensor, a_lse: Tensor, b_out: Tensor, b_lse: Tensor) -> tuple[Tensor, Tensor]:
    """The partial of two, ``a`` before ``b`` in key order: outs (..., D), lses (...)."""
    a_out, a_lse, b_out, b_lse = _wide(a_out), _wide(a_lse), _wide(b_out), _wide(b_lse)
    largest = _finite(torch.maximum(a_lse, b_lse))
    a_weight, b_weight = torch.exp(a_lse - largest), torch.exp(b_lse - largest)
    total = a_weight + b_weight
    out = a_out * a_weight.unsqueeze(-1) + b_out * b_weight.unsqueeze(-1)
    return _divide(out, total), largest + torch.log(total)


def merge(outs: Tensor, lses: Tensor, *, backend: Backend | None = None) -> tuple[Tensor, Tensor]:
    """The partial of N at once, summed in their order: outs (N, ..., D), lses (N, ...) to (..., D), (...).

    Raises:
        ValueError: the shapes do not belong together, or N is 0.
    """
    _check(outs, lses)
    if outs.dtype == torch.float32 and choose(backend, outs, lses) == "triton":
        from countersign.kernels.triton import merge as triton_merge

        return triton_merge.merge(outs, lses)
    outs, lses = _wide(outs), _wide(lses)
    largest = _finite(lses.amax(dim=0))
    weights = torch.exp(lses - largest)
    total, out = weights[0].clone(), outs[0] * weights[0].unsqueeze(-1)
    for weight, part in zip(weights[1:], outs[1:], strict=True):
        total += weight
        out += part * weight.unsqueeze(-1)
    return _divide(out, total), largest + torch.log(total)


def tree(outs: Tensor, lses: Tensor, *, backend: Backend | None = None) -> tuple[Tensor, Tensor]:
    """The root over leaves 0 .. N - 1: outs (N, ..., D), lses (N, ...) to (..., D), (...).

    Raises:
        ValueError: the shapes do not belong together, or N is 0.
    """
    _check(outs, lses)
    if outs.dtype == torch.float32 and choose(backend, outs, lses) == "triton":
        from countersign.kernels.triton import merge as triton_merge

        return triton_merge.tree(outs, lses)
    outs, lses = _wide(outs), _wide(lses)
    while len(outs) > 1:
        even = len(outs) // 2 * 2
        out, lse = combine(outs[0:even:2], lses[0:even:2], outs[1::2], lses[1::2])
        # A last one without a sibling goes up as it is: its sibling is empty.
        outs, lses = torch.cat((out, outs[even:])), torch.cat((lse, lses[even:]))
    return outs[0], lses[0]


def fold(partials: Mapping[Node, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The root over any disjoint nodes, missing ones being empty: the bits of :func:`tree` over their leaves.

    Raises:
        ValueError: no partial is given, or one node lies inside another.
    """
    if not partials:
        raise ValueError("fold needs at least one partial; an empty result has no shape of its own")
    rest = {node: (_wide(out), _wide(lse)) for node, (out, lse) in partials.items()}
    level, waiting = min(node.level for node in rest), set[Node]()
    while len(rest) > 1:
        for node in sorted(node for node in rest if node.level == level):
            mine = rest.pop(node)
            # The left sibling comes first and waits in its parent's place for the right one.
            left = rest.get(node.parent) if node.parent in waiting else None
            if left is None and node.parent in rest:
                raise ValueError(f"partials overlap: {node.parent} is given beside a node inside it")
            rest[node.parent] = mine if left is None else combine(*left, *mine)
            waiting.add(node.parent)
        level += 1
    return next(iter(rest.values()))


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _finite(largest: Tensor) -> Tensor:
    """0 in place of -inf, so that no weight becomes exp(-inf + inf)."""
    return largest.masked_fill(largest == -torch.inf, 0)


def _divide(out: Tensor, total: Tensor) -> Tensor:
    return out / total.masked_fill(total == 0, 1).unsqueeze(-1)


def _check(outs: Tensor, lses: Tensor) -> None:
    if not len(outs) or outs.shape[:-1] != lses.shape:
        raise ValueError(f"outs {tuple(outs.shape)} must be (N, ..., D) and lses {tuple(lses.shape)} (N, ...), N > 0")
