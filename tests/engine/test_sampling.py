"""Sampling parameters, and what happens to logits that are not finite."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from countersign.kernels import gumbel
from countersign.kernels.native import library as native
from countersign.kernels.native.library import Team
from countersign.services.engine.errors import InvalidSampling, NonFiniteLogits
from countersign.services.engine.sampling import NOT_FINITE, Allowed, Draws, Sampling, allow, draw, perturbed, sample

ROWS = torch.randn(6, 300, generator=torch.Generator().manual_seed(4)) * 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("seed", -1),
        ("seed", 2**64),
    ],
)
def test_a_parameter_outside_its_range_is_refused_by_name_and_value(field: str, value: float) -> None:
    with pytest.raises(InvalidSampling, match=f"{field} is {value}"):
        Sampling(**{field: value})  # type: ignore[arg-type]  # one field of several types


@pytest.fixture(scope="module", params=["native", "plain"])
def team(request: pytest.FixtureRequest) -> Team | None:
    """Who draws: threads of native code, or plain Python."""
    return native_team() if request.param == "native" else None


def native_team() -> Team:
    library = native.load()
    assert library is not None, "the C kernels are not built: run `make`"
    return Team(library, 2)


def test_rows_are_drawn_each_with_its_own_position_and_parameters(team: Team | None) -> None:
    rows = ROWS.clone()
    rows[3] = rows[1]
    asks = [
        Draws([3], Sampling()),
        Draws([4, 2**31 - 1], Sampling(0.8, seed=1)),
        Draws([], Sampling()),
        Draws([4], Sampling(0.8, seed=1)),
        Draws([6, 6], Sampling(1.0, 5, 0.9, 2)),
    ]
    flat = [(position, ask.sampling) for ask in asks for position in ask.positions]
    expected = [sample(row, *which) for row, which in zip(rows, flat, strict=True)]
    tokens = draw(rows, asks, team)
    assert tokens == expected
    assert tokens[1] == tokens[3]
    assert tokens[0] == int(ROWS[0].argmax())


def test_nothing_asked_is_nothing_drawn(team: Team | None) -> None:
    assert draw(torch.empty(0, 300), [], team) == []


@dataclass(frozen=True)
class Batch:
    """Rows of logits and what is asked of them."""

    logits: torch.Tensor
    asks: list[Draws]


@st.composite
def batches(draw_: st.DrawFn) -> Batch:
    size = draw_(st.sampled_from((1, 2, 15, 16, 17, 31, 32, 33, 100, 300)))
    rng = np.random.default_rng(draw_(st.integers(0, 2**32)))
    asks, rows = [], []
    for _ in range(draw_(st.integers(1, 4))):
        sampling = Sampling(
            draw_(st.sampled_from((0.0, 1e-3, 0.8, 1.0, 3.0))),
            draw_(st.sampled_from((0, 1, 5, 255, 256, 257, 1000))),
            draw_(st.sampled_from((1.0, 0.95, 0.3))),
            draw_(st.integers(0, 2**64 - 1)),
        )
        masks: list[Allowed | None] = []
        for _ in range(draw_(st.integers(1, 3))):
            # Few distinct values have ties; every id may be ruled out, a bad logit too.
            row = rng.integers(-3, 4, size).astype(np.float32) if draw_(st.booleans()) else rng.normal(0, 3, size)
            if draw_(st.integers(0, 5)) == 0:
                row[rng.integers(size)] = draw_(st.sampled_from((math.nan, math.inf, -math.inf)))
            masks.append(allow(np.flatnonzero(rng.random(size) < 0.4), size) if draw_(st.booleans()) else None)
            rows.append(row)
        first = draw_(st.integers(0, 2**31 - 10))
        asks.append(Draws(range(first, first + len(masks)), sampling, masks if draw_(st.booleans()) else None))
    return Batch(torch.from_numpy(np.array(rows, dtype=np.float32)), asks)


def expected_of(batch: Batch) -> list[int]:
    """Row by row, with what a mask rules out taken away beforehand."""
    rows, tokens = iter(batch.logits.clone()), []
    for ask in batch.asks:
        for position, mask in zip(ask.positions, ask.allowed or [None] * len(ask.positions), strict=True):
            row = next(rows)
            if mask is not None:
                row[[not mask[i // 32] >> i % 32 & 1 for i in range(len(row))]] = -math.inf
            try:
                tokens.append(sample(row, position, ask.sampling))
            except NonFiniteLogits:
                tokens.append(NOT_FINITE)
    return tokens


@settings(max_examples=300)
@given(batch=batches())
def test_whoever_draws_draws_the_same(team: Team | None, batch: Batch) -> None:
    assert draw(batch.logits.clone(), batch.asks, team) == expected_of(batch)


def test_a_mask_leaves_what_it_names_and_one_that_names_nothing_has_no_sample(team: Team | None) -> None:
    rows = torch.zeros(4, 300)
    rows[:, 7] = 9.0
    rows[1, 7] = math.nan  # ruled out: all right
    masks = [allow([0, 31, 32, 299], 300), allow([299], 300), None, allow([], 300)]
    tokens = draw(rows, [Draws(range(4), Sampling(), masks)], team)
    assert tokens == [0, 299, 7, NOT_FINITE]
    seen = {draw(torch.zeros(1, 300), [Draws([i], Sampling(1.0), masks[:1])], team)[0] for i in range(60)}
    assert seen == {0, 31, 32, 299}


def test_the_token_sampled_is_the_best_of_the_perturbed_scores() -> None:
    for position, row in enumerate(ROWS):
        for sampling in (Sampling(), Sampling(0.8, seed=9), Sampling(1.2, 40, 0.7, 2**63)):
            ids, scores = perturbed(row, position, sampling)
            assert sample(row, position, sampling) == ids[np.argmax(scores)]


def test_the_noise_is_that_of_the_seed_and_position() -> None:
    row = torch.zeros(50)
    expected = int(np.argmax(gumbel.gumbel(77, 12, np.arange(50))))
    assert sample(row, 12, Sampling(1.0, seed=77)) == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_nan_or_infinity_is_refused_alone_and_marked_in_a_batch(
    bad: float, temperature: float, team: Team | None
) -> None:
    rows = ROWS.clone()
    rows[2, 299] = bad
    sampling = Sampling(temperature)
    expected = [NOT_FINITE if i == 2 else sample(row, 40 + i, sampling) for i, row in enumerate(rows)]
    assert draw(rows, [Draws(range(40, 46), sampling)], team) == expected
    for refusing in (sample, perturbed):
        with pytest.raises(NonFiniteLogits, match="position 42") as refused:
            refusing(rows[2], 42, sampling)
        assert refused.value.position == 42


def test_a_token_ruled_out_by_minus_infinity_is_never_sampled_and_all_of_them_is_an_error() -> None:
    row = torch.full((20,), -math.inf)
    with pytest.raises(NonFiniteLogits):
        sample(row, 0, Sampling(1.0))
    row[13] = -5.0
    assert {sample(row, position, Sampling(1.0)) for position in range(30)} == {13}
