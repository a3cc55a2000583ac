"""The C kernels, each against its torch or NumPy reference, and both variants against each other."""

from __future__ import annotations

import ctypes
import importlib.util
import math
from ctypes import c_float, c_int32, c_int64, c_void_p
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from countersign.kernels import gumbel
from countersign.kernels.native import library as native
from countersign.kernels.native.library import Library, Team, WeightKind

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
    records = b"".join(native.pack_sampling(t, p, seed, k, position=position) for t, k, p, seed in samplings)
    tokens, logits = np.empty(len(rows), dtype=np.int32), rows.copy()
    library = loaded(variant)
    team = Team(library, 2)
    library.sample(team.handle, records, logits.ctypes.data, rows.shape[1], *rows.shape, tokens.ctypes.data, None)
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


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("temperature", "top_k"), [(0.0, 0), (0.8, 0), (0.8, 7), (1.3, 1)])
def test_the_margin_is_the_lead_over_the_next_best(variant: str, temperature: float, top_k: int) -> None:
    rows = np.random.default_rng(1).normal(0, 2, (60, 501)).astype(np.float32)
    records = b"".join(native.pack_sampling(temperature, 1.0, seed, top_k, position=9) for seed in range(60))
    tokens = np.empty(60, dtype=np.int32)
    margins, logits, library = np.empty(60, dtype=np.float32), rows.copy(), loaded(variant)
    team = Team(library, 1)
    library.sample(team.handle, records, logits.ctypes.data, 501, *rows.shape, tokens.ctypes.data, margins.ctypes.data)
    for seed, row in enumerate(rows.astype(np.float64)):
        ids, scores = gumbel.perturbed(row, 9, temperature=temperature, top_k=top_k, top_p=1.0, seed=seed)
        order = np.argsort(scores)[::-1]
        assert tokens[seed] == ids[order[0]]
        lead = scores[order[0]] - scores[order[1]] if len(ids) > 1 else math.inf
        assert margins[seed] == np.float32(lead)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("gate_up", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 3), (96, 5), (224, 16), (32, 1)])
def test_panels_hold_every_weight_at_its_place(variant: str, gate_up: bool, outputs: int, inputs: int) -> None:
    weight = torch.randn(outputs, inputs)
    rows = weight.view(2, -1, 16, inputs).transpose(0, 1).reshape(outputs, inputs) if gate_up else weight
    for kind in WeightKind:
        packed = native.pack(loaded(variant), weight, kind, gate_up=gate_up)
        dtype = {WeightKind.FP32: torch.float32, WeightKind.BF16: torch.bfloat16, WeightKind.INT8: torch.int8}[kind]
        values = packed.data.clone().view(dtype)
        assert len(values) == -(-outputs // 32) * 32 * inputs
        scale = torch.ones(outputs) if packed.scale is None else packed.scale
        for first in range(0, outputs, 64):
            columns = min(64, outputs - first)
            panel = values[first * inputs : (first + columns) * inputs].view(inputs, columns).float().T
            exact = rows[first : first + columns]
            error = (panel * scale[first : first + columns, None] - exact).abs()
            bound = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.int8: 0.0}[dtype] * exact.abs()
            assert (error <= bound + (scale[first : first + columns, None] * 0.501 if dtype is torch.int8 else 0)).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_that_fill_no_panel_are_padded_with_zeros(variant: str) -> None:
    packed = native.pack(loaded(variant), torch.ones(70, 4), WeightKind.FP32)
    values = packed.data.clone().view(torch.float32)
    assert len(values) == 96 * 4
    assert values[64 * 4 :].view(4, 32)[:, 6:].eq(0).all()
    assert values.sum() == 70 * 4


class PagesStruct(ctypes.Structure):
    """struct pages of attention.h."""

    _fields_: ClassVar = [
        ("keys", c_void_p), ("values", c_void_p), ("tails", c_void_p), ("table", c_void_p), ("page_stride", c_int64),
        ("tail", c_int32), ("head_dim", c_int32), ("bf16", c_int32),
    ]  # fmt: skip


