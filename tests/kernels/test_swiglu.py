"""SwiGLU and rotary embedding against their equations, and an element's bits against its surroundings."""

from __future__ import annotations

import math

import pytest
import torch

from countersign.kernels.dispatch import Backend
from countersign.kernels.rotary import rotate
from countersign.kernels.swiglu import swiglu

BACKENDS: list[Backend] = ["reference", "triton"]


def normal(*shape: int) -> torch.Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(5))


def test_swiglu_follows_its_equation_and_survives_extreme_gates() -> None:
    gate_up = torch.tensor([[0.0, 1.0, -1.0, 100.0, -100.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert torch.allclose(swiglu(gate_up).double(), gate / (1 + torch.exp(-gate)) * up, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("size", [77, 768, 1001])
def test_swiglu_gives_a_row_the_same_bits_wherever_a_threads_share_ends(threads: int, size: int) -> None:
    gate_up = normal(250, 2 * size)
    alone = torch.cat([swiglu(row) for row in torch.split(gate_up, 1)])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(swiglu(gate_up), alone)
        assert torch.equal(swiglu(gate_up[3:]), alone[3:])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("size", [2, 6, 64])
def test_rotation_turns_each_pair_by_its_angle(size: int) -> None:
    x, angles = normal(3, 2, size), normal(3, 1, size // 2)
    cos, sin = torch.cos(angles).repeat(1, 1, 2), torch.cat((-torch.sin(angles), torch.sin(angles)), dim=-1)
    turned = rotate(x, cos, sin)
    pairs = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
    assert torch.allclose(turned, torch.cat((pairs.real, pairs.imag), dim=-1), atol=1e-5)
    assert math.isclose(float(turned.norm()), float(x.norm()), rel_tol=1e-6)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("width", [1, 100, 1025])
def test_the_triton_kernel_follows_the_equation(rows: int, width: int, device: str) -> None:
    gate_up = normal(rows, 2 * width).to(device)
    gate, up = gate_up.double().chunk(2, dim=-1)
    exact = gate / (1 + torch.exp(-gate)) * up
    found = swiglu(gate_up, backend="triton")
    assert (found - exact).abs().max() <= 2e-6 * exact.abs().max().clamp_min(1)
    assert torch.equal(swiglu(gate_up[-1:], backend="triton"), found[-1:])
    half = gate_up.bfloat16()
    gate, up = half.double().chunk(2, dim=-1)
    exact = gate / (1 + torch.exp(-gate)) * up
    errors = [(swiglu(half, backend=one).double() - exact).abs().max() for one in BACKENDS]
    assert errors[1] <= 2 * errors[0]


@pytest.mark.parametrize(
    ("gate_up", "message"),
    [
        (torch.zeros(2, 5), "5 columns"),
        (torch.zeros(4), r"it must be \(M, 2 I\)"),
        (torch.zeros(2, 4, dtype=torch.float64), "torch.float64"),
        (torch.zeros(4, 2).T, "strides"),
    ],
)
def test_what_swiglu_does_not_take_is_refused_by_name(gate_up: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        swiglu(gate_up)
