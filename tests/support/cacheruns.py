"""Recorded runs of a block store: one made by hand on the real machine, and corruptions that no store makes of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import sha256

from countersign.services.protocol.cache import BlockCache, Recency, Stored
from countersign.verify.spec.steps import CacheRun, Kept, Step, StepRecorder

RAM, DISK, SIZE = 60, 40, 10
ONCE = frozenset({"Seal", "Evict", "Spill", "Spilled", "Promote", "Promoted", "Condemn", "Lookup"})
Corruption = tuple[str, CacheRun]


def key(name: str) -> bytes:
    return sha256(name.encode()).digest()


def stored(name: str, parent: str, generation: int) -> Stored:
    return Stored(key(name), key(parent) if parent else b"", SIZE, b"", b"sum", generation)


class Store:
    """A block cache, two holders' worth of calls, and a clock; ``run`` is what it told."""

    def __init__(self) -> None:
        self.now = 0.0
        self.numbers = itertools.count(1)
        self.recorder = StepRecorder(lambda: self.now)
        self.restart()

    @property
    def run(self) -> CacheRun:
        return CacheRun((RAM, DISK), 1, tuple(self.recorder.steps))

    def restart(self, *kept: Stored) -> None:
        self.cache = BlockCache(RAM, DISK, draw=self.numbers.__next__, policy=Recency, observer=self.recorder)
        self.recorder.cache = self.cache
        assert self.cache.restore(kept) == []

    def reserve(self, name: str, parent: str = "", holder: str = "h1", ttl: float = 10) -> int:
        above = key(parent) if parent else b""
        return self.cache.reserve(key(name), above, SIZE, holder, now=self.now, ttl=ttl).lease

    def fill(self, name: str, lease: int) -> None:
        self.cache.write(key(name), lease, 0, SIZE, now=self.now)
        self.cache.seal(key(name), lease, b"sum", now=self.now)

    def write(self, name: str, parent: str = "", holder: str = "h1") -> None:
        self.fill(name, self.reserve(name, parent, holder))

    def lookup(self, *names: str, holder: str = "h2", ttl: float = 10) -> int:
        return self.cache.lookup([key(name) for name in names], holder, now=self.now, ttl=ttl).pin

    def generation(self, name: str) -> int:
        block = self.cache.get(key(name))
        assert block is not None
        return block.generation

    def spill(self, *names: str) -> None:
        for name in names:
            assert self.cache.spill(key(name), now=self.now) is not None
            assert self.cache.spilled(key(name), self.generation(name), ok=True)


