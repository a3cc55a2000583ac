"""A prompt that is computed for others: its blocks reach the store, whatever else the target does meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from tests.services.test_target_loop import House, house, now_ms, until

from countersign.services.engine.generation import Generation
from countersign.services.engine.model import Model, load_model
from countersign.services.engine.pages import PAGE_TOKENS
from countersign.services.runtime.errors import CountersignError, DeadlineExceeded, Internal, Unavailable
from countersign.services.target.prefilling import PrefillJob
from countersign.services.target.prefixes import PrefixKeys
from countersign.verify.testing import write_tiny_model

PROMPT = [(5 * place) % 200 + 1 for place in range(121)]
KEYS = PrefixKeys(bytes(32), "test")("default", PROMPT[:-1])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder)
    return load_model(folder)


@dataclass
class Store:
    """Blocks by key; a chain's are sealed after those before them. ``gate``: puts wait until it is set."""

    blocks: dict[bytes, bytes] = field(default_factory=dict)
    resting: bool = False
    cost_us: int = 0
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    parts: list[tuple[int, int]] = field(default_factory=list)
    on_part: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.gate.set()

    async def fetch(self, request_id: str, keys: Sequence[bytes], first: int) -> list[bytes]:
        found = []
        for key in keys:
            if key not in self.blocks:
                break
            found.append(self.blocks[key])
        return found[first:]

    @asynccontextmanager
    async def putting(self, request_id: str, keys: Sequence[bytes], first: int, count: int) -> AsyncIterator[Putting]:
        put = Putting(self, first, [b""] * count)
        yield put
        for key, block in zip(keys[first : first + count], put.blocks, strict=True):
            assert self.blocks.setdefault(key, block) == block

    async def close(self) -> None:
        """Nothing is open."""


@dataclass
class Putting:
    store: Store
    first: int
    blocks: list[bytes]

    @property
    def wanted(self) -> list[int]:
        return list(range(len(self.blocks)))

    async def whole(self, blocks: dict[int, bytes]) -> None:
        for place, block in blocks.items():
            self.blocks[place] = block

    async def part(self, layer: int, slices: Sequence[bytes]) -> None:
        await self.store.gate.wait()
        self.store.parts.append((self.first, layer))
        self.store.on_part()
        self.blocks = [block + data for block, data in zip(self.blocks, slices, strict=True)]


@asynccontextmanager
async def target(model: Model, store: Store, *, capacity: int = 4096) -> AsyncIterator[House]:
    async with house(model, capacity=capacity) as here:
        here.loop._prefixes = store  # type: ignore[assignment]  # its own keeps nothing
        yield here


def job(model: Model, prompt: Sequence[int] = PROMPT, deadline: int | None = None) -> PrefillJob:
    keys = PrefixKeys(bytes(32), "test")("default", prompt[:-1])
    tokens = list(prompt[: len(keys) * PAGE_TOKENS])
    return PrefillJob(
        Generation("r.prefill", tokens, 1, tenant="default", keys=keys, deadline=deadline), model.config.layers
    )


@pytest.fixture(scope="module")
def blocks(model: Model) -> dict[bytes, bytes]:
    """What the store must hold in the end: from a pass over the whole prompt."""

    async def computed() -> dict[bytes, bytes]:
        store = Store()
        async with target(model, store) as here:
            await here.add("r", max_tokens=1, prompt=PROMPT)
            await until(lambda: len(store.blocks) >= len(KEYS))
        return dict(store.blocks)

    return {key: block for key, block in asyncio.run(computed()).items() if key in KEYS}


async def prefilled(here: House, prefill: PrefillJob) -> None:
    async with asyncio.timeout(20):
        await here.loop.prefill(prefill)


