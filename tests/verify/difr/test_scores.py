"""Scores against their definition, and what slack forgives."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from countersign.services.engine.sampling import Sampling, perturbed, sample
from countersign.verify.difr.level import Reference, load_reference
from countersign.verify.difr.scores import certain, possible, score_of, score_tokens, teacher_forced, token_scores
from countersign.verify.testing import Asked, generate, write_tiny_model

DEMO = Path(__file__).resolve().parents[3] / "infra" / "models" / "demo-target"
PROMPT = list(range(60, 90))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return load_reference(write_tiny_model(tmp_path_factory.mktemp("tiny")), "fp32")


def by_definition(row: torch.Tensor, position: int, token: int, sampling: Sampling) -> float:
    allowed, scores = perturbed(row, position, sampling if sampling.temperature else Sampling())
    own = scores[allowed == token]
    return float(scores.max() - own[0]) if len(own) else math.inf


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(0.8, 50, 0.95, 7),
        Sampling(1.0, 0, 1.0, 7),
        Sampling(1.3, 20, 1.0, 7),
        Sampling(1, 0, 0.5, 7),
    ],
)
@pytest.mark.parametrize("native", [True, False])
def test_scores_are_those_of_the_definition_whatever_was_claimed(
    reference: Reference, sampling: Sampling, native: bool
) -> None:
    model = load_reference(DEMO, "fp32").model if native else reference.model
    assert model.executor.name == ("native" if native else "eager")
    claimed = [(7 * i) % 256 for i in range(40)]
    rows = torch.cat(list(teacher_forced(model, [*PROMPT, *claimed[:-1]], len(claimed))))
    wanted = [
        by_definition(row, len(PROMPT) + i, t, sampling) for i, (row, t) in enumerate(zip(rows, claimed, strict=True))
    ]
    assert token_scores(model, PROMPT, claimed, sampling) == wanted
    assert any(wanted)


def test_each_token_comes_with_what_the_reference_would_have_sampled_and_how_many_it_preferred(
    reference: Reference,
) -> None:
    asked = Asked(temperature=1.0)
    honest = generate(reference, PROMPT, asked, 20)
    claimed = [*honest[:10], (honest[10] + 1) % 256]
    last = score_tokens(reference.model, PROMPT, claimed, Sampling(1.0, asked.top_k, asked.top_p, asked.seed))[10]
    assert (last.token, last.choice) == (claimed[10], honest[10])
    assert last.rank >= 1
    assert last.score > 0


rows = st.lists(st.floats(-8, 8), min_size=2, max_size=30)
rules = st.builds(
    Sampling, st.sampled_from([0.5, 1.0, 2.0]), st.integers(0, 12), st.sampled_from([0.3, 0.9, 0.95, 1.0]), st.just(1)
)


def kept(logits: list[float], rule: Sampling) -> set[int]:
    return set(perturbed(torch.tensor(logits, dtype=torch.float32), 0, rule)[0].tolist())


@given(rows, rules, st.floats(0.01, 0.5), st.data())
def test_no_error_of_the_logits_within_the_slack_leads_out_of_the_possible_or_into_the_uncertain(
    logits: list[float], rule: Sampling, slack: float, data: st.DataObject
) -> None:
    errors = data.draw(st.lists(st.floats(-0.99, 0.99), min_size=len(logits), max_size=len(logits)))
    shifted = [logit + slack * error for logit, error in zip(logits, errors, strict=True)]
    left, exact = kept(shifted, rule), np.array(logits, dtype=np.float32).astype(np.float64)
    for token in range(len(logits)):
        if token in left:
            assert possible(exact, token, rule, slack + 1e-5)
        else:
            assert not certain(exact, token, rule, slack + 1e-5)


def test_without_slack_what_is_possible_or_certain_is_what_is_kept() -> None:
    drawn = np.random.default_rng(0)
    for _ in range(200):
        logits = drawn.normal(size=30) * 3
        rule = Sampling(1.0, int(drawn.integers(0, 12)), float(drawn.choice([0.3, 0.9, 1.0])), 1)
        exact = logits.astype(np.float32).astype(np.float64)
        left = kept(logits.tolist(), rule)
        assert {token for token in range(30) if possible(exact, token, rule, 1e-12)} == left
        assert {token for token in range(30) if certain(exact, token, rule, 1e-12)} == left


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-30, 1e6])
@pytest.mark.parametrize("top_p", [5e-324, 0.5, 1 - 1e-16])
def test_whatever_the_temperature_a_score_is_a_number_and_nothing_overflows(temperature: float, top_p: float) -> None:
    row, rule = torch.tensor([3.0, 2.95, 2.0, -60.0, 40.0]), Sampling(temperature, 4, top_p, 1)
    choice = sample(row, 3, rule)
    for token in range(5):
        for slack in (0.0, 0.05):
            assert score_of(row, 3, token, choice, rule, slack).score >= 0


def test_a_token_just_out_of_support_is_forgiven_by_slack_and_scored(reference: Reference) -> None:
    wide, narrow = Asked(temperature=1.5, top_k=12, top_p=1.0), Sampling(1.5, 10, 1.0, 42)
    output = generate(reference, PROMPT, wide, 200)
    strict = [token.score for token in score_tokens(reference.model, PROMPT, output, narrow)]
    lenient = [token.score for token in score_tokens(reference.model, PROMPT, output, narrow, slack=0.3)]
    outside = sum(map(math.isinf, strict))
    assert outside > 3
    assert sum(map(math.isinf, lenient)) < outside
    assert all(forgiven <= score for forgiven, score in zip(lenient, strict, strict=True))


def test_a_token_at_the_edge_loses_only_against_those_that_are_in_support_for_certain() -> None:
    # top-k 2 leaves tokens 0 and 1; token 2 is as likely as token 1, but for an error of the logits.
    row, rule = torch.tensor([1.0, 0.5, 0.49, -9.0]), Sampling(1.0, 2, 1.0, 7)
    seen = set()
    for position in range(200):
        noisy = perturbed(row, position, Sampling(rule.temperature, 0, 1.0, rule.seed))[1].tolist()
        strict = score_of(row, position, 2, sample(row, position, rule), rule)
        lenient = score_of(row, position, 2, sample(row, position, rule), rule, slack=0.05)
        assert strict.score == math.inf
        assert lenient.score == pytest.approx(max(0.0, noisy[0] - noisy[2]))
        seen.add((noisy[1] > noisy[2], noisy[0] > noisy[2]))
    assert len(seen) == 4
