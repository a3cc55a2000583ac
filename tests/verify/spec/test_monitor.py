"""The monitor accepts what TraceCommit accepts, in whatever order it comes, and finds what TraceCommit rejects."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import runs
from corruptions import ILLEGAL, RUNS
from hypothesis import given
from hypothesis import strategies as st

from countersign.services.protocol.errors import BrokenChain
from countersign.v1.commit_pb2 import Extended
from countersign.v1.event_pb2 import Delivered, Sampled
from countersign.verify.spec.monitor import Fault, Monitor
from countersign.verify.spec.run import Run

PATIENCE = 0.5


def watch(run: Run, seed: int | None = None) -> tuple[list[Fault], Monitor]:
    """All that is found; with a seed, events and records come in any order that keeps the log's own."""
    steps: list[int] = [0] * len(run.records) + [1] * len(run.events)
    events = list(run.events)
    if seed is not None:
        rng = random.Random(seed)
        rng.shuffle(steps)
        rng.shuffle(events)
    records, monitor, faults = iter(run.records), Monitor(run.request_id), list[Fault]()
    coming = iter(events)
    for step in steps:
        if step:
            faults += monitor.event(next(coming))
        else:
            record = next(records)
            try:
                faults += monitor.record(record.sequence, record.data, now=0)
            except BrokenChain as error:
                return [*faults, monitor.broken(error)], monitor
    return faults + monitor.overdue(PATIENCE + 1, PATIENCE), monitor


@pytest.mark.parametrize("make", RUNS)
@given(seed=st.none() | st.integers(0, 1 << 32))
def test_nothing_is_found_in_a_right_run_in_whatever_order_it_comes(
    make: Callable[[], runs.Recorder], seed: int | None
) -> None:
    faults, monitor = watch(make().run, seed)
    assert faults == []
    assert monitor.settled


@pytest.mark.parametrize(("name", "run"), ILLEGAL, ids=[name for name, _ in ILLEGAL])
def test_every_corruption_is_found(name: str, run: Run) -> None:
    faults, monitor = watch(run)
    # What follows a lost event can never be taken in: that is found, too, though no property falls.
    assert faults or not monitor.settled


def test_a_token_that_was_never_sampled_is_found_once_the_event_is_overdue() -> None:
    it = runs.Recorder()
    it.assign("target-a")
    it.append(Extended(epoch=1, base=0, token_ids=[5]))
    faults, _ = watch(it.run)
    assert [fault.property for fault in faults] == ["OnlyVerified"]
    it.say("target-a.1", Sampled(epoch=1, base=0, token_ids=[5]), it.records[-2].sequence)
    assert watch(it.run)[0] == []


def test_a_token_that_is_sent_before_it_is_committed_is_found() -> None:
    it = runs.Recorder()
    it.assign("target-a")
    it.extend(5, 6)
    known = it.log.sequence
    it.serve("router-x.1", 0, 2)
    it.extend(7)
    it.say("router-x.1", Delivered(position=2, token_ids=[7]), known)
    assert [fault.property for fault in watch(it.run)[0]] == ["Agreement"]
