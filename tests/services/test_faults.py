"""Dishonest providers of the demo target: each cheats as it says, and no honest one is taken for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import pytest
import torch

from countersign.cli.prompts import heldout_prompts
from countersign.services.draft.proposer import Ask, Proposer
from countersign.services.engine.engine import Engine, complete
from countersign.services.engine.generation import Generation
from countersign.services.engine.kv import PagedCache
from countersign.services.engine.model import Model, load_model
from countersign.services.engine.sampling import Sampling, sample
from countersign.services.engine.speculation import Draft
from countersign.services.engine.text import Tokenizer
from countersign.services.runtime.config import Fault as ConfiguredFault
from countersign.services.target.faults import (
    FAULTS,
    DishonestRunner,
    Fault,
    int4,
    int8,
    load_dishonest,
    shifted,
)
from countersign.verify.difr import score_tokens, teacher_forced

MODELS = Path(__file__).resolve().parents[2] / "infra" / "models"
TARGET, DRAFT = MODELS / "demo-target", MODELS / "demo-draft"
ASKED = Sampling(1.0, 50, 0.95, 42)
ANSWERS, TOKENS = 3, 100


@pytest.fixture(scope="module")
def reference() -> Model:
    return load_model(TARGET)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = Tokenizer(TARGET)
    return [tokenizer.encode(prompt.text, plain=True) for prompt in heldout_prompts(MODELS, ANSWERS)]


def answers(model: Model, prompts: Sequence[Sequence[int]], fault: Fault, *, drafting: bool) -> list[list[int]]:
    """What a provider with this fault answers to all prompts at once."""
    cache = PagedCache(model.config, model.dtype, tokens=8192)
    engine = Engine.of(model, cache, runner=DishonestRunner(model, cache, fault))
    draft = load_model(DRAFT)
    proposer = Proposer(draft, PagedCache(draft.config, draft.dtype, tokens=8192))

    def propose(generations: Sequence[Generation]) -> Mapping[str, Draft]:
        asks = [Ask(g.id, 0, tuple(g.tokens), min(4, g.left - 1), g.sampling) for g in generations]
        found = zip(asks, proposer.propose(asks), strict=True)
        return {ask.request_id: Draft(tokens) for ask, tokens in found if not isinstance(tokens, int)}

    generations = []
    for number, prompt in enumerate(prompts):
        unseen = fault.unseen(len(prompt))
        sampling = shifted(fault.sampling(ASKED), unseen)
        generations.append(Generation(str(number), list(prompt[unseen:]), TOKENS, sampling))
    complete(engine, generations, propose if drafting else None)
    return [generation.generated for generation in generations]


def scores(reference: Model, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> list[float]:
    return [
        token.score
        for prompt, output in zip(prompts, outputs, strict=True)
        for token in score_tokens(reference, prompt, output, ASKED)
    ]


def test_the_faults_that_can_be_configured_are_those_there_are() -> None:
    names = get_args(get_args(ConfiguredFault)[0])
    assert set(names) == {"none", *FAULTS}


@pytest.mark.parametrize("drafting", [False, True])
def test_a_provider_without_a_fault_gives_the_references_own_tokens(
    reference: Model, prompts: list[list[int]], drafting: bool
) -> None:
    outputs = answers(reference, prompts, Fault("none"), drafting=drafting)
    assert not any(scores(reference, prompts, outputs))


@pytest.mark.parametrize("name", sorted(name for name, fault in FAULTS.items() if not fault.inflation))
def test_each_fault_shows_in_the_scores_under_the_declared_digests(
    reference: Model, prompts: list[list[int]], name: str
) -> None:
    fault = FAULTS[name]
    model = load_dishonest(fault, TARGET, DRAFT)
    assert model.digests == reference.digests
    found = scores(reference, prompts, answers(model, prompts, fault, drafting=fault.drafts))
    assert len(found) == ANSWERS * TOKENS
    assert any(found)


def test_a_repaired_answer_has_no_score_above_the_repair(reference: Model, prompts: list[list[int]]) -> None:
    found = scores(reference, prompts, answers(reference, prompts, FAULTS["repair"], drafting=True))
    assert 0 < max(found) <= 0.2


def test_the_sampler_bug_is_at_a_hundredth_of_the_tokens_and_stays_likely(
    reference: Model, prompts: list[list[int]]
) -> None:
    found = scores(reference, prompts, answers(reference, prompts, FAULTS["bug-1"], drafting=False))
    assert 1 <= sum(score > 0 for score in found) <= 12
    assert FAULTS["bug-1"].bug == 0.01


def test_a_truncated_prompt_is_answered_with_the_noise_of_the_whole_prompts_positions(
    reference: Model, prompts: list[list[int]]
) -> None:
    for prompt, output in zip(prompts, answers(reference, prompts, FAULTS["truncated"], drafting=False), strict=True):
        rows = torch.cat(list(teacher_forced(reference, [*prompt[-32:], *output[:-1]], len(output))))
        assert len(prompt) > 32
        assert [sample(row, len(prompt) + i, ASKED) for i, row in enumerate(rows)] == output
    whole = Fault("none", prompt=10_000)
    assert not any(scores(reference, prompts, answers(reference, prompts, whole, drafting=False)))


def test_rounded_weights_are_on_the_grid_and_near() -> None:
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    for rounding, most, group in ((int8, 127, 128), (int4, 7, 64)):
        rounded = rounding(weight)
        rows, wanted = rounded.reshape(-1, group), weight.reshape(-1, group)
        steps = wanted.abs().amax(1, keepdim=True) / most
        assert torch.allclose((rows / steps).round() * steps, rows, atol=1e-6)
        assert ((rows - wanted).abs() <= steps / 2 + 1e-6).all()
        assert not torch.equal(rounded, weight)


def test_a_seed_that_is_the_largest_wraps_around() -> None:
    assert FAULTS["seed"].sampling(Sampling(1.0, seed=2**64 - 1)).seed == 0
    assert math.isclose(FAULTS["temperature-1.05"].sampling(Sampling(2.0)).temperature, 2.1)