def everything() -> CacheRun:
    """Each transition once at least: two lives, two tiers, pins and leases that lapse, a block that is condemned."""
    store = Store()
    store.write("a")
    store.write("b", "a")
    store.write("c", "a", "h2")
    pin = store.lookup("a", "b", "d")
    assert store.cache.read(key("b"), pin, now=store.now).generation == store.generation("b")
    first = store.reserve("d", "b", ttl=3)
    assert store.reserve("d", "b", ttl=5) == first
    store.reserve("e", "d", ttl=5)
    store.spill("a", "b")
    store.now = 6
    other = store.reserve("d", "b", "h2")  # the first lease has lapsed, and what was below goes too
    store.cache.write(key("d"), other, 0, SIZE // 2, now=store.now)
    store.cache.release(other)
    store.cache.release(pin)
    short = store.lookup("a", "c", ttl=2)
    for name in ("f", "g", "h", "i"):
        store.write(name)
    promotion = store.lookup("a", "b")
    store.now = 9
    store.cache.expire(store.now)
    assert store.recorder.steps[-1].told.pin == short
    block = store.cache.promote(key("b"), now=store.now)
    if block is not None:
        assert store.cache.promoted(key("b"), block.slot, ok=True)
    assert store.cache.condemn(key("b"), store.generation("b")) == 1
    store.cache.release(promotion)
    store.write("b", "a", "h2")
    assert store.cache.spill(key("b"), now=store.now) is not None
    assert store.cache.spilled(key("b"), store.generation("b"), ok=False) is False
    store.now = 20
    store.restart(stored("a", "", store.generation("a")))
    store.write("b", "a")
    store.spill("b")
    store.lookup("a", "b")
    return store.run


def cut(run: CacheRun, index: int) -> CacheRun:
    return replace(run, steps=run.steps[:index] + run.steps[index + 1 :])


def changed(run: CacheRun, index: int, **fields: object) -> CacheRun:
    step = run.steps[index]
    told = replace(step.told, **fields)  # type: ignore[arg-type]  # any of its fields
    return replace(run, steps=(*run.steps[:index], replace(step, told=told), *run.steps[index + 1 :]))


def twice(run: CacheRun, index: int) -> CacheRun:
    return replace(run, steps=run.steps[: index + 1] + run.steps[index:])


def swapped(run: CacheRun, index: int) -> CacheRun:
    one, other = run.steps[index : index + 2]
    return replace(run, steps=(*run.steps[:index], other, one, *run.steps[index + 2 :]))


def illegal(run: CacheRun) -> Iterator[Corruption]:
    """Every corruption of a run that cannot be a run itself."""
    for index, step in enumerate(run.steps):
        for what, made in (*_moved(run, index), *_altered(run, index)):
            yield f"step {index + 1} {step.told.action} {what}", made


def _moved(run: CacheRun, index: int) -> Iterator[Corruption]:
    """It is gone, there twice, or behind the next."""
    steps, told = run.steps, run.steps[index].told
    later = steps[index + 1 :]
    if _needed(steps[index], steps[index - 1] if index else None, later):
        yield "dropped", cut(run, index)
    if told.action in ONCE or (told.lease and told.action in {"Release", "Expire"}):
        yield "twice", twice(run, index)
    if later and _depends(steps[index], later[0]):
        yield "swapped with the next", swapped(run, index)


def _altered(run: CacheRun, index: int) -> Iterator[Corruption]:
    step, told = run.steps[index], run.steps[index].told
    others: dict[str, dict[str, object]] = {"with other room": {"room": (told.room[0] + SIZE, told.room[1])}}
    if told.generation and told.action != "Reserve":
        others["of another generation"] = {"generation": told.generation + 1}
    if told.lease and told.action != "Reserve":
        others["with another lease"] = {"lease": told.lease + 100}
    if told.action == "Reserve" and _new(step, run.steps[:index]):
        others["of another size"] = {"size": told.size + SIZE}
    if told.action == "Evict":
        others["of the other outcome"] = {"gone": not told.gone}
    if told.action == "Lookup" and len(told.keys) > 1:
        others["without its first block"] = {"keys": told.keys[1:], "generations": told.generations[1:]}
    yield from ((what, changed(run, index, **fields)) for what, fields in others.items())
    if told.action == "Expire" and told.pin:
        yield (
            "before its time",
            replace(run, steps=(*run.steps[:index], replace(step, now=-1), *run.steps[index + 1 :])),
        )
    if step.kept:
        yield "of another generation", _restored_otherwise(run, index)


def _needed(step: Step, before: Step | None, later: Sequence[Step]) -> bool:
    """Nothing behind it can be explained without it."""
    told = step.told
    if later and told.action == "Reserve" and later[0].told.lease == told.lease and later[0].told.action == "Reserve":
        return False  # the next, which renews it, might as well be the first
    if later and told.room != (before.told.room if before else (0, 0)) and later[0].told.action != "Restore":
        return True
    if told.action == "Lookup":
        return any(one.told.pin == told.pin for one in later)
    if told.action == "Write":
        return any(one.told.action == "Seal" and one.told.lease == told.lease for one in later[:1])
    if told.action in {"Seal", "Spilled"} and told.ok:
        return any(one.told.action in {"Spill", "Promote"} and _same(step, one) for one in later)
    return False


def _same(one: Step, other: Step) -> bool:
    return (one.told.key, one.told.generation) == (other.told.key, other.told.generation)


def _new(step: Step, before: Sequence[Step]) -> bool:
    return not any(one.told.action == "Reserve" and one.told.lease == step.told.lease for one in before)


def _depends(one: Step, other: Step) -> bool:
    both = one.told.action, other.told.action
    if both in {("Reserve", "Write"), ("Write", "Seal"), ("Spill", "Spilled"), ("Promote", "Promoted")}:
        return one.told.key == other.told.key
    return both == ("Lookup", "Read")


def _restored_otherwise(run: CacheRun, index: int) -> CacheRun:
    """The disk is said to have kept a generation that was never there."""
    step = run.steps[index]
    kept = tuple(Kept(one.key, one.parent, one.size, one.generation + 50) for one in step.kept)
    told = replace(step.told, generations=tuple(one.generation for one in kept))
    return replace(run, steps=(*run.steps[:index], Step(step.now, told, kept), *run.steps[index + 1 :]))


def joined(runs: Sequence[CacheRun]) -> CacheRun:
    """One after another, as lives of one store that keeps nothing between them: one start of TLC for all."""
    empty = Store().run.steps[0]
    steps = itertools.chain.from_iterable((empty, *run.steps) for run in runs)
    return replace(runs[0], steps=tuple(steps))
