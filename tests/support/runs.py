"""Recorded runs made by hand: what the parties of one request append and say."""

from __future__ import annotations

from collections import Counter
from hashlib import sha256

from countersign.services.protocol.commit import LogState, Payload, encode
from countersign.v1.commit_pb2 import Assigned, Cancelled, Closed, Extended, Opened
from countersign.v1.event_pb2 import Delivered, Followed, ProtocolEvent, ReceiptMade, Sampled, Started
from countersign.v1.sampling_pb2 import FINISH_REASON_LENGTH, FinishReason, SamplingParams
from countersign.verify.spec.run import Record, Run


class Recorder:
    """Grows a run step by step; ``known`` of an event is the whole log unless it is said."""

    def __init__(self, max_tokens: int = 8) -> None:
        self.log = LogState("r1")
        self.records: list[Record] = []
        self.events: list[ProtocolEvent] = []
        self._counts = Counter[str]()
        self.append(Opened(model="m", prompt_token_ids=[1, 2], sampling=SamplingParams(max_tokens=max_tokens)))

    @property
    def run(self) -> Run:
        return Run("r1", tuple(self.records), tuple(self.events))

    def append(self, payload: Payload) -> int:
        data, sequence = encode("r1", self.log.digest, payload), self.log.sequence + 3
        self.log = self.log.apply(sequence, data)
        self.records.append(Record(sequence, data))
        return sequence

    def say(
        self, party: str, what: Started | Sampled | ReceiptMade | Followed | Delivered, known: int | None = None
    ) -> None:
        self._counts[party] += 1
        event = ProtocolEvent(
            request_id="r1",
            party=party,
            number=self._counts[party],
            known=self.log.sequence if known is None else known,
        )
        match what:
            case Started():
                event.started.CopyFrom(what)
            case Sampled():
                event.sampled.CopyFrom(what)
            case ReceiptMade():
                event.receipt_made.CopyFrom(what)
            case Followed():
                event.followed.CopyFrom(what)
            case Delivered() if what.token_ids:
                event.delivered.CopyFrom(what)
            case Delivered():
                event.finished.CopyFrom(what)
        self.events.append(event)

    def assign(self, instance: str) -> None:
        epoch = self.log.epoch + 1
        self.append(Assigned(epoch=epoch, instance=instance))
        self.say(f"{instance}.1", Started(epoch=epoch))

    def extend(self, *token_ids: int) -> None:
        base, epoch = len(self.log.tokens), self.log.epoch
        self.say(f"{self.log.instance}.1", Sampled(epoch=epoch, base=base, token_ids=token_ids))
        self.append(Extended(epoch=epoch, base=base, token_ids=token_ids))

    def receipt(self, *, cancelled: bool = False) -> bytes:
        digest = sha256(f"{self.log.token_ids} {cancelled}".encode()).digest()
        count = len(self.log.tokens)
        made = ReceiptMade(epoch=self.log.epoch, receipt_sha256=digest, tokens=count, cancelled=cancelled)
        self.say(f"{self.log.instance}.1", made)
        return digest

    def close(self, digest: bytes, reason: FinishReason.ValueType = FINISH_REASON_LENGTH) -> None:
        self.append(Closed(reason=reason, receipt_sha256=digest, usage=self.log.usage()))

    def cancel(self) -> None:
        self.append(Cancelled(cause="the client left"))

    def serve(self, router: str, start: int, *ends: int) -> None:
        """A client that has ``start`` tokens gets those up to each of ``ends``, and is told that it was all."""
        self.say(router, Followed(position=start))
        for end in ends:
            part = self.log.token_ids[start:end]
            self.say(router, Delivered(position=start, token_ids=part))
            start = end
        if self.log.closed is not None:
            self.say(router, Delivered(position=start))


def taken_over() -> Recorder:
    """A target dies in mid-answer, its zombie samples on, another ends the answer; the client comes back once."""
    it = Recorder()
    it.assign("target-a")
    it.extend(5, 6)
    it.extend(7)
    it.serve("router-x.1", 0, 2, 3)
    old = it.log.sequence
    it.assign("target-b")
    it.say("target-a.1", Sampled(epoch=1, base=3, token_ids=[8]), old)
    it.extend(8, 9, 10)
    it.extend(11, 12)
    it.close(it.receipt())
    it.serve("router-y.1", 3, 6, 8)
    return it


def cancelled() -> Recorder:
    """A cancel comes between the receipt and the close."""
    it = Recorder()
    it.assign("target-a")
    it.extend(5, 6, 7)
    it.receipt()
    it.cancel()
    it.close(it.receipt(cancelled=True), FinishReason.FINISH_REASON_CANCELLED)
    it.serve("router-x.1", 0, 3)
    return it


def orphaned() -> Recorder:
    """No target is left: a router takes the request over and closes it."""
    it = Recorder()
    it.assign("target-a")
    it.extend(5)
    it.append(Assigned(epoch=2, instance="router-x"))
    it.close(b"", FinishReason.FINISH_REASON_ERROR)
    it.serve("router-x.1", 0, 1)
    return it