class QueriesStruct(ctypes.Structure):
    """struct queries of attention.h."""

    _fields_: ClassVar = [
        ("q", c_void_p * 64), ("out", c_void_p * 64), ("weights", c_float * 128), ("position", c_int32 * 64),
        ("count", c_int32), ("window", c_int32), ("first", c_int32), ("end", c_int32), ("scale", c_float),
    ]  # fmt: skip


def attended(
    variant: str,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: list[int],
    window: int = 0,
    leaves: tuple[int, int] = (0, 2**31 - 1),
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of q (n, d), keys and values (m, d) laid out in pages that stand in no order."""
    library = native.load(variant)
    spec = importlib.util.find_spec(f"countersign.kernels.native.x86_64_{variant}")
    assert library is not None
    assert spec is not None
    assert spec.origin is not None
    call = ctypes.CDLL(spec.origin).attend_once
    head_dim, pages = q.shape[1], -(-len(keys) // 16)
    table = torch.randperm(pages, generator=torch.Generator().manual_seed(1)).int() + 1
    k, v = torch.zeros(pages + 1, head_dim, 16), torch.zeros(pages + 1, 16, head_dim)
    for token in range(len(keys)):
        k[table[token // 16], :, token % 16], v[table[token // 16], token % 16] = keys[token], values[token]
    out = torch.full_like(q, math.nan)
    stride = head_dim * 16
    struct = PagesStruct(k.data_ptr(), v.data_ptr(), None, table.data_ptr(), stride, 2**31 - 1, head_dim, 0)
    queries = QueriesStruct(count=len(q), window=window, first=leaves[0], end=leaves[1], scale=head_dim**-0.5)
    for i, position in enumerate(positions):
        queries.q[i], queries.out[i], queries.position[i] = q[i].data_ptr(), out[i].data_ptr(), position
    call(ctypes.byref(struct), ctypes.byref(queries))
    top, total = torch.tensor(list(queries.weights)[: 2 * len(q)]).view(-1, 2).unbind(dim=1)
    return out / total[:, None], top + total.log()


def scores_of(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """(m,): one chain of fused multiply-adds in fp32 over the head's elements, in order. Where scores are large its
    rounding is most of the error, and no other order has the same.
    """
    sums: torch.Tensor = torch.zeros(len(keys))
    for d in range(len(q)):
        sums = (q[d].double() * keys[:, d].double() + sums.double()).float()
    return torch.mul(sums, len(q) ** -0.5)


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=60)
@given(
    tokens=st.sampled_from([1, 15, 16, 17, 63, 64, 65, 130, 300]),
    head_dim=st.sampled_from([16, 48, 64, 80, 256]),
    count=st.integers(1, 20),
    window=st.sampled_from([0, 1, 3, 60, 64, 70]),
    offset=st.sampled_from([-200.0, 0.0, 200.0]),
    seed=st.integers(0, 100),
)
def test_a_querys_result_is_right_and_its_own_whoever_stands_beside_it_and_whatever_it_does_not_see(
    variant: str, tokens: int, head_dim: int, count: int, window: int, offset: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, keys, values = (torch.randn(n, head_dim, generator=generator) for n in (count, tokens, tokens))
    q[:, 0], keys[:, 0] = 8.0, keys[:, 0] * 0.1 + offset * head_dim**0.5 / 8  # all scores far from 0
    positions = torch.randint(0, tokens, (count,), generator=generator).tolist()
    out, lse = attended(variant, q, keys, values, positions, window)
    for i, position in enumerate(positions):
        low = max(0, position - window + 1) if window else 0
        scores = scores_of(q[i], keys[low : position + 1]).double()
        weights = torch.softmax(scores, dim=0)
        assert (lse[i] - torch.logsumexp(scores, dim=0)).abs() < 1e-5 * max(1.0, abs(float(lse[i])))
        assert (out[i] - weights @ values[low : position + 1].double()).abs().max() < 1e-5
        unseen_k, unseen_v = keys.clone(), values.clone()
        unseen_k[position + 1 :], unseen_v[position + 1 :] = math.nan, math.nan
        alone, alone_lse = attended(variant, q[i : i + 1], unseen_k, unseen_v, [position], window)
        assert torch.equal(alone[0], out[i])
        assert alone_lse[0] == lse[i]
