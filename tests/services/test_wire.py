"""Lossy wires: how much they lose, that they are declared, and that they never mix with exact blocks."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from countersign.services.target.wire import Wire, WireName

HEADS, WIDTH, LAYERS = 4, 16 * 8, 3
LOSSY = get_args(WireName)
# Half a step of int8, and e4m3's three bits after the point, beside the largest of a row.
LOST = {"int8": 0.5 / 127, "fp8": 2**-4}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def block(dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(LAYERS, 2, HEADS, WIDTH, generator=generator)
    return (rows * torch.logspace(-3, 2, HEADS)[:, None]).to(dtype)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def tensor_of(data: bytes, dtype: torch.dtype) -> Any:
    return torch.frombuffer(bytearray(data), dtype=dtype).view(LAYERS, 2, HEADS, WIDTH)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LOSSY)
def test_each_number_comes_back_as_near_as_its_rows_scale_allows(name: WireName, dtype: torch.dtype) -> None:
    wire, sent = Wire(name, dtype, WIDTH), block(dtype)
    encoded = bytes(wire.encode(raw(sent)))
    assert len(encoded) == wire.size(len(raw(sent))) == LAYERS * 2 * HEADS * (4 + WIDTH)
    got = tensor_of(wire.decode(encoded), dtype).float()
    largest = sent.float().abs().amax(dim=-1, keepdim=True)
    rounding = torch.finfo(dtype).eps
    assert ((got - sent.float()).abs() <= (LOST[name] + rounding) * largest).all()
    assert not torch.equal(got, sent.float())


@pytest.mark.parametrize("name", LOSSY)
def test_layers_that_are_encoded_one_by_one_make_the_block(name: WireName) -> None:
    wire, sent = Wire(name, torch.float32, WIDTH), block(torch.float32)
    parts = [bytes(wire.encode(raw(layer))) for layer in sent]
    assert b"".join(parts) == wire.encode(raw(sent))


@pytest.mark.parametrize("name", LOSSY)
def test_a_row_of_zeros_stays_zero(name: WireName) -> None:
    wire = Wire(name, torch.float32, WIDTH)
    zeros = bytes(4 * WIDTH)
    assert wire.decode(bytes(wire.encode(zeros))) == zeros


def test_each_wire_names_another_cache_format() -> None:
    assert len({Wire(name, torch.float32, WIDTH).suffix for name in get_args(WireName)}) == 2
