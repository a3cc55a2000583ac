"""Sampling of many rows: the Triton kernel's tokens are the reference's."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from countersign.kernels import gumbel
from countersign.kernels.gumbel import allowed
from countersign.kernels.sample_rows import Rule, sample_rows, thresholds

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RULES = st.builds(
    Rule,
    position=st.integers(0, 2**32 - 1),
    temperature=st.sampled_from([0.0, 1e-6, 0.3, 1.0, 5.0, 1e6]),
    top_k=st.sampled_from([0, 1, 2, 5, 40, 10**6]),
    top_p=st.sampled_from([1e-9, 0.2, 0.9, 1.0]),
    seed=st.integers(0, 2**64 - 1),
)
LOGITS = st.sampled_from([-math.inf, -100.0, -1.0, 0.0, 0.0, 0.5, 1.0, 30.0])


def normal(rows: int, size: int, seed: int = 0) -> Tensor:
    return (4 * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))).to(DEVICE)


@settings(max_examples=60)
@example(row=[-math.inf], rule=Rule(0, 1e-6, top_p=1e-9))
@given(row=st.lists(LOGITS, min_size=1, max_size=60), rule=RULES)
def test_ties_and_tokens_ruled_out_give_the_references_token(row: list[float], rule: Rule) -> None:
    logits = torch.tensor([row], device=DEVICE)
    assert torch.equal(sample_rows(logits, [rule], backend="triton"), sample_rows(logits, [rule], backend="reference"))


@settings(max_examples=15)
@given(
    rules=st.lists(RULES, min_size=1, max_size=3),
    size=st.sampled_from([1, 1000, 1024, 8193, 9000]),
    seed=st.integers(0, 99),
)
def test_rows_of_any_size_give_the_references_tokens(rules: list[Rule], size: int, seed: int) -> None:
    logits = normal(len(rules), size, seed)
    assert torch.equal(sample_rows(logits, rules, backend="triton"), sample_rows(logits, rules, backend="reference"))


def test_a_vocabulary_of_128_k() -> None:
    logits = normal(4, 128_256)
    rules = [Rule(9, 1.0, seed=1), Rule(9, 0.0), Rule(10, 0.8, 50, 0.9, 2), Rule(11, 30.0, seed=3)]
    assert torch.equal(sample_rows(logits, rules, backend="triton"), sample_rows(logits, rules, backend="reference"))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_row_that_is_not_finite_has_no_token_and_spoils_no_other(backend: str, bad: float) -> None:
    logits = normal(2, 3000)
    logits[0, 2500 if bad != -math.inf else slice(None)] = bad
    found = sample_rows(logits, [Rule(1, 0.7, seed=5)] * 2, backend="triton" if backend == "triton" else "reference")
    assert found[0] == -1
    assert found[1] == sample_rows(logits[1:], [Rule(1, 0.7, seed=5)], backend="reference")[0]


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[list[float]], list[Rule]]:
    """Rows of one size, with ties, with tokens ruled out and, here and there, not finite."""
    size = draw(st.integers(1, 40))
    value = LOGITS if draw(st.booleans()) else st.floats(-5, 5, width=32)
    row = st.one_of(st.lists(value, min_size=size, max_size=size), st.just([math.nan] * size))
    rows = draw(st.lists(row, min_size=1, max_size=4))
    return rows, [draw(RULES) for _ in rows]


@settings(max_examples=200)
@example(drawn=([[0.0] * 10], [Rule(0, 1.0, top_p=0.2)]))
@example(drawn=([[0.0] * 10], [Rule(0, 0.3, top_k=5, top_p=0.2)]))
@given(drawn=batches())
def test_the_thresholds_keep_what_top_k_and_top_p_keep(drawn: tuple[list[list[float]], list[Rule]]) -> None:
    rows, rules = drawn
    limits = thresholds(torch.tensor(rows, device=DEVICE), rules)
    for row, rule, least, last in zip(rows, rules, *(limit.tolist() for limit in limits), strict=True):
        if not math.isfinite(max(row)) or math.isnan(row[0]) or not rule.temperature:
            assert (least, last) == (-math.inf, len(row))
            continue
        kept = [i for i, z in enumerate(row) if z > -math.inf and (z > least or (z == least and i <= last))]
        assert kept == kept_by_the_reference(row, rule)


def kept_by_the_reference(row: list[float], rule: Rule) -> list[int]:
    values = torch.tensor(row).double().numpy()
    ids: list[int] = allowed(values, temperature=rule.temperature, top_k=rule.top_k, top_p=rule.top_p).tolist()
    return ids


def test_rows_of_a_large_vocabulary_keep_what_the_reference_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = normal(6, 50_000)
    rules = [
        Rule(0, 1.0, 50, 0.9),
        Rule(0, 0.7, 0, 0.95),
        Rule(0, 1.0, 40),
        Rule(0, 2.0),
        Rule(0),
        Rule(0, 9.0, 0, 0.5),
    ]
    expected = [
        kept_by_the_reference(row.tolist(), rule) if rule.temperature else []
        for row, rule in zip(logits, rules, strict=True)
    ]
    monkeypatch.setattr(gumbel, "allowed", lambda *_, **__: pytest.fail("a row was taken to the host"))
    least, last = thresholds(logits, rules)
    ids = torch.arange(50_000, device=DEVICE)
    for i, rule in enumerate(rules):
        kept = (logits[i] > least[i]) | ((logits[i] == least[i]) & (ids <= last[i]))
        if rule.temperature:
            assert kept.nonzero().flatten().tolist() == expected[i]
        else:
            assert kept.all()


def test_a_row_at_a_border_of_top_p_is_decided_as_the_reference_does(monkeypatch: pytest.MonkeyPatch) -> None:
    decided: list[int] = []

    def spy(logits: gumbel.Reals, **rule: float) -> gumbel.Ids:
        decided.append(len(logits))
        return allowed(logits, temperature=rule["temperature"], top_k=int(rule["top_k"]), top_p=rule["top_p"])

    monkeypatch.setattr(gumbel, "allowed", spy)
    logits = torch.tensor([[0.0] * 10, [3.0, 2.0, *[0.0] * 8]], device=DEVICE)
    least, last = thresholds(logits, [Rule(0, 1.0, top_p=0.3), Rule(0, 1.0, top_p=0.3)])
    assert (least.tolist(), last.tolist()) == ([0.0, 3.0], [2, 0])
    assert decided == [10]


@pytest.mark.parametrize(
    ("logits", "rule", "message"),
    [
        (torch.zeros(3), Rule(0), r"logits is \(3,\); it must be \(1, V\)"),
        (torch.zeros(2, 3), Rule(0), r"it must be \(1, V\)"),
        (torch.zeros(1, 3).double(), Rule(0), "torch.float64"),
        (torch.zeros(1, 6)[:, ::2], Rule(0), "strides"),
        (torch.zeros(1, 3), Rule(0, -1.0), "temperature and top_k"),
        (torch.zeros(1, 3), Rule(0, math.nan), "temperature and top_k"),
        (torch.zeros(1, 3), Rule(0, top_p=0.0), "top_p in"),
        (torch.zeros(1, 3), Rule(0, seed=1 << 64), "unsigned 64-bit"),
        (torch.zeros(1, 3), Rule(1 << 32), "unsigned 32-bit"),
    ],
)
def test_what_it_does_not_take_is_refused_by_name(logits: Tensor, rule: Rule, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_rows(logits, [rule])


def test_no_rows_give_no_tokens() -> None:
    assert sample_rows(torch.zeros(0, 5), [], backend="triton").shape == (0,)
