"""The product whose rows keep their bits: right, and the same at any number of rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from countersign.kernels.dispatch import Backend
from countersign.kernels.matmul_invariant import matmul_invariant

pytestmark = pytest.mark.usefixtures("dot_by_row")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS: list[Backend] = ["reference", "triton"]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=12)
@given(
    rows=st.integers(1, 70),
    columns=st.sampled_from([1, 63, 64, 130]),
    inner=st.sampled_from([1, 31, 32, 100]),
    biased=st.booleans(),
    part=st.tuples(st.integers(0, 69), st.integers(1, 70)),
)
def test_the_product_is_right_and_a_row_has_the_same_bits_among_any_others(
    backend: Backend, rows: int, columns: int, inner: int, biased: bool, part: tuple[int, int]
) -> None:
    x, weight = normal(rows, inner), normal(columns, inner, seed=1)
    bias = normal(columns, seed=2) if biased else None
    found = matmul_invariant(x, weight, bias, backend=backend)
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert (found - expected).abs().max() <= 2e-6 * max(1.0, float(expected.abs().max()))
    first = part[0] % rows
    some = slice(first, first + part[1])
    assert torch.equal(matmul_invariant(x[some], weight, bias, backend=backend), found[some])


def test_bf16_is_as_near_as_torch() -> None:
    x, weight = normal(9, 96, dtype=torch.bfloat16), normal(40, 96, seed=1, dtype=torch.bfloat16)
    expected = x.double() @ weight.double().T
    errors = [(matmul_invariant(x, weight, backend=one).double() - expected).abs().max() for one in BACKENDS]
    assert errors[1] <= 2 * errors[0]


@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        (torch.zeros(3), torch.zeros(4, 3), None, r"x is \(3,\); it must be \(M, K\)"),
        (torch.zeros(2, 3), torch.zeros(4, 5), None, r"weight is \(4, 5\); it must be \(N, 3\)"),
        (torch.zeros(2, 3), torch.zeros(4, 3).bfloat16(), None, "weight is torch.bfloat16; it must be torch.float32"),
        (torch.zeros(3, 2).T, torch.zeros(4, 3), None, "x has strides"),
        (torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(5), r"bias is \(5,\); it must be \(4,\)"),
        (torch.zeros(2, 3), torch.zeros(4, 3, device="meta"), None, "weight is on meta"),
    ],
)
def test_what_it_does_not_take_is_refused_by_name(x: Tensor, weight: Tensor, bias: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        matmul_invariant(x, weight, bias)
