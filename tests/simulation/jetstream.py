"""JetStream as `services/runtime/journal.py` sees it: compare-and-set appends, reads, republished records."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nats.aio.msg import Msg

COMMIT, COMMITTED, RECEIPT = "cs.v1.commit.", "cs.v1.committed.", "cs.v1.receipt."


@dataclass(frozen=True, slots=True)
class Stored:
    """A message of a stream; ``previous`` is the sequence of the one before it on its subject, 0 for none."""

    subject: str
    sequence: int
    previous: int
    data: bytes
    at: float


@dataclass(slots=True)
class JetStream:
    """Two streams. All subjects of one share its sequence; each subject has a last sequence of its own.

    ``stored`` is told of each message before anybody else is; ``republish`` sends to who listens.
    """

    stored: Callable[[Stored, str], None]
    republish: Callable[[str, bytes, dict[str, str]], None]
    sequences: dict[str, int] = field(default_factory=lambda: {COMMIT: 0, RECEIPT: 0})
    subjects: dict[str, list[Stored]] = field(default_factory=dict)

    def last(self, subject: str) -> int:
        """What an append to ``subject`` is to expect."""
        messages = self.subjects.get(subject)
        return messages[-1].sequence if messages else 0

    def accepts(self, subject: str, expected: int) -> bool:
        return expected == self.last(subject)

    def publish(self, subject: str, data: bytes, headers: Mapping[str, str], now: float, who: str) -> dict[str, Any]:
        """The answer to an append, as JSON: stored as a sequence, or refused with err_code 10071."""
        expected = int(headers["Nats-Expected-Last-Subject-Sequence"])
        if not self.accepts(subject, expected):
            text = f"wrong last sequence: {self.last(subject)}"
            return {"error": {"code": 400, "err_code": 10071, "description": text}}
        stream = COMMIT if subject.startswith(COMMIT) else RECEIPT
        self.sequences[stream] += 1
        message = Stored(subject, self.sequences[stream], self.last(subject), data, now)
        self.subjects.setdefault(subject, []).append(message)
        self.stored(message, who)
        if stream == COMMIT:
            self.republish(COMMITTED + subject.removeprefix(COMMIT), data, _headers(message))
        return {"stream": stream, "seq": message.sequence}

    def get_last(self, subject: str) -> dict[str, Any]:
        """The leader's answer about the newest message."""
        if subject not in self.subjects:
            return {"error": {"code": 404, "err_code": 10037, "description": "no message found"}}
        message = self.subjects[subject][-1]
        return {"message": {"seq": message.sequence, "data": base64.b64encode(message.data).decode()}}

    def get_info(self, prefix: str) -> dict[str, Any]:
        """The leader's answer about the subjects of a stream."""
        subjects = {name: len(messages) for name, messages in self.subjects.items() if name.startswith(prefix)}
        return {"state": {"subjects": subjects}, "total": len(subjects)}

    def get_batch(self, subject: str, first: int, until: float, most: int) -> list[Msg]:
        """A replica's answer, one that knows what was stored until then: at most so many messages, and the end."""
        known = [each for each in self.subjects.get(subject, []) if each.sequence >= first and each.at <= until]
        if not known:
            return [_message(b"", {"Status": "404"})]
        sent = known[:most]
        pending, before = str(len(known) - len(sent)), 0
        messages = []
        for each in sent:
            # In a batch a message names the one before it there, the first none.
            messages.append(_message(each.data, {**_headers(each), "Nats-Last-Sequence": str(before)}))
            before = each.sequence
        end = {"Status": "204", "Nats-Num-Pending": pending, "Nats-Last-Sequence": str(before)}
        return [*messages, _message(b"", end)]


def reply(answer: Mapping[str, Any]) -> Msg:
    return _message(json.dumps(answer).encode(), {})


def _message(data: bytes, headers: dict[str, str]) -> Msg:
    return Msg(_client=None, data=data, headers=headers)  # type: ignore[arg-type]  # nobody answers to it


def _headers(message: Stored) -> dict[str, str]:
    return {"Nats-Sequence": str(message.sequence), "Nats-Last-Sequence": str(message.previous)}
