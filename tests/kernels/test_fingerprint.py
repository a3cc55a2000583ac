"""The fingerprint of hidden states: its matrix, its numbers, and its bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from countersign.kernels.dispatch import Backend
from countersign.kernels.fingerprint import Fingerprinter, fingerprint, projection
from countersign.kernels.native import library as native
from countersign.kernels.native.product import Product

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS: list[Backend] = ["reference", "triton"]


def hidden_states(rows: int, hidden: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, hidden, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize(("hidden", "size"), [(2, 2), (64, 16), (300, 128)])
def test_the_columns_are_orthonormal(hidden: int, size: int) -> None:
    q = projection(7, hidden, size).double()
    assert (q.T @ q - torch.eye(size)).abs().max() < 1e-6


def test_a_seed_names_one_matrix_and_another_seed_another() -> None:
    once = projection(7, 64, 4).clone()
    projection.cache_clear()
    assert torch.equal(projection(7, 64, 4), once)
    assert not torch.equal(projection(8, 64, 4), once)
    assert projection(7 + (1 << 40), 64, 4)[0, 0] != once[0, 0]


def test_the_matrix_stays_what_it_is() -> None:
    # Receipts of years ago name it by its seed alone.
    expected = torch.tensor([[-0.0685, -0.6069], [-0.7457, 0.3184]])
    assert torch.allclose(projection(1, 8, 2)[:2], expected, atol=1e-4), projection(1, 8, 2)[:2]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=12)
@given(rows=st.integers(1, 6), hidden=st.sampled_from([2, 63, 64, 200]), size=st.sampled_from([2, 3, 17, 64, 128]))
def test_it_is_the_product_and_a_rows_bits_are_its_own(backend: Backend, rows: int, hidden: int, size: int) -> None:
    q, x = projection(3, hidden, min(size, hidden)).to(DEVICE), hidden_states(rows, hidden)
    found = fingerprint(x, q, backend=backend)
    exact = x.double() @ q.double()
    assert (found - exact).abs().max() <= 2e-6 * exact.abs().max().clamp_min(1)
    assert torch.equal(fingerprint(x[-1:], q, backend=backend), found[-1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_states_are_summed_in_fp32(backend: Backend) -> None:
    q, x = projection(3, 256, 16).to(DEVICE), hidden_states(3, 256).bfloat16()
    found = fingerprint(x, q, backend=backend)
    assert found.dtype is torch.float32
    assert (found - x.double() @ q.double()).abs().max() <= 2e-6 * 4


def team(threads: int = 1, variant: str | None = None) -> native.Team:
    library = native.load(variant)
    assert library is not None, "the C kernels are not built: run `make`"
    return native.Team(library, threads)


@settings(max_examples=12)
@given(rows=st.integers(1, 40), hidden=st.sampled_from([2, 63, 64, 200]), size=st.sampled_from([2, 3, 17, 64, 128]))
def test_natively_too_it_is_the_product_and_a_rows_bits_are_its_own(rows: int, hidden: int, size: int) -> None:
    q, x = projection(3, hidden, min(size, hidden)), hidden_states(rows, hidden).cpu()
    found = Product(team(), q.T)(x)
    exact = x.double() @ q.double()
    assert (found - exact).abs().max() <= 2e-6 * exact.abs().max().clamp_min(1)
    for other in (Product(team(3), q.T)(x), Product(team(variant="v3"), q.T)(x)):
        assert torch.equal(other, found)
    assert torch.equal(Product(team(), q.T)(x[-1:]), found[-1:])
    assert Product(team(), q.T)(x[:0]).shape == (0, q.shape[1])


@pytest.mark.parametrize("threads", [0, 2], ids=["torch", "native"])
def test_what_is_signed_is_fp16_and_always_finite_for_finite_states(threads: int) -> None:
    made = Fingerprinter(9, 64, 8, team(threads) if threads else None)
    states = torch.cat([hidden_states(5, 64).cpu(), 1e7 * hidden_states(1, 64, 1).cpu()])
    found = made(states)
    assert found.dtype == np.float16
    assert found.shape == (6, 8)
    assert np.isfinite(found).all()
    exact = (states.double() @ projection(9, 64, 8).double()).clamp(-65504, 65504).numpy()
    assert np.abs(found - exact).max() <= 2**-11 * np.abs(exact).max()
    assert np.abs(found[:5] - exact[:5]).max() <= 2**-11 * np.abs(exact[:5]).max() + 1e-6
    assert np.isnan(made(states * torch.nan)).all()


def test_states_in_bf16_are_taken_as_they_are() -> None:
    states = hidden_states(3, 64).cpu().bfloat16()
    assert np.array_equal(Fingerprinter(9, 64, 8, team())(states), Fingerprinter(9, 64, 8)(states.float()))


def test_no_rows_have_no_fingerprints() -> None:
    assert fingerprint(torch.zeros(0, 8), projection(1, 8, 2)).shape == (0, 2)


@pytest.mark.parametrize(
    ("x", "q", "message"),
    [
        (torch.zeros(8), torch.zeros(8, 2), r"x is \(8,\); it must be \(M, H\)"),
        (torch.zeros(1, 8), torch.zeros(9, 2), r"q is \(9, 2\); it must be \(8, k\)"),
        (torch.zeros(1, 8), torch.zeros(8, 2).double(), "q is torch.float64"),
        (torch.zeros(1, 8), torch.zeros(2, 8).T, "q has strides"),
        (torch.zeros(1, 8), torch.zeros(8, 129), "at most 128"),
        (torch.zeros(1, 8), torch.zeros(8, 2, device="meta"), "q is on meta"),
    ],
)
def test_what_it_does_not_take_is_refused_by_name(x: Tensor, q: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fingerprint(x, q)


@pytest.mark.parametrize(("seed", "hidden", "size"), [(1, 8, 1), (1, 8, 9), (1, 300, 129), (-1, 8, 2), (1 << 64, 8, 2)])
def test_a_projection_that_cannot_be_is_refused(seed: int, hidden: int, size: int) -> None:
    with pytest.raises(ValueError, match=r"fingerprint of|unsigned 64-bit"):
        projection(seed, hidden, size)
