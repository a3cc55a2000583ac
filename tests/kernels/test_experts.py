"""Routing and mixing of experts against their equations, and a row's bits against the rows beside it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from countersign.kernels.experts import mix, route

EXPERTS, WIDTH = 5, 7


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def scale(expert: int, rows: Tensor) -> Tensor:
    return rows * (expert + 1.1)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("per_token", [1, 3, EXPERTS])
def test_a_row_is_the_sum_of_its_experts_by_their_shares(per_token: int, normalised: bool) -> None:
    x, logits = normal(9, WIDTH), normal(9, EXPERTS)
    experts, shares = route(logits, per_token, normalised=normalised)
    mixed = mix(x, experts, shares, EXPERTS, scale)
    for row in range(9):
        probabilities = torch.softmax(logits[row].double(), 0)
        best = sorted(range(EXPERTS), key=lambda expert: -float(probabilities[expert]))[:per_token]
        total = sum(float(probabilities[expert]) for expert in best) if normalised else 1.0
        factor = sum(float(probabilities[expert]) * (expert + 1.1) for expert in best) / total
        assert experts[row].tolist() == best
        assert torch.allclose(mixed[row].double(), factor * x[row].double(), atol=1e-5)


def test_ties_go_to_the_lower_expert() -> None:
    experts, shares = route(torch.tensor([[1.0, 3.0, 3.0, 3.0, 1.0]]).repeat(40, 1), 4, normalised=True)
    assert experts.tolist() == [[1, 2, 3, 0]] * 40
    assert float(shares[0].sum()) == pytest.approx(1.0)


def test_each_expert_that_was_chosen_runs_once() -> None:
    calls: list[tuple[int, int]] = []

    def counted(expert: int, rows: Tensor) -> Tensor:
        calls.append((expert, len(rows)))
        return rows

    chosen = torch.tensor([[4, 1], [1, 0], [4, 1]])
    mix(normal(3, WIDTH), chosen, torch.ones(3, 2), EXPERTS, counted)
    assert calls == [(0, 1), (1, 3), (4, 2)]


@settings(max_examples=60)
@given(st.lists(st.integers(0, 19), min_size=1, max_size=20, unique=True), st.integers(1, EXPERTS), st.booleans())
def test_a_rows_bits_do_not_depend_on_the_rows_beside_it(picked: list[int], per_token: int, normalised: bool) -> None:
    x, logits = normal(20, WIDTH), normal(20, EXPERTS)
    logits[:, 3] = logits[:, 1]

    def both(part: list[int]) -> Tensor:
        return mix(x[part], *route(logits[part], per_token, normalised=normalised), EXPERTS, scale)

    assert torch.equal(both(picked), both(list(range(20)))[picked])


def test_a_row_of_nan_stays_alone() -> None:
    x, logits = normal(6, WIDTH), normal(6, EXPERTS)
    x[2], logits[2] = torch.nan, torch.nan
    experts, shares = route(logits, 2, normalised=True)
    finite = mix(x, experts, shares, EXPERTS, scale).isfinite().all(dim=1)
    assert finite.tolist() == [True, True, False, True, True, True]
