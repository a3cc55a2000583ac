"""Drafts change how many tokens a pass gives, and never the tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from countersign.services.engine.errors import NonFiniteLogits
from countersign.services.engine.kv import PagedCache
from countersign.services.engine.model import Model, Span, load_model
from countersign.services.engine.sampling import Sampling, sample
from countersign.services.engine.speculation import accept_chain

GREEDY = Sampling()


def one_hot_rows(*best: int) -> torch.Tensor:
    rows = torch.zeros(len(best), 10)
    rows[range(len(best)), list(best)] = 5.0
    return rows


@pytest.mark.parametrize(
    ("draft", "emitted"),
    [([], [3]), ([3], [3, 4]), ([9], [3]), ([3, 4, 5], [3, 4, 5, 6]), ([3, 4, 9], [3, 4, 5]), ([3, 9, 5], [3, 4])],
)
def test_accepted_proposals_are_emitted_and_then_one_token_of_the_target(draft: list[int], emitted: list[int]) -> None:
    rows = one_hot_rows(3, 4, 5, 6)[: len(draft) + 1]
    assert list(accept_chain(rows, 7, draft, GREEDY)) == emitted


def test_each_row_is_sampled_at_its_own_position() -> None:
    rows, sampling = torch.randn(5, 10, generator=torch.Generator().manual_seed(0)), Sampling(1.0, seed=3)
    own = [sample(row, 20 + j, sampling) for j, row in enumerate(rows)]
    assert list(accept_chain(rows, 20, own[:4], sampling)) == own


def test_rows_that_are_not_reached_are_not_looked_at() -> None:
    rows = one_hot_rows(3, 4, 5)
    rows[2] = math.nan
    assert list(accept_chain(rows, 0, [3, 8], GREEDY)) == [3, 4]
    assert list(islice(accept_chain(rows, 0, [3, 4], GREEDY), 2)) == [3, 4]


def test_a_row_of_nan_that_is_reached_is_named_by_position_and_row() -> None:
    rows = one_hot_rows(3, 4, 5)
    rows[2, 1] = math.nan
    with pytest.raises(NonFiniteLogits) as refused:
        list(accept_chain(rows, 30, [3, 4], GREEDY))
    assert (refused.value.position, refused.value.row) == (32, 2)


def test_a_wrong_number_of_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="2 proposals need 3 rows of logits, not 2"):
        next(accept_chain(one_hot_rows(1, 2), 0, [1, 2], GREEDY))


@dataclass
class Generation:
    """One sequence of one model, with the tokens decided so far; the last is not yet in the cache."""

    model: Model
    cache: PagedCache
    token_ids: list[int]
    sampling: Sampling

    def __post_init__(self) -> None:
        self.sequence = self.cache.sequence()

    def span(self, draft: list[int], token_ids: list[int]) -> Span:
        return Span(self.sequence, token_ids[self.sequence.length :] + draft, len(draft) + 1)

    def propose(self, token_ids: list[int], count: int) -> list[int]:
        """What this model would write after these tokens, with the same noise as the target."""
        self.sequence.truncate(min(self.sequence.length, len(token_ids) - 1))
        proposals: list[int] = []
        for _ in range(count):
            logits = self.model.forward(self.cache, [self.span([], token_ids + proposals)])
            proposals.append(sample(logits[0], len(token_ids) + len(proposals), self.sampling))
        return proposals


def generate(
    target: Model, draft: Model, prompts: list[list[int]], sampling: Sampling, proposals: int
) -> tuple[list[list[int]], int]:
    """48 tokens for each prompt, all prompts in one batch, and how many proposals were accepted."""
    cache, draft_cache = PagedCache(target.config, "fp32", 1000), PagedCache(draft.config, "fp32", 1000)
    requests = [Generation(target, cache, list(prompt), sampling) for prompt in prompts]
    drafters = [Generation(draft, draft_cache, [], sampling) for _ in prompts]
    accepted = 0
    while any(len(r.token_ids) < len(p) + 48 for r, p in zip(requests, prompts, strict=True)):
        chains = [d.propose(r.token_ids, proposals) for d, r in zip(drafters, requests, strict=True)]
        spans = [r.span(chain, r.token_ids) for r, chain in zip(requests, chains, strict=True)]
        logits = torch.split(target.forward(cache, spans), proposals + 1)
        for request, chain, rows in zip(requests, chains, logits, strict=True):
            emitted = list(accept_chain(rows, len(request.token_ids), chain, sampling))
            request.sequence.truncate(len(request.token_ids) + len(emitted) - 1)
            request.token_ids += emitted
            accepted += len(emitted) - 1
    return [r.token_ids[len(p) : len(p) + 48] for r, p in zip(requests, prompts, strict=True)], accepted


@pytest.fixture(scope="module")
def pair(build_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    """Two unrelated random models over a vocabulary so small that they sometimes agree."""
    models = []
    for seed in (21, 22):
        folder = tmp_path_factory.mktemp("pair")
        build_model("llama", seed, vocab_size=24, initializer_range=0.08).save_pretrained(folder)
        models.append(load_model(folder))
    return models[0], models[1]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8, seed=5), Sampling(0.8, 12, 0.9, 6)])
def test_generation_with_drafts_equals_generation_without(pair: tuple[Model, Model], sampling: Sampling) -> None:
    prompts = [[2, 3, 5, 7, 11, 13], list(range(20)), [9]]
    target, draft = pair
    plain, none = generate(target, draft, prompts, sampling, 0)
    drafted, accepted = generate(target, draft, prompts, sampling, 4)
    alone = [generate(target, draft, [prompt], sampling, 3)[0][0] for prompt in prompts]
    assert none == 0
    assert accepted > 0
    assert drafted == plain
    assert alone == plain
    assert len({tuple(tokens) for tokens in plain}) == len(prompts)


def test_a_target_that_drafts_for_itself_has_every_proposal_accepted(pair: tuple[Model, Model], tmp_path: Path) -> None:
    target, _ = pair
    sampling = Sampling(0.8, seed=5)
    tokens, accepted = generate(target, target, [[1, 2, 3]], sampling, 4)
    assert tokens == generate(target, target, [[1, 2, 3]], sampling, 0)[0]
    assert accepted == 40
