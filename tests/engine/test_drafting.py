"""What a draft proposes: the tokens of plain decoding, up to where it is no longer sure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from countersign.services.engine.drafting import Ask, propose
from countersign.services.engine.errors import ContextExceeded, InvalidSpan, OutOfPages
from countersign.services.engine.kv import PagedCache
from countersign.services.engine.model import Backend, Model, Span, load_model
from countersign.services.engine.sampling import Sampling, perturbed, sample

SAMPLINGS = (
    Sampling(),
    Sampling(0.8, seed=5),
    Sampling(0.8, 12, 0.9, 6),
    Sampling(0.8, 5, seed=7),
    Sampling(1.5, seed=2**64 - 1),
)


def decoded(model: Model, prompt: Sequence[int], sampling: Sampling, count: int) -> tuple[list[int], list[float]]:
    """The next tokens one by one, and by how much the score of each leads all others'."""
    cache, tokens, leads = PagedCache(model.config, model.dtype, 1024), list(prompt), []
    sequence = cache.sequence()
    for _ in range(count):
        row = model.forward(cache, [Span(sequence, tokens[sequence.length :])])[0]
        _, scores = perturbed(row, len(tokens), sampling)
        second, first = np.sort(scores)[-2:] if sampling.temperature else np.sort(row.numpy().astype(float))[-2:]
        tokens.append(sample(row, len(tokens), sampling))
        leads.append(float(np.float32(first - second)))
    return tokens[len(prompt) :], leads


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randint(0, 96, (1 + 17 * i,), generator=generator).tolist() for i in range(count)]


def expected_of(tokens: Sequence[int], leads: Sequence[float], margin: float) -> list[int]:
    unsure = next((i for i, lead in enumerate(leads) if lead < np.float32(margin)), len(tokens))
    return list(tokens[: unsure + 1])


Decoded = dict[tuple[int, int], tuple[list[int], list[float]]]


@pytest.fixture(scope="module", params=["checkpoint", "other_checkpoint", "routed_checkpoint"])
def drafter(request: pytest.FixtureRequest, backend: Backend) -> Model:
    return load_model(request.getfixturevalue(request.param), backend=backend)


@pytest.fixture(scope="module")
def known(drafter: Model) -> Decoded:
    """For each prompt and sampling."""
    return {
        (i, j): decoded(drafter, prompt, sampling, 8)
        for i, prompt in enumerate(prompts(5))
        for j, sampling in enumerate(SAMPLINGS)
    }


@settings(max_examples=25)
@given(
    asked=st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, len(SAMPLINGS) - 1), st.integers(1, 8), st.integers(0, 70)),
        min_size=1,
        max_size=5,
    ),
    margin=st.sampled_from((0.0, 0.05, 0.2, 0.5, 1.0, 30.0)),
)
def test_proposals_are_the_tokens_of_plain_decoding_up_to_the_first_that_is_not_sure(
    drafter: Model, known: Decoded, asked: list[tuple[int, int, int, int]], margin: float
) -> None:
    cache = PagedCache(drafter.config, drafter.dtype, 1000)
    texts, asks = [], []
    for prompt, sampling, count, most in asked:
        tokens, sequence = prompts(5)[prompt], cache.sequence()
        held = min(most, len(tokens) - 1)
        if held:
            drafter.forward(cache, [Span(sequence, tokens[:held], 0)])
        texts.append(tokens)
        asks.append(Ask(sequence, tokens[held:], SAMPLINGS[sampling], count))
    proposed = propose(drafter, cache, asks, margin)
    for (prompt, sampling, count, _), ask, text, tokens in zip(asked, asks, texts, proposed, strict=True):
        right, leads = known[prompt, sampling]
        least = margin if drafter.executor.name == "native" else 0.0
        assert tokens == expected_of(right[:count], leads[:count], least)
        assert ask.sequence.length == len(text) + len(tokens) - 1
    cache.check_integrity()
    # What is cached is right, and so is what follows it.
    spans = [Span(ask.sequence, [tokens[-1], 5], 2) for ask, tokens in zip(asks, proposed, strict=True)]
    rows = drafter.forward(cache, spans)
    plain = PagedCache(drafter.config, drafter.dtype, 1000)
    again = [Span(plain.sequence(), [*text, *tokens, 5], 2) for text, tokens in zip(texts, proposed, strict=True)]
    assert torch.equal(rows, drafter.forward(plain, again))


