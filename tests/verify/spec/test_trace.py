"""Recorded runs are behaviours of the specification, and corrupted ones are not."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import runs
from corruptions import ILLEGAL, RUNS

from countersign.v1.event_pb2 import Delivered, Sampled
from countersign.verify.spec.errors import SpecError
from countersign.verify.spec.run import Run, read_run, write_run
from countersign.verify.spec.trace import Verdict, replay


@pytest.mark.parametrize("make", RUNS)
def test_a_run_as_the_protocol_makes_it_is_accepted(make: Callable[[], runs.Recorder]) -> None:
    verdict = replay(make().run)
    assert verdict == Verdict(True, verdict.total, verdict.total)
    assert verdict.total >= 10


def test_there_are_enough_corruptions() -> None:
    assert len(ILLEGAL) >= 50


def reject(name: str, run: Run) -> None:
    verdict = replay(run)
    assert not verdict.accepted, name
    assert "event" in verdict.first or "record" in verdict.first or "Closed" in verdict.first, (name, verdict)
    assert verdict.explained < verdict.total


def test_some_corruptions_are_rejected_and_the_first_bad_step_is_named() -> None:
    for name, run in random.Random(5).sample(ILLEGAL, 8):
        reject(name, run)


@pytest.mark.long
def test_all_corruptions_are_rejected_and_the_first_bad_step_is_named() -> None:
    for name, run in ILLEGAL:
        reject(name, run)


def test_the_step_that_is_named_is_the_one_that_was_touched() -> None:
    it = runs.taken_over()
    index = next(i for i, event in enumerate(it.events) if event.WhichOneof("event") == "delivered")
    it.events[index].delivered.token_ids[0] += 1
    verdict = replay(it.run)
    assert verdict.first.startswith("nothing explains event 2 of router-x.1 (delivered")
    assert "it had read up to 12" in verdict.first


def test_a_lost_event_leaves_a_gap() -> None:
    it = runs.taken_over()
    del it.events[0]
    assert replay(it.run).first == "event 1 of target-a.1 is missing, or there twice"


def test_a_token_that_is_sent_before_it_is_committed_is_found() -> None:
    it = runs.Recorder()
    it.assign("target-a")
    it.extend(5, 6)
    early = it.log.sequence
    it.say("target-a.1", Sampled(epoch=1, base=2, token_ids=[7]))
    it.serve("router-x.1", 0, 2)
    it.say("router-x.1", Delivered(position=2, token_ids=[7]), early)
    assert "nothing explains event 3 of router-x.1 (delivered" in replay(it.run).first


def test_an_empty_run_is_rejected() -> None:
    assert not replay(Run("r1", (), ())).accepted


def test_a_run_goes_through_its_file(tmp_path: Path) -> None:
    run, file = runs.taken_over().run, tmp_path / "run.jsonl"
    file.write_text(write_run(run))
    assert read_run(file) == run
    lines = file.read_text().splitlines(keepends=True)
    for broken in (lines[:-2] + lines[-1:], lines[:3] + lines[4:], lines[:-1], [], ["{}\n"], ["no JSON\n"] * 3):
        file.write_text("".join(broken))
        with pytest.raises(SpecError, match=r"run\.jsonl"):
            read_run(file)
