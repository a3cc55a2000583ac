"""Batches for the tests of attention over ranks, what they should give, and how a rank runs them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from countersign.kernels.ring.execute import attend_over_ranks
from countersign.kernels.ring.layout import Extent, Layout, Parts, lay_out
from countersign.kernels.ring.local import Reference
from countersign.kernels.ring.schedule import Schedule, plan
from countersign.kernels.ring.transport import Transport

LEAF, DIM, TIMEOUT = 16, 8, 20.0
TREE = (-1, 0, 0, 1, 1, 2, 5, 6)

CASES = {
    "prefill": (Extent(0, 130), Extent(0, 3), Extent(0, 61), Extent(0, 1)),
    "chunked prefill": (Extent(45, 77), Extent(64, 32), Extent(0, 19), Extent(130, 2)),
    "decode": (Extent(99, 1), Extent(16, 1), Extent(3, 1), Extent(0, 1)),
    "chain verify": (Extent(99, 5), Extent(30, 4), Extent(2, 3)),
    "tree verify": (
        Extent(93, 8, TREE),
        Extent(30, 4, (-1, 0, -1, 2)),
        Extent(47, 3, (-1, 0, 0)),
        Extent(1, 2, (-1, -1)),
    ),
    "all mixed": (Extent(20, 33), Extent(40, 1), Extent(0, 0), Extent(29, 8, TREE), Extent(7, 0)),
}


@dataclass(frozen=True, slots=True)
class Batch:
    """Per sequence: q (new, Hq, D), k and v (cached + new, Hkv, D) by slot."""

    extents: tuple[Extent, ...]
    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]

    @staticmethod
    def draw(
        extents: tuple[Extent, ...], heads: int, kv_heads: int, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> Batch:
        generator = torch.Generator().manual_seed(seed)

        def normal(count: int, of: int) -> Tensor:
            return torch.randn((count, of, DIM), generator=generator).to(dtype)

        q = [normal(extent.new, heads) for extent in extents]
        k, v = ([normal(extent.cached + extent.new, kv_heads) for extent in extents] for _ in range(2))
        return Batch(extents, q, k, v)

    def expected(self, window: int | None = None, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """Dense attention on one device: out (N, Hq, D) and lse (N, Hq), computed in ``dtype``."""
        found = [self._dense(i, window, dtype) for i in range(len(self.extents))]
        return torch.cat([out for out, _ in found]), torch.cat([lse for _, lse in found])

    def _dense(self, i: int, window: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        extent, group = self.extents[i], self.q[i].shape[1] // self.k[i].shape[1]
        q, k, v = (x.to(dtype).transpose(0, 1) for x in (self.q[i], self.k[i], self.v[i]))
        scores = q @ k.repeat_interleave(group, 0).transpose(1, 2) * DIM**-0.5
        scores = scores.masked_fill(~visible(extent, window), -torch.inf)
        out = scores.softmax(-1) @ v.repeat_interleave(group, 0)
        return out.transpose(0, 1), scores.logsumexp(-1).transpose(0, 1)


def visible(extent: Extent, window: int | None) -> Tensor:
    """(new, cached + new): written from the definition, ancestor by ancestor."""
    seen = torch.zeros(extent.new, extent.cached + extent.new, dtype=torch.bool)
    for row in range(extent.new):
        path, node = [], row
        while node >= 0:
            path.append(extent.cached + node)
            node = node - 1 if extent.parents is None else extent.parents[node]
        ordered = [*range(extent.cached), *reversed(path)]
        seen[row, ordered[-window:] if window else ordered] = True
    return seen


def pick(tensors: list[Tensor], parts: Parts) -> Tensor:
    return torch.cat([tensors[0][:0], *(tensors[part.sequence][part.first : part.end] for part in parts)])


def attend_as(transport: Transport, batch: Batch, layout: Layout, schedule: Schedule) -> tuple[Parts, Tensor, Tensor]:
    """What one rank gets: the rows, out, lse."""
    program = plan(schedule, layout, transport.rank)
    q = pick(batch.q, program.rows)
    k, v = pick(batch.k, program.slots), pick(batch.v, program.slots)
    local = Reference(layout, DIM**-0.5)
    return program.rows, *attend_over_ranks(program, q, k, v, transport, local, timeout=TIMEOUT)


def assemble(batch: Batch, results: list[tuple[Parts, Tensor, Tensor]], replicated: bool) -> tuple[Tensor, Tensor]:
    """The rows of all ranks in the batch's order; replicated rows must be the same on each."""
    if replicated:
        for rows, out, lse in results:
            assert rows == results[0][0]
            assert torch.equal(out, results[0][1])
            assert torch.equal(lse, results[0][2])
        return results[0][1:]
    flat = [(part.sequence, row) for parts, _, _ in results for part in parts for row in range(part.first, part.end)]
    assert len(set(flat)) == len(flat) == sum(extent.new for extent in batch.extents)
    order = torch.tensor(sorted(range(len(flat)), key=flat.__getitem__), dtype=torch.long)
    return torch.cat([out for _, out, _ in results])[order], torch.cat([lse for _, _, lse in results])[order]


def layout_of(batch: Batch, size: int, leaf: int | None, replicated: bool = False, window: int | None = None) -> Layout:
    return lay_out(batch.extents, size, leaf=leaf, replicated=replicated, window=window)
