"""Seeded sampling of many rows at once (:mod:`countersign.kernels.gumbel` says what is computed): the batch form.

The Triton form reads the logits once, in pieces of the vocabulary, and draws noise only in blocks where a token can
still win. What top-k and top-p keep is every token above a threshold, and of those that equal it the first few by id;
threshold and last id are found before, by sorting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from countersign.kernels import gumbel
from countersign.kernels.checks import check
from countersign.kernels.dispatch import Backend, choose

NOT_FINITE = -1
MARGIN = 1e-9
"""As a share of a row's whole weight: far above what rounding the sum of a million weights can move."""


@dataclass(frozen=True, slots=True)
class Rule:
    """How a row's token is drawn; see :func:`countersign.kernels.gumbel.sample`."""

    position: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


def sample_rows(logits: Tensor, rules: Sequence[Rule], *, backend: Backend | None = None) -> Tensor:
    """The token of each row, (R,) int64; -1 where a logit is NaN or +infinity, or all are -infinity.

    Args:
        logits: (R, V) fp32.
        rules: R of them.
        backend: see :func:`countersign.kernels.dispatch.choose`.

    Raises:
        ValueError: the logits have another shape, type or stride, a rule is impossible, or the backend cannot compute
            here.
    """
    check("logits", logits, (len(rules), "V"), (torch.float32,))
    for rule in rules:
        if not (rule.temperature >= 0 and rule.top_k >= 0 and 0 < rule.top_p <= 1 and 0 <= rule.seed < 1 << 64):
            raise ValueError(f"{rule}: temperature and top_k are 0 or more, top_p in (0, 1], the seed unsigned 64-bit")
        if not 0 <= rule.position < 1 << 32:
            raise ValueError(f"{rule}: the position is not an unsigned 32-bit integer")
    if choose(backend, logits) == "triton":
        from countersign.kernels.triton import sample_rows as kernels

        return kernels.sample_rows(logits, rules)
    rows = logits.double().cpu().numpy()
    tokens = [_sample(row, rule) for row, rule in zip(rows, rules, strict=True)]
    return torch.tensor(tokens, dtype=torch.int64, device=logits.device)


def _sample(row: gumbel.Reals, rule: Rule) -> int:
    if not np.isfinite(row.max()):
        return NOT_FINITE
    return gumbel.sample(
        row, rule.position, temperature=rule.temperature, top_k=rule.top_k, top_p=rule.top_p, seed=rule.seed
    )


def thresholds(logits: Tensor, rules: Sequence[Rule]) -> tuple[Tensor, Tensor]:
    """Of each row of logits (R, V): (the least logit that top-k and top-p keep (R,) fp32, the highest id of those that
    equal it and are kept (R,) int64), on the logits' device; (-infinity, V) where all stay.

    The equations are those of :func:`countersign.kernels.gumbel.allowed`. Another library's exponentials and sums may
    round otherwise, so a row whose top-p stands within ``MARGIN`` of a border is decided there.
    """
    size = logits.shape[1]
    least = torch.full((len(rules),), -torch.inf, device=logits.device)
    last = torch.full((len(rules),), size, dtype=torch.int64, device=logits.device)
    cut = [i for i, rule in enumerate(rules) if rule.temperature and (rule.top_p < 1 or 0 < rule.top_k < size)]
    if not cut:
        return least, last
    rows = torch.tensor(cut, device=logits.device)
    chosen, kept = logits.index_select(0, rows), [rules[i] for i in cut]
    falling = chosen.sort(dim=1, descending=True).values
    counts, unsure = _counts(falling, kept)
    # No token comes of a row that is not finite.
    finite = falling[:, :1].isfinite()
    for i in torch.nonzero(unsure & finite[:, 0]).flatten().tolist():
        values, rule = chosen[i].double().cpu().numpy(), kept[i]
        counts[i] = len(gumbel.allowed(values, temperature=rule.temperature, top_k=rule.top_k, top_p=rule.top_p))
    lowest = falling.gather(1, counts[:, None] - 1)
    equal = chosen == lowest
    # The last of those that equal it and still fit has this many of them up to itself.
    fit = counts[:, None] - (chosen > lowest).sum(dim=1, keepdim=True)
    final = (equal & (equal.cumsum(dim=1) == fit)).int().argmax(dim=1)
    all_stay = ~finite[:, 0] | (lowest[:, 0] == -torch.inf)
    least[rows] = lowest[:, 0].masked_fill(all_stay, -torch.inf)
    last[rows] = final.masked_fill(all_stay, size)
    return least, last


def _counts(falling: Tensor, rules: Sequence[Rule]) -> tuple[Tensor, Tensor]:
    """How many of each row's logits (R, V), the largest first, top-k and top-p keep, at least 1; and whether rounding
    may decide it.
    """
    size, wide = falling.shape[1], falling.double()

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=falling.device)[:, None]

    most = column([rule.top_k if 0 < rule.top_k < size else size for rule in rules])
    top_p = column([rule.top_p for rule in rules])
    weights = torch.exp((wide - wide[:, :1]) / column([rule.temperature for rule in rules]))
    reached = weights.masked_fill_(torch.arange(size, device=falling.device) >= most, 0).cumsum(dim=1)
    total, wanted = reached[:, -1:], top_p * reached[:, -1:]
    counts = torch.minimum((reached < wanted).sum(dim=1, keepdim=True) + 1, most)
    unsure = ((reached - wanted).abs() <= MARGIN * total).any(dim=1) & (top_p[:, 0] < 1)
    return torch.where(top_p < 1, counts, most).long()[:, 0], unsure