async def test_the_blocks_of_a_prompt_reach_the_store_layer_by_layer_and_the_target_keeps_nothing(
    model: Model, blocks: dict[bytes, bytes]
) -> None:
    store = Store()
    async with target(model, store) as here:
        free, prefill = here.engine.cache.free_tokens, job(model)
        await prefilled(here, prefill)
        assert store.blocks == blocks
        assert (prefill.offered, prefill.found) == (len(KEYS), 0)
        assert len({first for first, _ in store.parts}) > 3, "all came in one chunk"
        layers = range(model.config.layers)
        assert [layer for _, layer in store.parts] == [*layers] * (len(store.parts) // len(layers))
        assert here.loop.prefills == here.loop.pending_prompt_tokens == 0
        await until(lambda: here.engine.cache.free_tokens == free)


async def test_who_answers_beside_a_prefill_gets_the_tokens_that_it_gets_alone(model: Model) -> None:
    async with target(model, Store()) as here:
        await here.add("alone", max_tokens=40)
        await here.idle()
    store = Store()
    async with target(model, store) as there:
        await there.add("beside", max_tokens=40)
        await prefilled(there, job(model))
        await there.idle()
        assert there.journal.log("beside").token_ids == here.journal.log("alone").token_ids
        assert there.engine.most > 1, "they never shared a pass"


async def test_what_the_store_has_is_not_computed_again(model: Model, blocks: dict[bytes, bytes]) -> None:
    store = Store({key: blocks[key] for key in KEYS[:5]})
    async with target(model, store) as here:
        prefill = job(model)
        await prefilled(here, prefill)
        assert store.blocks == blocks
        assert (prefill.offered, prefill.found) == (len(KEYS) - 5, 5)


async def test_what_the_target_has_itself_is_offered_to_a_store_that_lost_it(
    model: Model, blocks: dict[bytes, bytes]
) -> None:
    store = Store()
    async with target(model, store) as here:
        await prefilled(here, job(model))
        await until(lambda: here.engine.sharing.computed == len(KEYS) * PAGE_TOKENS)
        store.blocks.clear()
        prefill = job(model)
        await prefilled(here, prefill)
        assert store.blocks == blocks
        # Of these only the last, since something must be fed.
        await until(lambda: here.engine.sharing.computed == (len(KEYS) + 1) * PAGE_TOKENS)


async def test_a_slow_store_holds_the_prefill_up_and_nobody_else(model: Model, blocks: dict[bytes, bytes]) -> None:
    store = Store()
    async with target(model, store) as here:
        store.gate.clear()
        running = asyncio.create_task(here.loop.prefill(job(model)))
        await until(lambda: here.loop.prefills == 1 and all(each.waits for each in here.loop._prefills.values()))
        assert 0 < here.loop.pending_prompt_tokens < len(PROMPT)
        await here.add("r", max_tokens=30)
        await here.idle()  # nothing else wakes the loop from here on
        store.gate.set()
        await asyncio.wait_for(running, 20)
        await here.idle()
        assert blocks.items() <= store.blocks.items()


async def test_blocks_that_are_computed_again_after_a_preemption_are_offered_once() -> None:
    keys, layers, store = [bytes([index]) * 32 for index in range(6)], 3, Store()
    prefill = PrefillJob(Generation("r.prefill", [1] * 96, 1, keys=keys), layers)

    def data(layer: int, block: int) -> bytes:
        return bytes([layer, block])

    running = asyncio.create_task(prefill.run(store, lambda: None))
    prefill.loaded([], 0, 1)
    # Preempted behind block 3, it finds one of its own pages and begins again behind it.
    for first, end in ((1, 4), (1, 3), (3, 5), (5, 6)):
        for layer in range(layers):
            prefill.filled(layer, first, [data(layer, block) for block in range(first, end)])
        await asyncio.sleep(0)
        if first == 1 and end == 4:
            whole = [b"".join(data(layer, 0) for layer in range(layers))]
            prefill.loaded(whole[len(whole) - len(prefill.lacking(1)) :], 1, 0)
    async with asyncio.timeout(5):
        await running
    assert store.blocks == {
        keys[block]: b"".join(data(layer, block) for layer in range(layers)) for block in range(1, 6)
    }
    assert (prefill.offered, prefill.found) == (5, 1)


async def test_a_chunk_whose_last_layer_never_comes_is_not_sealed() -> None:
    keys, store = [bytes([index]) * 32 for index in range(2)], Store()
    prefill = PrefillJob(Generation("r.prefill", [1] * 32, 1, keys=keys), 2)
    prefill.loaded([], 0, 0)
    prefill.filled(0, 0, [b"a"])
    prefill.filled(0, 1, [b"b"])
    with pytest.raises(Internal, match="prompt's tokens 0 and on are not finite"):
        await prefill.run(store, lambda: None)
    assert store.blocks == {}


@pytest.mark.parametrize(
    ("error", "happens"),
    [
        (DeadlineExceeded, lambda here, store: None),
        (Unavailable, lambda here, store: setattr(store, "resting", True)),
        (Internal, lambda here, store: setattr(here.engine, "losses", 1 << 30)),
    ],
    ids=["its deadline passes", "the store is gone", "the ranks are lost again and again"],
)
async def test_a_prefill_that_cannot_end_well_ends_with_the_reason_and_leaves_nothing(
    model: Model, error: type[CountersignError], happens: Callable[[House, Store], None]
) -> None:
    store = Store()
    async with target(model, store) as here:
        free = here.engine.cache.free_tokens
        store.on_part = lambda: happens(here, store)
        if error is DeadlineExceeded:
            store.gate.clear()
        with pytest.raises(error):
            await prefilled(here, job(model, deadline=now_ms() + 50 if error is DeadlineExceeded else None))
        here.engine.losses = 0
        assert here.loop.prefills == 0
        await until(lambda: here.engine.cache.free_tokens == free)
        store.resting = False
        store.gate.set()
        store.on_part = lambda: None
        await prefilled(here, job(model))
        await here.loop._in_thread(here.engine.check)


async def test_a_cancelled_prefill_leaves_nothing_and_may_be_asked_for_again(
    model: Model, blocks: dict[bytes, bytes]
) -> None:
    store = Store()
    async with target(model, store) as here:
        running = asyncio.create_task(here.loop.prefill(job(model)))
        await until(lambda: bool(store.parts))
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert here.loop.prefills == 0
        await prefilled(here, job(model))
        assert store.blocks == blocks
        await here.loop._in_thread(here.engine.check)
