"""RMS norm and rotary embedding: the reference and the Triton kernel against fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from countersign.kernels.dispatch import Backend
from countersign.kernels.norm_rope import norm_rope, rms_norm
from countersign.kernels.rotary import rotate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS: list[Backend] = ["reference", "triton"]
EPS = 1e-5


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def exact_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.double()
    return wide / (wide.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * weight.double()


def exact_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.double().chunk(2, dim=-1)
    cos, sin = cos.double()[:, None], sin.double()[:, None]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def angles(rows: int, size: int) -> tuple[Tensor, Tensor]:
    angle = normal(rows, size // 2, seed=9)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=10)
@given(rows=st.integers(1, 5), size=st.sampled_from([1, 2, 63, 64, 100, 257]), seed=st.integers(0, 99))
def test_the_norm_is_right_and_a_rows_bits_are_its_own(backend: Backend, rows: int, size: int, seed: int) -> None:
    x, weight = normal(rows, size, seed=seed), normal(size, seed=seed + 1)
    found = rms_norm(x, weight, EPS, backend=backend)
    assert (found - exact_norm(x, weight)).abs().max() <= 2e-6 * exact_norm(x, weight).abs().max().clamp_min(1)
    assert torch.equal(rms_norm(x[-1:], weight, EPS, backend=backend), found[-1:])


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=10)
@given(
    rows=st.integers(1, 4),
    heads=st.integers(1, 3),
    size=st.sampled_from([2, 6, 64, 80, 128]),
    normed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_heads_are_normed_and_turned_and_a_rows_bits_are_its_own(
    backend: Backend, rows: int, heads: int, size: int, normed: bool, seed: int
) -> None:
    x, weight = normal(rows, heads, size, seed=seed), normal(heads, size, seed=seed + 1) if normed else None
    cos, sin = angles(rows, size)
    found = norm_rope(x, weight, cos, sin, EPS, backend=backend)
    expected = exact_rope(x if weight is None else exact_norm(x, weight), cos, sin)
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max().clamp_min(1)
    alone = norm_rope(x[-1:], weight, cos[-1:], sin[-1:], EPS, backend=backend)
    assert torch.equal(alone, found[-1:])


def test_rotation_is_that_of_the_cpu_engine() -> None:
    x, (cos, sin) = normal(3, 2, 64).cpu(), (part.cpu() for part in angles(3, 64))
    doubled = torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]
    assert torch.allclose(norm_rope(x, None, cos, sin, EPS, backend="reference"), rotate(x, *doubled), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_bf16_is_as_near_as_the_reference(dtype: torch.dtype) -> None:
    x, weight = normal(4, 2, 64, dtype=dtype), normal(2, 64, seed=1, dtype=dtype)
    cos, sin = angles(4, 64)
    expected = exact_rope(exact_norm(x, weight), cos, sin)
    errors = [
        (norm_rope(x, weight, cos, sin, EPS, backend=backend).double() - expected).abs().max() for backend in BACKENDS
    ]
    assert errors[1] <= 2 * errors[0]
    flat, of_row = x.reshape(4, 128), weight.reshape(128)
    errors = [
        (rms_norm(flat, of_row, EPS, backend=backend).double() - exact_norm(flat, of_row)).abs().max()
        for backend in BACKENDS
    ]
    assert errors[1] <= 2 * errors[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3)}, r"x is \(2, 3\); it must be \(M, heads, D\)"),
        ({"x": torch.zeros(2, 3, 7)}, "heads of 7; rotation turns pairs"),
        ({"x": torch.zeros(2, 3, 8, dtype=torch.float16)}, "x is torch.float16"),
        ({"x": torch.zeros(2, 8, 3).transpose(1, 2)}, "x has strides"),
        ({"cos": torch.zeros(2, 8)}, r"cos is \(2, 8\); it must be \(2, 4\)"),
        ({"sin": torch.zeros(2, 4, dtype=torch.float64)}, "sin is torch.float64"),
        ({"weight": torch.zeros(8)}, r"weight is \(8,\); it must be \(3, 8\)"),
        ({"weight": torch.zeros(3, 8, device="meta")}, "weight is on meta"),
    ],
)
def test_what_it_does_not_take_is_refused_by_name(change: dict[str, Tensor], message: str) -> None:
    given = {"x": torch.zeros(2, 3, 8), "weight": torch.zeros(3, 8), "cos": torch.zeros(2, 4), "sin": torch.zeros(2, 4)}
    given |= change
    with pytest.raises(ValueError, match=message):
        norm_rope(given["x"], given["weight"], given["cos"], given["sin"], EPS)


def test_a_norm_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight is \(5,\); it must be \(6,\)"):
        rms_norm(torch.zeros(2, 6), torch.zeros(5), EPS)
