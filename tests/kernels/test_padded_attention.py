"""Attention against its equation, and one row's bits against its surroundings."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from countersign.kernels import padded_attention
from countersign.kernels.padded_attention import Mask, Path

PATHS = list(Path)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).transpose(1, 2)


def tokens(batch: int, queries: int, keys: int, heads: tuple[int, int] = (4, 2), size: int = 16) -> list[Tensor]:
    return [
        random(batch, queries, heads[0], size, seed=1),
        random(batch, keys, heads[1], size, seed=2),
        random(batch, keys, heads[1], size, seed=3),
    ]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("window", [None, 700, 3])
@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (2, 2)])
def test_out_and_lse_follow_the_equation(path: Path, window: int | None, heads: tuple[int, int]) -> None:
    q, k, v = tokens(2, 8, 1024, heads)
    positions = torch.stack((torch.arange(900, 908), torch.arange(100, 108)))
    mask = Mask.causal(positions, 1024, window, torch.float32)
    out, lse = padded_attention.attend(q, k, v, mask, scale=0.25, path=path)
    for b, t in ((0, 0), (0, 7), (1, 5)):
        position = int(positions[b, t])
        first = 0 if window is None else max(0, position - window + 1)
        for h in range(heads[0]):
            group = h // (heads[0] // heads[1])
            scores = 0.25 * (k[b, group, first : position + 1].double() @ q[b, h, t].double())
            expected = torch.softmax(scores, 0) @ v[b, group, first : position + 1].double()
            assert torch.allclose(out[b, h, t].double(), expected, rtol=0, atol=2e-6)
            assert lse[b, h, t].item() == pytest.approx(torch.logsumexp(scores, 0).item(), abs=2e-6)


@pytest.mark.parametrize("path", PATHS)
def test_a_row_that_sees_nothing_gives_zero_and_minus_infinity(path: Path) -> None:
    q, k, v = tokens(1, 4, 512)
    mask = Mask.causal(torch.tensor([[-1, 3, -1, -1]]), 512, None, torch.float32)
    out, lse = padded_attention.attend(q, k, v, mask, scale=1.0, path=path)
    for t in (0, 2, 3):
        assert torch.equal(out[:, :, t], torch.zeros(1, 4, 16))
        assert (lse[:, :, t] == -math.inf).all()
    assert torch.isfinite(lse[:, :, 1]).all()


def test_partials_merge_into_the_whole_by_their_lse() -> None:
    q, k, v = tokens(1, 4, 1024)
    whole = Mask.causal(torch.tensor([[100, 600, 1000, 1023]]), 1024, None, torch.float32)
    out, lse = padded_attention.attend(q, k, v, whole, scale=0.25, path=Path.FLASH_CPU)
    parts = []
    for keys in (slice(0, 512), slice(512, 1024)):
        bias = whole.bias[..., keys]
        mask = Mask(bias, (bias == -math.inf).all(dim=-1))
        parts.append(padded_attention.attend(q, k[:, :, keys], v[:, :, keys], mask, scale=0.25, path=Path.FLASH_CPU))
    outs, lses = torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts])
    weights = torch.exp(lses - lses.amax(0))
    merged = (weights[..., None] * outs).sum(0) / weights.sum(0)[..., None]
    assert torch.allclose(merged, out, rtol=0, atol=1e-6)
    assert torch.allclose(lses.amax(0) + torch.log(weights.sum(0)), lse, rtol=0, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([((4, 2), 64), ((4, 1), 32), ((8, 8), 16), ((2, 1), 8), ((6, 2), 24)]),
    rows=st.tuples(st.integers(0, 192), st.integers(1, 64).map(padded_attention.padded_queries)),
    window=st.sampled_from([None, 700, 40]),
    neighbours=st.integers(0, 2),
    more_keys=st.integers(0, 1),
)
def test_a_row_has_the_same_bits_whatever_the_call_it_is_part_of(
    shape: tuple[tuple[int, int], int], rows: tuple[int, int], window: int | None, neighbours: int, more_keys: int
) -> None:
    heads, size = shape
    q, k, v = tokens(1 + neighbours, 256, 1536, heads, size)
    positions = torch.arange(700, 956).repeat(1 + neighbours, 1)
    whole, _ = padded_attention.attend(
        q, k, v, Mask.causal(positions, 1536, window, torch.float32), scale=0.2, path=Path.FLASH_CPU
    )
    part, keys = slice(rows[0], sum(rows)), 1024 + 512 * more_keys
    mask = Mask.causal(positions[:1, part], keys, window, torch.float32)
    alone, _ = padded_attention.attend(
        q[:1, :, part], k[:1, :, :keys], v[:1, :, :keys], mask, scale=0.2, path=Path.FLASH_CPU
    )
    assert torch.equal(alone, whole[:1, :, part])


def test_row_by_row_gives_a_row_the_same_bits_whatever_the_call() -> None:
    assert padded_attention.is_row_invariant(Path.ROW_BY_ROW, 4, 2, 16, torch.float32)


def test_the_fast_path_is_taken_where_it_keeps_a_rows_bits() -> None:
    assert padded_attention.select_path(4, 2, 64, torch.float32) is Path.FLASH_CPU


def test_the_slow_path_is_taken_where_the_fast_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without the padding of queries a tile of fewer than 4 rows arises, whose bits differ.
    monkeypatch.setattr(padded_attention, "QUERY_TILE", 1)
    assert padded_attention.select_path(4, 2, 64, torch.float32) is Path.ROW_BY_ROW


def test_a_call_that_is_not_padded_is_refused() -> None:
    q, k, v = tokens(1, 3, 512)
    mask = Mask.causal(torch.tensor([[0, 1, 2]]), 512, None, torch.float32)
    with pytest.raises(ValueError, match="padded"):
        padded_attention.attend(q, k, v, mask, scale=1.0, path=Path.FLASH_CPU)


@pytest.mark.parametrize(("given_rows", "queries", "keys"), [(0, 0, 0), (1, 4, 512), (4, 4, 512), (513, 516, 1024)])
def test_padding_goes_to_the_next_multiple(given_rows: int, queries: int, keys: int) -> None:
    assert (padded_attention.padded_queries(given_rows), padded_attention.padded_keys(given_rows)) == (queries, keys)


def test_fast_attention_follows_the_equation_at_any_size() -> None:
    q, k, v = tokens(2, 5, 48)
    mask = Mask.causal(torch.stack((torch.arange(20, 25), torch.arange(43, 48))), 48, 30, torch.float32)
    out = padded_attention.attend_fast(q, k, v, mask, scale=0.25)
    expected, _ = padded_attention.reference(q.double(), k.double(), v.double(), mask.bias.double(), 0.25)
    assert torch.allclose(out.double(), expected, atol=1e-5)


def test_other_devices_take_the_slow_path() -> None:
    assert padded_attention.select_path(4, 2, 64, torch.float32, "meta") is Path.ROW_BY_ROW
