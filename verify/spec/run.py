"""A recorded run of one request: its log as the stream holds it, and what the parties said that they did.

The file has a JSON object a line: a head, one for each record and each event, and a foot that counts and digests them.
``data`` is what counts; ``what`` is the same for people. A run of a block store (steps.py) has the same form.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import DecodeError, Message

from countersign.v1.commit_pb2 import CommitRecord
from countersign.v1.event_pb2 import ProtocolEvent
from countersign.verify.spec.errors import SpecError
from countersign.verify.spec.steps import CacheRun, head_of, run_from, step_from_json, step_to_json

FORMAT = 2


@dataclass(frozen=True, slots=True)
class Record:
    """One record as the stream holds it."""

    sequence: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Run:
    """Records by their sequence, events in any order."""

    request_id: str
    records: tuple[Record, ...]
    events: tuple[ProtocolEvent, ...]

    def __len__(self) -> int:
        return len(self.records) + len(self.events)


def write_run(run: Run | CacheRun) -> str:
    """The file's text."""
    if isinstance(run, CacheRun):
        head = head_of(run)
        middle = [json.dumps({"kind": "step", **step_to_json(step)}) for step in run.steps]
    else:
        head = {"spec": "commit", "request": run.request_id}
        middle = [_line("record", one.data, CommitRecord, sequence=one.sequence) for one in run.records]
        middle += [_line("event", one.SerializeToString(deterministic=True), ProtocolEvent) for one in run.events]
    lines = [json.dumps({"countersign_run": FORMAT, **head}), *middle]
    return "\n".join([*lines, json.dumps({"lines": len(middle), "sha256": _digest(lines)})]) + "\n"


def read_run(file: Path) -> Run | CacheRun:
    """A recorded run.

    Raises:
        SpecError: it cannot be read, or its foot does not go with it.
    """
    try:
        lines = file.read_text().splitlines()
        head, *middle, foot = (json.loads(line) for line in lines)
        if head["countersign_run"] != FORMAT:
            raise SpecError(f"{file.name}: format {head['countersign_run']} is not known here, {FORMAT} is")
        if (len(middle), _digest(lines[:-1])) != (foot["lines"], foot["sha256"]):
            raise SpecError(f"{file.name}: its last line does not go with the others: it was cut or changed")
        if head["spec"] == "cache":
            return run_from(head, map(step_from_json, middle))
        records = tuple(Record(one["sequence"], _data(one)) for one in middle if one["kind"] == "record")
        events = tuple(ProtocolEvent.FromString(_data(one)) for one in middle if one["kind"] == "event")
        return Run(head["request"], records, events)
    except (OSError, ValueError, KeyError, TypeError, DecodeError) as error:
        raise SpecError(f"{file.name} is no recorded run: {type(error).__name__}: {error}") from error


def _line(kind: str, data: bytes, message: type[Message], **more: Any) -> str:
    try:
        what = MessageToDict(message.FromString(data))
    except DecodeError:
        what = {}
    return json.dumps({"kind": kind, **more, "what": what, "data": base64.b64encode(data).decode()})


def _data(line: dict[str, str]) -> bytes:
    return base64.b64decode(line["data"], validate=True)


def _digest(lines: Sequence[str]) -> str:
    return sha256("\n".join(lines).encode()).hexdigest()
