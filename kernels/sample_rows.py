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


def threshold(row: Tensor, rule: Rule) -> tuple[float, int]:
    """(the least logit that top-k and top-p keep, the highest id of those that equal it and are kept), for row (V,).

    (-infinity, V) where all stay.
    """
    size = len(row)
    all_stay = rule.temperature == 0 or (rule.top_p >= 1 and not 0 < rule.top_k < size)
    if all_stay or not bool(torch.isfinite(row.max())):  # no token comes of a row that is not finite
        return -float("inf"), size
    ids = gumbel.allowed(row.double().cpu().numpy(), temperature=rule.temperature, top_k=rule.top_k, top_p=rule.top_p)
    kept = row[torch.from_numpy(ids).to(row.device)]
    least = kept.min()
    return float(least), int(ids[int((kept == least).nonzero()[-1])])
