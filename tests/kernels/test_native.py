"""The C kernels, each against its torch or NumPy reference, and both variants against each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from countersign.kernels import gumbel
from countersign.kernels.native import library as native
from countersign.kernels.native.library import Library, Team

VARIANTS = ("v3", "v4") if torch.backends.cpu.get_cpu_capability() == "AVX512" else ("v3",)


def loaded(variant: str | None = None) -> Library:
    library = native.load(variant)
    assert library is not None, "the C kernels are not built: run `make`"
    return library


def exponential(x: np.ndarray, variant: str) -> np.ndarray:
    y = np.empty_like(x)
    loaded(variant).exponentials(x.ctypes.data, y.ctypes.data, x.size)
    return y


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_exponential_is_within_two_units_in_the_last_place(variant: str) -> None:
    x = np.linspace(-87.2, 88.2, 400_001, dtype=np.float32)
    exact = np.exp(x.astype(np.float64))
    assert np.max(np.abs(exponential(x, variant) - exact) / np.spacing(exact.astype(np.float32))) < 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_exponential_of_what_is_out_of_range_is_nothing_much_or_nan(variant: str) -> None:
    x = np.array([-math.inf, -1e30, -87.4, 0, 1e30, math.inf, math.nan] * 3, dtype=np.float32)
    y = exponential(x, variant)[:7]
    assert y[:4].tolist() == [0, 0, 0, 1]
    assert np.all(y[4:6] > 1e38)
    assert math.isnan(y[6])


def drawn(rows: np.ndarray, samplings: list[tuple[float, int, float, int]], position: int, variant: str) -> list[int]:
    records = np.zeros(len(rows), dtype=native.SAMPLING)
    for record, (temperature, top_k, top_p, seed) in zip(records, samplings, strict=True):
        record["temperature"], record["top_k"], record["top_p"], record["seed"] = temperature, top_k, top_p, seed
        record["position"] = position
    tokens, logits = np.empty(len(rows), dtype=np.int32), rows.copy()
    library = loaded(variant)
    team = Team(library, 2)
    library.sample(
        team.handle, records.ctypes.data, logits.ctypes.data, rows.shape[1], *rows.shape, tokens.ctypes.data, None
    )
    found: list[int] = tokens.tolist()
    return found


LOGITS = st.one_of(
    st.floats(-40, 40, width=32), st.sampled_from([-math.inf, 0.0, 1.0, 1.5, -1e30, 3e4])
)  # many equal, some ruled out


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=300, deadline=None)
@given(
    logits=st.lists(LOGITS, min_size=1, max_size=80).filter(lambda row: max(row) > -math.inf),
    temperature=st.sampled_from([0.0, 1e-3, 0.3, 0.8, 1.0, 5.0, 1e6]),
    top_k=st.integers(0, 40),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.01]),
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 2**31 - 1),
)
def test_a_sample_is_that_of_the_reference(
    variant: str, logits: list[float], temperature: float, top_k: int, top_p: float, seed: int, position: int
) -> None:
    row = np.array([logits], dtype=np.float32)
    [token] = drawn(row, [(temperature, top_k, top_p, seed)], position, variant)
    left_to_the_reference = temperature > 0 and top_p < 1 and not 0 < top_k < len(logits)
    if left_to_the_reference:
        assert token == native.NOT_HERE
    else:
        expected = gumbel.sample(
            row[0].astype(np.float64), position, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
        )
        assert token == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_samples_over_a_large_vocabulary_are_those_of_the_reference(variant: str) -> None:
    rows = np.random.default_rng(0).normal(0, 4, (300, 20_011)).astype(np.float32)
    rules = [(0.8, 0, 1.0, seed) if seed % 3 else (1.1, 50, 0.9, seed) for seed in range(len(rows))]
    expected = [
        gumbel.sample(row.astype(np.float64), 77, temperature=t, top_k=k, top_p=p, seed=s)
        for row, (t, k, p, s) in zip(rows, rules, strict=True)
    ]
    assert drawn(rows, rules, 77, variant) == expected
    assert len(set(expected)) > 250


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 15, 16, 36])
def test_a_row_that_is_not_finite_is_reported(variant: str, bad: float, place: int) -> None:
    rows = np.zeros((3, 37), dtype=np.float32)
    rows[1, place] = bad
    if bad == -math.inf:
        rows[1] = bad
    tokens = drawn(rows, [(0.0, 0, 1.0, 0), (0.8, 0, 1.0, 0), (0.0, 0, 1.0, 0)], 5, variant)
    assert tokens == [0, native.NOT_FINITE, 0]
