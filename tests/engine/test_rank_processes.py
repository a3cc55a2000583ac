"""Ranks as processes: the plain engine's tokens, and what happens when one dies or hangs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from countersign.services.engine.engine import Engine, complete, kept_of
from countersign.services.engine.errors import EngineError, InvalidSpan, RankLost
from countersign.services.engine.generation import Generation
from countersign.services.engine.kv import PagedCache
from countersign.services.engine.model import Model, Span, load_model
from countersign.services.engine.ranks.executor import RankedExecutor
from countersign.services.engine.ranks.load import load_ranked_model
from countersign.services.engine.sampling import Sampling

TOKENS = 4096
KEYS = [bytes([number]) * 32 for number in range(40)]


@pytest.fixture(scope="module")
def ranked(checkpoint: Path) -> Iterator[tuple[Model, PagedCache]]:
    """Two ranks; they start anew by themselves when a test has hurt them."""
    model, cache = load_ranked_model(checkpoint, ranks=2, tokens=TOKENS, unit=64, timeout=10)
    yield model, cache
    model.executor.close()


def pids(model: Model) -> list[int]:
    assert isinstance(model.executor, RankedExecutor)
    return model.executor.group.pids


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(0, 96, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def generations() -> list[Generation]:
    return [
        Generation(str(seed), tokens(length, seed), 40, Sampling(0.8, seed=seed))
        for seed, length in enumerate((30, 150, 300))
    ]


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[int]]:
    """The plain engine's tokens."""
    model = load_model(checkpoint, backend="native")
    mine = generations()
    complete(Engine.of(model, PagedCache(model.config, model.dtype, TOKENS)), mine)
    return [generation.generated for generation in mine]


def test_two_ranks_generate_the_plain_engines_tokens(
    ranked: tuple[Model, PagedCache], expected: list[list[int]]
) -> None:
    mine, engine = generations(), Engine.of(*ranked)
    complete(engine, mine)
    assert [generation.generated for generation in mine] == expected
    engine.check()


def test_four_ranks_generate_the_plain_engines_tokens(checkpoint: Path, expected: list[list[int]]) -> None:
    model, cache = load_ranked_model(checkpoint, ranks=4, tokens=TOKENS, unit=64)
    mine = generations()
    complete(Engine.of(model, cache), mine)
    model.executor.close()
    assert [generation.generated for generation in mine] == expected


def test_shared_prefixes_forks_and_blocks_have_the_plain_engines_bits(
    ranked: tuple[Model, PagedCache], checkpoint: Path
) -> None:
    model, cache = ranked
    plain = load_model(checkpoint, backend="native")
    local = PagedCache(plain.config, plain.dtype, TOKENS)
    seen = []
    for each, pages in ((model, cache), (plain, local)):
        first = pages.sequence()
        logits = [each.forward(pages, [Span(first, tokens(200, 1), 1)])]
        pages.publish(first, KEYS[:12])
        blocks = [first.export_block(index) for index in range(12)]
        fork = first.fork()
        logits.append(each.forward(pages, [Span(first, [5, 6], 2), Span(fork, [7], 1)]))  # copies the shared last page
        other = pages.sequence()
        assert pages.adopt(other, KEYS[:12]) == 192
        logits.append(each.forward(pages, [Span(other, tokens(200, 1)[192:], 1)]))
        third = pages.sequence()
        for block in blocks:
            third.import_block(block)
        logits.append(each.forward(pages, [Span(third, tokens(200, 1)[192:], 1)]))
        pages.check_integrity()
        for sequence in (first, fork, other, third):
            sequence.close()
        seen.append((blocks, torch.cat(logits)))
    assert seen[0][0] == seen[1][0]
    assert torch.equal(seen[0][1], seen[1][1])


def test_a_tree_is_refused_by_name(ranked: tuple[Model, PagedCache]) -> None:
    model, cache = ranked
    sequence = cache.sequence()
    with pytest.raises(InvalidSpan, match="trees of proposals cannot be verified over ranks"):
        model.forward(cache, [Span(sequence, [1, 2, 3], 1, [-1, 0, 0])])
    sequence.close()


