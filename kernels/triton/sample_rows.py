"""The Triton form of :func:`countersign.kernels.sample_rows.sample_rows`.

A program walks through a part of a row's vocabulary, block by block, and skips the noise of a block whose largest logit
with the largest noise stays below the best score so far: rounding is monotonic, so nothing is lost (gumbel.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from countersign.kernels.gumbel import G_MAX
from countersign.kernels.sample_rows import Rule, thresholds

BLOCK, BLOCKS = 1024, 8
MOST = tl.constexpr(G_MAX)


def sample_rows(logits: Tensor, rules: Sequence[Rule]) -> Tensor:
    """See the reference."""
    rows, size = logits.shape
    if not rows:
        return torch.empty(0, dtype=torch.int64, device=logits.device)
    parts = triton.cdiv(size, BLOCK * BLOCKS)

    def column(values: Sequence[float | int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(logits.device)

    scores = torch.empty(rows, parts, dtype=torch.float64, device=logits.device)
    tokens = torch.empty(rows, parts, dtype=torch.int64, device=logits.device)
    bad = torch.empty(rows, parts, dtype=torch.int32, device=logits.device)
    _sample[(rows, parts)](
        logits, size,
        column([rule.position for rule in rules], torch.int64),
        column([rule.temperature for rule in rules], torch.float64),
        column([rule.seed % (1 << 32) for rule in rules], torch.int64),
        column([rule.seed >> 32 for rule in rules], torch.int64),
        *thresholds(logits, rules),
        scores, tokens, bad, BLOCK=BLOCK, BLOCKS=BLOCKS, num_warps=4,
    )  # fmt: skip
    # The first part that reaches the best score has the lowest id.
    best = scores.amax(dim=1, keepdim=True)
    first = (scores == best).int().argmax(dim=1, keepdim=True)
    token = tokens.gather(1, first)[:, 0]
    return torch.where(bad.any(dim=1) | torch.isinf(best[:, 0]), -1, token)


@triton.jit
def _noise(seed_low, seed_high, position, token):
    """G(seed, position, token) in fp64: Philox4x32-10, counter (position, token, 0, 0)."""
    mask = 0xFFFFFFFF
    c0, c1 = (token * 0).to(tl.uint64) + position.to(tl.uint64), token.to(tl.uint64)
    c2, c3 = c1 * 0, c1 * 0
    k0, k1 = seed_low.to(tl.uint64), seed_high.to(tl.uint64)
    for _ in tl.static_range(10):
        p0 = c0 * 0xD2511F53
        p1 = c2 * 0xCD9E8D57
        c0, c1 = (p1 >> 32) ^ c1 ^ k0, p1 & mask
        c2, c3 = (p0 >> 32) ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    u = (((c0 | (c1 << 32)) >> 12).to(tl.float64) + 0.5) * 2.220446049250313e-16
    # 1 - u is exact, so that its logarithm is log1p(-u).
    return -tl.log(-tl.log(1.0 - u))


@triton.jit
def _sample(
    logits, size, positions, temperatures, seeds_low, seeds_high, leasts, lasts, scores, tokens, bad,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0), tl.program_id(1)
    position, temperature = tl.load(positions + row), tl.load(temperatures + row)
    seed_low, seed_high = tl.load(seeds_low + row), tl.load(seeds_high + row)
    least, last = tl.load(leasts + row), tl.load(lasts + row)
    best = tl.full((), float("-inf"), tl.float64)
    winner = tl.full((), 0, tl.int64)
    wrong = tl.full((), 0, tl.int32)
    for block in range(BLOCKS):
        token = (part * BLOCKS + block).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = token < size
        z = tl.load(logits + row.to(tl.int64) * size + token, mask=inside, other=float("-inf"))
        wrong = tl.maximum(wrong, tl.max(((z != z) | (z == float("inf"))).to(tl.int32), axis=0))
        kept = inside & ((z > least) | ((z == least) & (token <= last)))
        wide = tl.where(kept, z, float("-inf")).to(tl.float64)
        top = tl.max(wide, axis=0)
        if top + temperature * MOST >= best:
            if temperature > 0:
                noisy = wide + temperature * _noise(seed_low, seed_high, position, token)
                score = tl.where(kept & (z > float("-inf")), noisy, float("-inf"))
            else:
                score = wide
            highest = tl.max(score, axis=0)
            if highest > best:
                best = highest
                winner = tl.min(tl.where(score == highest, token, 0x7FFFFFFFFFFFFFFF), axis=0)
    at = row * tl.num_programs(1) + part
    tl.store(scores + at, best)
    tl.store(tokens + at, winner)
    tl.store(bad + at, wrong)
