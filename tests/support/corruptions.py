"""Recorded runs that no protocol makes: one step of a right one is gone, there twice, changed, or out of order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import runs

from countersign.services.protocol.commit import Payload, decode, encode, record_digest
from countersign.v1.commit_pb2 import Closed, Extended
from countersign.v1.event_pb2 import ProtocolEvent
from countersign.verify.spec.run import Record, Run

RUNS = (runs.taken_over, runs.cancelled, runs.orphaned)
Corruption = tuple[str, Run]


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
