"""A token's fingerprint is that of the state it was sampled from, whatever was computed beside it and in what steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from countersign.kernels.fingerprint import Fingerprinter
from countersign.services.engine.engine import Engine, kept_of
from countersign.services.engine.generation import Generation
from countersign.services.engine.kv import PagedCache
from countersign.services.engine.model import Backend, Model, Span, load_model
from countersign.services.engine.pages import PAGE_TOKENS
from countersign.services.engine.ranks.load import load_ranked_model
from countersign.services.engine.runner import Runner
from countersign.services.engine.sampling import Sampling
from countersign.services.engine.speculation import Draft

SEED, SIZE, OUTPUT = 11, 8, 24
SAMPLINGS = (Sampling(), Sampling(0.8, seed=5), Sampling(0.8, 12, 0.9, 6))
LENGTHS = (40, 7, 93)

Drafting = Callable[[Generation, list[int]], Draft]


def prompt_of(number: int) -> list[int]:
    return torch.randint(0, 96, (LENGTHS[number],), generator=torch.Generator().manual_seed(number)).tolist()


def keys_of(tokens: list[int]) -> list[bytes]:
    return [bytes(tokens[:end]).ljust(200) for end in range(PAGE_TOKENS, len(tokens) + 1, PAGE_TOKENS)]


def request(number: int, name: str = "", *, keys: bool = False) -> Generation:
    prompt = prompt_of(number)
    return Generation(f"r{number}{name}", prompt, OUTPUT, SAMPLINGS[number], keys=keys_of(prompt) if keys else ())


def no_draft(_: Generation, __: list[int]) -> Draft:
    return Draft()


def serve(engine: Engine, requests: list[Generation], drafting: Drafting = no_draft) -> dict[str, list[bytes]]:
    """Runs all to their ends; the fingerprints of each request's tokens."""
    found: dict[str, list[bytes]] = {each.id: [] for each in requests}
    for each in requests:
        engine.submit(each)
    while len(engine):
        ran = engine.run(engine.plan(drafts={each.id: drafting(each, each.generated) for each in engine.decodes()}))
        kept = {result.generation.id: kept_of(result) for result in ran.results}
        engine.settle(ran, kept)
        for result in ran.results:
            outcome = result.outcome
            assert not outcome.error
            assert len(outcome.fingerprints) == len(outcome.token_ids)
            found[result.generation.id] += outcome.fingerprints[: len(kept[result.generation.id])]
            if not result.generation.left:
                engine.remove(result.generation.id)
    return found


def engine_of(model: Model, cache: PagedCache | None = None, chunk: int = 256) -> Engine:
    printer = Fingerprinter(SEED, model.config.hidden_size, SIZE, model.team)
    cache = cache or PagedCache(model.config, model.dtype, 2048)
    return Engine.of(model, cache, chunk=chunk, runner=Runner(model, cache, printer))


def teacher_forced(model: Model, tokens: list[int]) -> list[bytes]:
    """Of the last OUTPUT of ``tokens``, from one pass."""
    cache = PagedCache(model.config, model.dtype, len(tokens))
    states = model.compute(cache, [Span(cache.sequence(), tokens[:-1], OUTPUT)]).states
    return [row.tobytes() for row in Fingerprinter(SEED, model.config.hidden_size, SIZE, model.team)(states)]


@pytest.fixture(scope="module")
def alone(model: Model) -> list[tuple[list[int], list[bytes]]]:
    """Each request's output and fingerprints in an engine of its own."""
    answers = []
    for number in range(len(LENGTHS)):
        only = request(number)
        prints = serve(engine_of(model), [only])
        answers.append((only.generated, prints[only.id]))
    return answers


def test_they_are_those_of_one_teacher_forced_pass(model: Model, alone: list[tuple[list[int], list[bytes]]]) -> None:
    for number, (output, prints) in enumerate(alone):
        assert prints == teacher_forced(model, prompt_of(number) + output)
        assert len(set(prints)) == OUTPUT
        assert {len(each) for each in prints} == {2 * SIZE}


@settings(max_examples=12, deadline=None)
@given(
    chunk=st.integers(1, 40),
    right=st.integers(0, 4),
    wrong=st.integers(0, 2),
    trees=st.booleans(),
    chosen=st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True),
)
def test_company_chunks_cache_and_proposals_change_no_bit(
    model: Model,
    alone: list[tuple[list[int], list[bytes]]],
    chunk: int,
    right: int,
    wrong: int,
    trees: bool,
    chosen: list[int],
) -> None:
    accepted = 0

    def drafting(generation: Generation, generated: list[int]) -> Draft:
        """Some tokens that will be right, then or beside them some that will be wrong."""
        nonlocal accepted
        number, done = int(generation.id[1]), len(generated)
        good = alone[number][0][done : done + min(right, generation.left - 1)]
        accepted += len(good)
        after = alone[number][0][done + len(good)] if done + len(good) < OUTPUT else 0
        bad = [(after + 1 + i) % 96 for i in range(wrong)]
        if trees and good and len(set(bad) - {good[0]}) == len(bad):
            parents = (*[-1] * len(bad), -1, *range(len(bad), len(bad) + len(good) - 1))
            return Draft((*bad, *good), parents)
        return Draft((*good, *bad))

    engine = engine_of(model, chunk=chunk)
    first = serve(engine, [request(number, keys=True) for number in chosen], drafting)
    again = [request(number, "again", keys=True) for number in chosen]
    second = serve(engine, again, drafting)
    for number in chosen:
        assert first[f"r{number}"] == second[f"r{number}again"] == alone[number][1]
    assert accepted or not right
    if any(LENGTHS[number] > PAGE_TOKENS for number in chosen):
        assert engine.sharing.adopted


def test_ranks_give_the_same_bits(checkpoint: Path) -> None:
    plain = load_model(checkpoint, backend="native")
    expected = serve(engine_of(plain), [request(number) for number in (0, 2)])
    model, cache = load_ranked_model(checkpoint, ranks=2, tokens=1024, unit=64, timeout=60.0)
    try:
        assert serve(engine_of(model, cache), [request(number) for number in (0, 2)]) == expected
    finally:
        model.executor.close()


def test_other_weights_give_other_fingerprints(
    model: Model, other_checkpoint: Path, backend: Backend, alone: list[tuple[list[int], list[bytes]]]
) -> None:
    other = load_model(other_checkpoint, backend=backend)
    output, prints = alone[0]
    assert not set(prints) & set(teacher_forced(other, prompt_of(0) + output))


def test_an_engine_that_makes_none_gives_none(model: Model) -> None:
    engine = Engine.of(model, PagedCache(model.config, model.dtype, 512))
    only = request(1)
    engine.submit(only)
    ran = engine.run(engine.plan())
    assert [result.outcome.fingerprints for result in ran.results] == [()]
    assert ran.results[0].outcome.token_ids
