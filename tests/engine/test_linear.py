"""Linear layers: right, invariant, and in the mode that the machine allows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from countersign.services.engine import linear
from countersign.services.engine.linear import LinearMode, LinearPacker, PrepackedLinear, TiledLinear

SHAPES = [(96, 64), (40, 200), (128, 2048)]
KINDS = [PrepackedLinear, TiledLinear]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_product_is_right(
    kind: type[PrepackedLinear | TiledLinear], shape: tuple[int, int], with_bias: bool
) -> None:
    weight, bias = normal(*shape), normal(shape[0]) if with_bias else None
    x = normal(260, shape[1])
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert torch.allclose(kind(weight, bias)(x).double(), expected, rtol=0, atol=1e-3)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.sampled_from(SHAPES), st.integers(1, 300), st.integers(0, 299), st.integers(0, 99))
def test_a_row_has_the_same_bits_in_any_batch(
    kind: type[PrepackedLinear | TiledLinear], shape: tuple[int, int], rows: int, row: int, place: int
) -> None:
    product, x = kind(normal(*shape), None), normal(300, shape[1])
    batch = normal(rows, shape[1]) * 3
    place %= len(batch)
    batch[place] = x[row]
    assert torch.equal(product(batch)[place], product(x[row].expand(4, -1))[0])


@pytest.mark.parametrize(
    ("rows", "padded"), [(0, 0), (1, 4), (4, 4), (5, 8), (65, 96), (256, 256), (257, 260), (600, 608)]
)
def test_rows_are_padded_to_counts_that_were_tried(rows: int, padded: int) -> None:
    assert linear.padded_rows(rows) == padded


def test_a_product_that_depends_on_the_number_of_rows_is_found_out() -> None:
    weight = normal(8, 16)

    def unsteady(x: torch.Tensor) -> torch.Tensor:
        product = F.linear(x.double(), weight.double()).float()
        return torch.nextafter(product, product + 1) if len(x) == 64 else product

    assert not linear.is_row_invariant(unsteady, 16, torch.float32)
    assert linear.is_row_invariant(TiledLinear(weight, None), 16, torch.float32)


def test_the_packer_tries_each_shape_once_and_tells_the_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def only_narrow(_product: object, inputs: int, _dtype: torch.dtype) -> bool:
        tried.append(inputs)
        return inputs < 100

    monkeypatch.setattr(linear, "is_row_invariant", only_narrow)
    packer = LinearPacker()
    modes = [packer.pack(normal(*shape)).mode for shape in [*SHAPES, *SHAPES]]
    assert modes == [LinearMode.PREPACKED, LinearMode.TILED, LinearMode.TILED] * 2
    assert packer.modes == dict(zip(SHAPES, modes, strict=False))
    assert tried == [64, 200, 2048]


def test_the_prepacked_product_sees_only_row_counts_that_were_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    product, rows, plain = PrepackedLinear(normal(8, 16), None), [], PrepackedLinear._product

    def recorded(self: PrepackedLinear, x: torch.Tensor) -> torch.Tensor:
        rows.append(len(x))
        return plain(self, x)

    monkeypatch.setattr(PrepackedLinear, "_product", recorded)
    for count in (1, 5, 256, 517):
        assert product(normal(count, 16)).shape == (count, 8)
    assert rows == [4, 8, 256, 256, 256, 8]


def test_fast_numerics_take_torchs_product_without_a_trial() -> None:
    packer, weight, x = LinearPacker("fast"), normal(8, 16), normal(5, 16)
    product = packer.pack(weight)
    assert packer.modes == {(8, 16): LinearMode.PLAIN}
    assert torch.equal(product(x), F.linear(x, weight))


def test_without_onednn_products_are_tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert LinearPacker().pack(normal(8, 16)).mode is LinearMode.TILED


def test_weights_on_another_device_are_tiled() -> None:
    assert not linear.has_prepacked(torch.empty(8, 16, device="meta"))
    assert linear.has_prepacked(torch.empty(8, 16))


def test_tiles_always_have_16_rows_on_cpu_and_128_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    product, rows, plain = TiledLinear(normal(8, 16), None), [], F.linear

    def recorded(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows.append(len(x))
        return plain(x, weight, bias)

    monkeypatch.setattr(F, "linear", recorded)
    assert product(normal(37, 16)).shape == (37, 8)
    assert rows == [16, 16, 16]
    assert TiledLinear(torch.empty(8, 16, device="meta"), None)(torch.empty(130, 16, device="meta")).shape == (130, 8)
    assert rows[3:] == [128, 128]