@pytest.mark.parametrize(("hurt", "why"), [(signal.SIGKILL, "ended with code -9"), (signal.SIGSTOP, "in time")])
def test_a_rank_that_dies_or_hangs_fails_the_step_and_new_ranks_give_the_same_tokens(
    ranked: tuple[Model, PagedCache], expected: list[list[int]], hurt: signal.Signals, why: str
) -> None:
    model, _ = ranked
    engine, mine = Engine.of(*ranked), generations()
    for generation in mine:
        engine.submit(generation)
    passes, losses = 0, list[RankLost]()
    while len(engine):
        passes += 1
        if passes == 20:
            victims = pids(model)
            os.kill(victims[1], hurt)
        try:
            ran = engine.run(engine.plan())
        except RankLost as error:
            losses.append(error)
            assert not any(psutil.pid_exists(pid) for pid in victims)  # none is left behind
            engine.requeue()
            engine.forget()
            continue
        engine.settle(ran, {result.generation.id: kept_of(result) for result in ran.results})
        for result in ran.results:
            if not result.generation.left:
                engine.remove(result.generation.id)
    engine.sweep()
    assert len(losses) == 1
    assert losses[0].rank == 1
    assert why in str(losses[0])
    assert [generation.generated for generation in mine] == expected
    engine.check()


@pytest.fixture
def own(checkpoint: Path) -> Iterator[tuple[Model, PagedCache]]:
    """Two ranks of one test."""
    model, cache = load_ranked_model(checkpoint, ranks=2, tokens=TOKENS, unit=64, timeout=2)
    yield model, cache
    model.executor.close()


def test_lost_ranks_do_not_come_back_before_their_keys_are_forgotten(
    own: tuple[Model, PagedCache], checkpoint: Path
) -> None:
    model, cache = own
    sequence = cache.sequence()
    expected = model.forward(cache, [Span(sequence, tokens(100, 1), 1)])
    os.kill(pids(model)[0], signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(RankLost):
            cache.check_integrity()
    with pytest.raises(RankLost):
        sequence.export_block(0)  # an empty pool would give zeros
    cache.forget()
    assert torch.equal(model.forward(cache, [Span(cache.sequence(), tokens(100, 1), 1)]), expected)


def test_blocks_that_come_before_new_ranks_are_up_are_there(own: tuple[Model, PagedCache]) -> None:
    model, cache = own
    sequence = cache.sequence()
    model.forward(cache, [Span(sequence, tokens(96, 1), 0)])
    blocks = [sequence.export_block(index) for index in range(6)]
    expected = model.forward(cache, [Span(sequence, [7], 1)])
    os.kill(pids(model)[0], signal.SIGKILL)
    with pytest.raises(RankLost):
        model.forward(cache, [Span(sequence, [8], 1)])
    cache.forget()
    sequence = cache.sequence()
    for block in blocks:
        sequence.import_block(block)
    assert torch.equal(model.forward(cache, [Span(sequence, [7], 1)]), expected)


def test_a_rank_that_stops_reading_in_a_message_is_lost_in_time(own: tuple[Model, PagedCache]) -> None:
    model, cache = own
    sequence = cache.sequence()
    model.forward(cache, [Span(sequence, tokens(64, 1), 0)])
    for _ in range(1 + (1 << 22) // cache.block_bytes):
        cache.fill(0, sequence.pages[0], bytes(cache.block_bytes))
    os.kill(pids(model)[0], signal.SIGSTOP)
    begin = time.monotonic()
    with pytest.raises(RankLost) as caught:  # the pipe cannot hold the message
        model.forward(cache, [Span(sequence, [7], 1)])
    assert caught.value.rank == 0
    assert time.monotonic() - begin < 10


def test_ranks_that_cannot_start_say_why(checkpoint: Path) -> None:
    with pytest.raises(EngineError, match="times a power of two"):
        load_ranked_model(checkpoint, ranks=2, tokens=TOKENS, unit=100)
