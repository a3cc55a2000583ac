"""A mixture of experts: each row goes to few of many MLPs, each of which runs once over all rows that chose it.

    p = softmax(router x)
    y = sum over r < k of s_r expert_{e_r}(x)      e_r: the expert of the r-th largest p, s_r = p_{e_r}

with s divided by its sum where ``normalised``. A row's outputs are added in the order of r, whichever rows it shared
its experts with, so that its bits are its own (Mixtral, Jiang et al. 2024, section 2.1).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def route(logits: Tensor, per_token: int, *, normalised: bool) -> tuple[Tensor, Tensor]:
    """The experts of each row (M, k) int64, largest probability first, ties to the lower expert; their shares, fp32.

    Args:
        logits: (M, E).
        per_token: k.
        normalised: whether a row's shares add up to 1.
    """
    probabilities = torch.softmax(logits.float(), dim=-1)
    # topk leaves the order of ties open; a stable sort does not.
    shares, experts = torch.sort(probabilities, dim=-1, descending=True, stable=True)
    shares, experts = shares[:, :per_token], experts[:, :per_token]
    if not normalised:
        return experts, shares
    total = shares[:, :1].clone()
    for rank in range(1, per_token):
        total += shares[:, rank : rank + 1]
    return experts, shares / total


def mix(x: Tensor, experts: Tensor, shares: Tensor, count: int, run: Callable[[int, Tensor], Tensor]) -> Tensor:
    """(M, H) to (M, H).

    Args:
        x: (M, H).
        experts: (M, k), of :func:`route`.
        shares: (M, k), likewise.
        count: E.
        run: (expert, its rows (m, H)) to (m, H), each row on its own; called once for each expert that a row chose.
    """
    rows, per_token = experts.shape
    chosen = experts.reshape(-1)
    order = torch.argsort(chosen, stable=True)
    results = x.new_empty(rows * per_token, x.shape[1])
    stop = 0
    for expert, size in enumerate(torch.bincount(chosen, minlength=count).tolist()):
        start, stop = stop, stop + size
        if size:
            places = order[start:stop]
            results[places] = run(expert, x.index_select(0, places // per_token))
    by_rank = results.view(rows, per_token, -1)
    # Products and sums stay apart, as a fused multiply-add would round differently in vector and in scalar code.
    mixed = by_rank[:, 0].float() * shares[:, :1]
    for rank in range(1, per_token):
        mixed += by_rank[:, rank].float() * shares[:, rank : rank + 1]
    return mixed.to(x.dtype)