def test_a_margin_ends_some_sequences_and_not_others(known: Decoded) -> None:
    lengths = {len(expected_of(*known[key], 0.2)) for key in known}
    assert {1, 8} < lengths


@pytest.mark.parametrize(("top_k", "kept"), [(0, False), (256, True), (257, False), (399, False), (400, False)])
def test_rules_that_cost_a_sort_of_the_vocabulary_are_left_out(
    top_k: int, kept: bool, build_model: Callable[..., Any], backend: Backend, tmp_path: Path
) -> None:
    build_model("llama", 41, vocab_size=400).save_pretrained(tmp_path)
    model, asked = load_model(tmp_path, backend=backend), Sampling(0.8, top_k, 0.3, 3)
    cache = PagedCache(model.config, model.dtype, 100)
    (proposed,) = propose(model, cache, [Ask(cache.sequence(), [5, 6], asked, 12)])
    right, whole = (decoded(model, [5, 6], rules, 12)[0] for rules in (asked, Sampling(0.8, seed=3)))
    assert right != whole
    assert proposed == (right if kept else whole)


def test_a_sequence_may_be_continued_to_the_end_of_the_context_and_no_further(model: Model) -> None:
    cache = PagedCache(model.config, model.dtype, 1200)
    sequence = cache.sequence()
    model.forward(cache, [Span(sequence, [1] * 1000, 0)])
    with pytest.raises(ContextExceeded, match="1025 tokens does not fit the model's context of 1024"):
        propose(model, cache, [Ask(cache.sequence(), [1], Sampling(), 3), Ask(sequence, [2] * 20, Sampling(), 6)])
    assert sequence.length == 1000
    # The last proposal is not fed, and may be the context's last token but one.
    ((*_, last),) = propose(model, cache, [Ask(sequence, [2] * 20, Sampling(), 5)])
    assert (sequence.length, 0 <= last < 96) == (1024, True)


def test_what_makes_no_sense_or_finds_no_room_is_refused_and_changes_nothing(model: Model) -> None:
    cache = PagedCache(model.config, model.dtype, 32)
    sequence = cache.sequence()
    model.forward(cache, [Span(sequence, [1] * 10, 0)])
    with pytest.raises(InvalidSpan, match="continued by 0 tokens"):
        propose(model, cache, [Ask(sequence, [1], Sampling(), 0)])
    with pytest.raises(InvalidSpan, match="outside the vocabulary"):
        propose(model, cache, [Ask(sequence, [96], Sampling(), 2)])
    assert sequence.length == 10
    if model.executor.name == "native":
        with pytest.raises(OutOfPages):
            propose(model, cache, [Ask(sequence, [1], Sampling(), 23)])
        assert sequence.length == 10
    assert len(propose(model, cache, [Ask(sequence, [1], Sampling(), 22)])[0]) == 22
    assert (sequence.length, cache.free_tokens) == (32, 0)
    cache.check_integrity()


def test_a_sequence_whose_logits_are_not_finite_ends_and_the_others_go_on(
    checkpoint: Path, backend: Backend, tmp_path: Path
) -> None:
    clean, prompt = load_model(checkpoint, backend=backend), [7, 8]
    right, _ = decoded(clean, prompt, SAMPLINGS[1], 6)
    other, _ = decoded(clean, [3], SAMPLINGS[0], 6)
    at, bad = next((i, token) for i, token in enumerate(right) if i and token not in {*other, *right[:i], 3, 7, 8})
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.embed_tokens.weight"][bad] = math.nan
    save_file(tensors, tmp_path / "model.safetensors")
    model = load_model(tmp_path, backend=backend)
    cache = PagedCache(model.config, model.dtype, 200)
    asks = [
        Ask(cache.sequence(), [bad], Sampling(), 4),
        Ask(cache.sequence(), prompt, SAMPLINGS[1], 6),
        Ask(cache.sequence(), [3], SAMPLINGS[0], 6),
    ]
    assert propose(model, cache, asks) == [[], right[: at + 1], other]
    assert asks[2].sequence.length == 6
    cache.check_integrity()
