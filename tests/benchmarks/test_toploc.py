"""TOPLOC as its paper has it: a proof is the polynomial through the largest activations, and tells other states."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from countersign.cli import bench

TOPLOC: Any = bench.load("toploc")


def states(seed: int = 0, hidden: int = 256) -> Tensor:
    return torch.randn(TOPLOC.CHUNK, hidden, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=20)
@given(st.lists(st.integers(0, TOPLOC.PRIME - 1), min_size=1, max_size=40, unique=True), st.randoms())
def test_the_polynomial_goes_through_all_points(x: list[int], random: Any) -> None:
    y = [random.randrange(TOPLOC.PRIME) for _ in x]
    coefficients = TOPLOC.interpolate(np.array(x), np.array(y))
    assert TOPLOC.evaluate(coefficients, np.array(x)).tolist() == y
    # Once more in Python's integers, from the coefficients alone.
    assert sum(int(c) * x[0] ** power for power, c in enumerate(coefficients)) % TOPLOC.PRIME == y[0]


def test_a_proof_is_258_bytes_and_comes_back() -> None:
    proof = TOPLOC.prove(states())
    data = proof.encode()
    assert len(data) == 258
    again = TOPLOC.Proof.decode(data)
    assert (again.modulus, again.coefficients.tolist()) == (proof.modulus, proof.coefficients.tolist())


@pytest.mark.parametrize("data", [b"", bytes(257), bytes(258)], ids=["nothing", "short", "no modulus"])
def test_what_is_no_proof_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="258 bytes"):
        TOPLOC.Proof.decode(data)


def test_the_provers_own_states_agree_in_every_bit() -> None:
    found = TOPLOC.compare(TOPLOC.prove(states()), states())
    assert (found.exponents, found.mean, found.median) == (TOPLOC.LARGEST, 0, 0)
    assert found.passes
    assert TOPLOC.score(TOPLOC.prove(states()), states()) == 0


def test_places_that_fall_together_get_another_modulus() -> None:
    assert TOPLOC.apart(np.array([1, 2, 3])) == TOPLOC.PRIME
    assert TOPLOC.apart(np.array([1, 1 + TOPLOC.PRIME])) == TOPLOC.PRIME - 1


def test_a_little_noise_passes_and_other_states_do_not() -> None:
    proof, noise = TOPLOC.prove(states()), 0.002 * states(1)
    near = TOPLOC.compare(proof, states() + noise)
    assert near.passes
    assert 0 < near.mean < 2
    assert not TOPLOC.compare(proof, states(2)).passes
    assert TOPLOC.score(proof, states() + noise) < TOPLOC.score(proof, states() + 20 * noise) < 128
    assert TOPLOC.score(proof, states(2)) > 100
