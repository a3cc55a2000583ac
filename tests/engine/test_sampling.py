"""Sampling parameters, and what happens to logits that are not finite."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from countersign.kernels import gumbel
from countersign.services.engine.errors import InvalidSampling, NonFiniteLogits
from countersign.services.engine.sampling import Sampling, perturbed, sample, sample_rows

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


def test_rows_are_sampled_each_with_its_own_position_and_parameters() -> None:
    samplings = [
        Sampling(),
        Sampling(0.8, seed=1),
        Sampling(1.0, 5, 0.9, 2),
        Sampling(0.8, seed=1),
        Sampling(),
        Sampling(2.0),
    ]
    positions = [3, 4, 5, 4, 6, 2**32 - 1]
    rows = ROWS.clone()
    rows[3] = rows[1]
    tokens = sample_rows(rows, positions, samplings)
    assert tokens == [sample(*arguments) for arguments in zip(rows, positions, samplings, strict=True)]
    assert tokens[1] == tokens[3]
    assert tokens[0] == int(ROWS[0].argmax())


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
def test_nan_or_infinity_is_refused_with_the_position_and_row(bad: float, temperature: float) -> None:
    rows = ROWS.clone()
    rows[2, 299] = bad
    with pytest.raises(NonFiniteLogits, match="position 42") as refused:
        sample_rows(rows, [40, 41, 42, 43, 44, 45], [Sampling(temperature)] * 6)
    assert (refused.value.position, refused.value.row) == (42, 2)
    with pytest.raises(NonFiniteLogits):
        perturbed(rows[2], 42, Sampling(temperature))


def test_a_token_ruled_out_by_minus_infinity_is_never_sampled_and_all_of_them_is_an_error() -> None:
    row = torch.full((20,), -math.inf)
    with pytest.raises(NonFiniteLogits):
        sample(row, 0, Sampling(1.0))
    row[13] = -5.0
    assert {sample(row, position, Sampling(1.0)) for position in range(30)} == {13}
