"""What a block store tells of itself is a behaviour of tla/cache, and corrupted tellings are not."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from cache_rules import CacheRules, run
from cacheruns import DISK, RAM, Store, cut, everything, illegal, joined, key, stored
from tests.protocol import test_cache_machine as known
from tiered_rules import TieredRules

from countersign.services.protocol.cache import BlockCache, Recency
from countersign.verify.spec.errors import SpecError
from countersign.verify.spec.run import read_run, write_run
from countersign.verify.spec.steps import CacheRun, StepRecorder
from countersign.verify.spec.trace import Verdict, replay

ACTIONS = {
    "Lookup",
    "Reserve",
    "Write",
    "Seal",
    "Read",
    "Release",
    "Expire",
    "Evict",
    "Spill",
    "Spilled",
    "Promote",
    "Promoted",
    "Condemn",
    "Restore",
}
ILLEGAL = list(illegal(everything()))


def test_a_run_with_every_transition_is_accepted() -> None:
    made = everything()
    assert {step.told.action for step in made.steps} == ACTIONS
    assert replay(made) == Verdict(True, len(made), len(made))


def test_there_are_enough_corruptions() -> None:
    assert len(ILLEGAL) >= 150


def reject(name: str, made: CacheRun) -> None:
    verdict = replay(made)
    assert not verdict.accepted, name
    assert "step" in verdict.first, (name, verdict)
    assert verdict.explained < verdict.total, name


def test_some_corruptions_are_rejected_and_the_first_bad_step_is_named() -> None:
    for name, made in random.Random(5).sample(ILLEGAL, 8):
        reject(name, made)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_all_corruptions_are_rejected_and_the_first_bad_step_is_named() -> None:
    for name, made in ILLEGAL:
        reject(name, made)


def test_a_block_that_goes_while_it_is_pinned_is_found() -> None:
    store = Store()
    store.write("a")
    pin = store.lookup("a")
    store.cache.release(pin)
    for name in "bcdefg":
        store.write(name)
    made = store.run
    released = next(index for index, step in enumerate(made.steps) if step.told.action == "Release")
    evicted = next(index for index, step in enumerate(made.steps) if step.told.action == "Evict")
    assert replay(made).accepted
    verdict = replay(cut(made, released))
    assert verdict.first.startswith(f"nothing explains step {evicted} (Evict of block {key('a').hex()[:12]}")


def test_a_pin_whose_time_is_over_keeps_nothing_before_anybody_has_noticed() -> None:
    store = Store()
    store.write("a")
    store.lookup("a", ttl=1)
    store.now = 2
    for name in "bcdefg":
        store.write(name)
    store.cache.expire(store.now)
    assert "Evict" in {step.told.action for step in store.run.steps}
    assert replay(store.run).accepted


def test_a_store_that_begins_with_a_full_disk_is_explained() -> None:
    store = Store()
    store.write("a")
    store.spill("a")
    block = store.cache.get(key("a"))
    assert block is not None
    store.recorder.steps.clear()
    store.restart(stored("a", "", block.generation))
    store.write("b", "a")
    assert store.run.steps[0].told.keys == (key("a"),)
    assert replay(store.run).accepted


def test_an_empty_run_is_rejected() -> None:
    assert replay(CacheRun((RAM, DISK), 1, ())) == Verdict(False, 0, 0, "the run holds no step")


def test_a_run_goes_through_its_file(tmp_path: Path) -> None:
    made, file = everything(), tmp_path / "run.jsonl"
    file.write_text(write_run(made))
    assert read_run(file) == made
    lines = file.read_text().splitlines(keepends=True)
    for broken in (lines[:-2] + lines[-1:], lines[:3] + lines[4:], lines[:-1], lines[:1] + lines[2:]):
        file.write_text("".join(broken))
        with pytest.raises(SpecError, match=r"run\.jsonl"):
            read_run(file)


def recorded(rules: type[CacheRules], examples: int, *, broken: bool = False) -> list[CacheRun]:
    """What stores told while Hypothesis drove them; of broken ones, up to where the rules themselves give up."""
    made: list[tuple[CacheRules, StepRecorder]] = []

    def fresh(machine: CacheRules) -> BlockCache:
        if not made or made[-1][0] is not machine:
            made.append((machine, StepRecorder(lambda: machine.now)))
        recorder = made[-1][1]
        cache = BlockCache(machine.ram, machine.disk, draw=machine.numbers.__next__, policy=Recency, observer=recorder)
        recorder.cache = cache
        return cache

    fields: dict[str, object] = {"seen": set(), "made": fresh}
    if broken:
        fields["properties"] = ()
    with suppress(*((Exception,) if broken else ())):
        run(type("Recorded", (rules,), fields), examples=examples)
    return [CacheRun((it.ram, it.disk), 1, tuple(recorder.steps)) for it, recorder in made if recorder.steps]


@pytest.mark.parametrize(("rules", "examples"), [(CacheRules, 10), (TieredRules, 10)])
def test_what_stores_tell_under_any_schedule_is_accepted(rules: type[CacheRules], examples: int) -> None:
    for made in in_batches(recorded(rules, examples)):
        verdict = replay(made)
        assert verdict.accepted, verdict


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("rules", [CacheRules, TieredRules])
def test_what_stores_tell_under_hundreds_of_schedules_is_accepted(rules: type[CacheRules]) -> None:
    made = recorded(rules, 150)
    assert len(made) > 100
    for batch in in_batches(made):
        verdict = replay(batch)
        assert verdict.accepted, verdict


@pytest.mark.parametrize(
    ("bug", "actions"),
    [
        (known.evict_what_is_pinned, ["Evict"]),
        (known.find_what_is_being_written, ["Lookup"]),
        # Whichever way a block goes first.
        (known.forget_the_room_of_what_goes, ["Evict", "Release", "Lapse", "Condemn", "Expire"]),
    ],
)
def test_a_bug_in_the_store_shows_in_what_it_tells(
    monkeypatch: pytest.MonkeyPatch, bug: Callable[[pytest.MonkeyPatch], None], actions: list[str]
) -> None:
    bug(monkeypatch)
    verdicts = (replay(made) for made in in_batches(recorded(CacheRules, 40, broken=True)))
    rejected = next(verdict for verdict in verdicts if not verdict.accepted)
    assert any(f"({action}" in rejected.first for action in actions)


def in_batches(runs: list[CacheRun], steps: int = 400) -> list[CacheRun]:
    """Of about so many steps each."""
    batches: list[list[CacheRun]] = [[]]
    for made in runs:
        if sum(map(len, batches[-1])) > steps:
            batches.append([])
        batches[-1].append(made)
    return [joined(batch) for batch in batches if batch]
