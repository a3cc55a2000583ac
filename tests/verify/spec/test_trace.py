"""Recorded runs are behaviours of the specification, and corrupted ones are not."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import runs

from countersign.services.protocol.commit import Payload, decode, encode, record_digest
from countersign.v1.commit_pb2 import Closed, Extended
from countersign.v1.event_pb2 import Delivered, ProtocolEvent, Sampled
from countersign.verify.spec.errors import SpecError
from countersign.verify.spec.run import Record, Run, read_run, write_run
from countersign.verify.spec.trace import Verdict, replay

RUNS = (runs.taken_over, runs.cancelled, runs.orphaned)
Corruption = tuple[str, Run]


@pytest.mark.parametrize("make", RUNS)
def test_a_run_as_the_protocol_makes_it_is_accepted(make: Callable[[], runs.Recorder]) -> None:
    verdict = replay(make().run)
    assert verdict == Verdict(True, verdict.total, verdict.total)
    assert verdict.total >= 10


def renumbered(run: Run, events: Sequence[ProtocolEvent]) -> Run:
    """With those events, each process's counted anew: as if nobody had touched them."""
    counts: dict[str, int] = {}
    fresh = []
    for event in events:
        copy = ProtocolEvent()
        copy.CopyFrom(event)
        copy.number = counts[event.party] = counts.get(event.party, 0) + 1
        fresh.append(copy)
    return replace(run, events=tuple(fresh))


def rechained(run: Run, payloads: Sequence[Payload]) -> Run:
    """With those records, hashes and sequences made right."""
    records: list[Record] = []
    digest = b""
    for number, payload in enumerate(payloads):
        data = encode(run.request_id, digest, payload)
        digest = record_digest(data)
        known = run.records[number].sequence if number < len(run.records) else run.records[-1].sequence + 3
        records.append(Record(known, data))
    return replace(run, records=tuple(records))


def altered(event: ProtocolEvent) -> ProtocolEvent | None:
    """One token, digest or count of it is another."""
    copy = ProtocolEvent()
    copy.CopyFrom(event)
    match event.WhichOneof("event"):
        case "sampled":
            copy.sampled.token_ids[0] += 1
        case "delivered":
            copy.delivered.token_ids[-1] += 1
        case "receipt_made":
            copy.receipt_made.tokens += 1
        case "finished":
            copy.finished.position -= 1
        case _:
            return None
    return copy


def illegal(make: Callable[[], runs.Recorder]) -> Iterator[Corruption]:
    """Every corruption of a run that cannot be a run itself."""
    run = make().run
    committed = {tuple(payload.token_ids) for payload in map(read, run.records) if isinstance(payload, Extended)}
    named = {payload.receipt_sha256 for payload in map(read, run.records) if isinstance(payload, Closed)}
    for index, event in enumerate(run.events):
        kind = event.WhichOneof("event") or ""
        others = [one for place, one in enumerate(run.events) if place != index]
        # What was sampled and never committed, or said last before a process died, might as well not have been.
        needed = {
            "started": True,
            "sampled": tuple(event.sampled.token_ids) in committed,
            "receipt_made": event.receipt_made.receipt_sha256 in named,
            "delivered": any(one.party == event.party for one in run.events[index + 1 :]),
        }
        if needed.get(kind):
            yield f"{kind} {index} dropped", renumbered(run, others)
        if kind in {"sampled", "delivered", "receipt_made"}:
            twice = [*run.events[:index], event, *run.events[index:]]
            yield f"{kind} {index} twice", renumbered(run, twice)
        change = altered(event)
        if change is not None and needed.get(kind, True):
            yield f"{kind} {index} altered", renumbered(run, [*run.events[:index], change, *run.events[index + 1 :]])
        after = next(
            (place for place in range(index + 1, len(run.events)) if run.events[place].party == event.party), 0
        )
        if after and depends(event, run.events[after]):
            swapped = list(run.events)
            swapped[index], swapped[after] = swapped[after], swapped[index]
            yield f"{kind} {index} swapped with the next", renumbered(run, swapped)
    payloads = [read(record) for record in run.records]
    for index in range(len(payloads)):
        name = payloads[index].DESCRIPTOR.name
        if index < len(payloads) - 1:
            yield f"record {index} {name} dropped", rechained(run, payloads[:index] + payloads[index + 1 :])
            pair = [payloads[index + 1], payloads[index]]
            yield f"record {index} {name} swapped", rechained(run, payloads[:index] + pair + payloads[index + 2 :])
        yield f"record {index} {name} twice", rechained(run, payloads[: index + 1] + payloads[index:])
        payload = payloads[index]
        if isinstance(payload, Extended):
            change_ = Extended()
            change_.CopyFrom(payload)
            change_.token_ids[0] += 1
            yield f"record {index} altered", rechained(run, [*payloads[:index], change_, *payloads[index + 1 :]])


def depends(one: ProtocolEvent, other: ProtocolEvent) -> bool:
    """Whether the second cannot come before the first."""
    both = one.WhichOneof("event"), other.WhichOneof("event")
    # A receipt that a cancel made useless is made anew; where both are the same event nothing is swapped.
    return both in {
        ("started", "sampled"),
        ("sampled", "sampled"),
        ("sampled", "receipt_made"),
        ("followed", "delivered"),
        ("delivered", "delivered"),
        ("delivered", "finished"),
    }


def read(record: Record) -> Payload:
    return decode(record.data)[1]


ILLEGAL = [(f"{make.__name__}: {name}", run) for make in RUNS for name, run in illegal(make)]


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
