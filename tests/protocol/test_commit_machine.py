"""Several targets and routers on one log, over a network that loses, repeats and delays: what can never happen.

The stream is a perfect model of a JetStream subject: it stores a record if and only if its writer names the last
sequence. Every message may arrive late, twice or never, every answer may be lost, every read may lag, every fenced
target wakes up again. The same machine then runs with one deliberate bug at a time, and the property that must fall is
named.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from hashlib import sha256

import pytest
from hypothesis import HealthCheck, Phase, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from countersign.services.protocol.appender import Appender
from countersign.services.protocol.commit import LogState, Payload, decode, replay
from countersign.services.protocol.errors import BrokenChain
from countersign.services.protocol.events import Append, CancelledByClient, Committed, Effect, Ended, ReadTail
from countersign.services.protocol.opener import Opener
from countersign.services.protocol.reader import Reader
from countersign.services.protocol.writer import Writer
from countersign.v1.commit_pb2 import Assigned, Cancelled, Closed, Extended, Opened
from countersign.v1.sampling_pb2 import (
    FINISH_REASON_CANCELLED,
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    FinishReason,
    SamplingParams,
    Usage,
)

PROPERTIES = (
    "Agreement",
    "ExactlyOnce",
    "Fenced",
    "OnlyVerified",
    "ClosedIsFinal",
    "OneReceipt",
    "BilledIsCommitted",
)
MAX_TOKENS = 12
OPENED = Opened(model="m", prompt_token_ids=[5, 6, 7], sampling=SamplingParams(max_tokens=MAX_TOKENS))


class Violated(AssertionError):
    """A property of DESIGN.md section 4 does not hold."""


def hold(name: str, condition: bool) -> None:
    if not condition:
        raise Violated(name)


@dataclass(frozen=True, slots=True)
class Stored:
    sequence: int
    data: bytes
    payload: Payload
    digest: bytes


@dataclass(slots=True)
class Subject:
    """One subject of a stream that other subjects share, hence the jumps in its sequences."""

    compare_and_set: bool = True
    entries: list[Stored] = field(default_factory=list)

    def publish(self, append: Append) -> int | None:
        last = self.entries[-1].sequence if self.entries else 0
        if self.compare_and_set and append.expected != last:
            return None
        _, payload = decode(append.data)
        sequence = last + 1 + len(self.entries) % 3
        self.entries.append(Stored(sequence, append.data, payload, sha256(append.data).digest()))
        return sequence

    def after(self, sequence: int) -> list[Stored]:
        return [entry for entry in self.entries if entry.sequence > sequence]


@dataclass(slots=True)
class Actor:
    """A router or a target: a machine, the append it waits for and the read it owes it."""

    machine: Appender
    waiting: Append | None = None
    answer: int | None = None
    answered: bool = False
    reading: bool = False
    receipt: bytes = b""

    @property
    def idle(self) -> bool:
        return self.waiting is None and not self.reading


@dataclass(frozen=True, slots=True)
class Verdict:
    prefix: tuple[int, ...]
    token_ids: tuple[int, ...]


fates = st.sampled_from(["well", "well", "ack lost", "lost", "late"])


class CommitMachine(RuleBasedStateMachine):
    compare_and_set = True
    reuse_receipt = False
    properties: tuple[str, ...] = PROPERTIES
    seen: set[str] = set()  # noqa: RUF012  shared by all runs of one machine on purpose: what was reached at all

    def __init__(self) -> None:
        super().__init__()
        self.subject = Subject(self.compare_and_set)
        self.routers: list[Actor] = []
        self.targets: list[Actor] = []
        self.started: set[int] = set()
        self.network: list[tuple[Actor, Append]] = []
        self.verdicts: set[Verdict] = set()
        self.receipts: dict[bytes, tuple[tuple[int, ...], bytes]] = {}
        self.readers: list[tuple[Reader, int, list[int]]] = []

    def saw(self, what: str) -> None:
        event(what)
        self.seen.add(what)

    # What the shell around the machines does

    def perform(self, actor: Actor, effect: Effect | None) -> None:
        if isinstance(effect, Append):
            actor.waiting, actor.answered = effect, False
            self.network.append((actor, effect))
            del self.network[:-16]
        elif isinstance(effect, ReadTail):
            actor.waiting, actor.reading = None, True
        elif effect is not None:
            actor.waiting = None
            self.saw(f"{type(actor.machine).__name__}: {type(effect).__name__}")

    def arrive(self, actor: Actor, append: Append) -> None:
        sequence = self.subject.publish(append)
        if sequence is None:
            self.saw("an append is refused")
        # Only the answer to the first sending that is still waited for is heard.
        if actor.waiting is append and not actor.answered:
            actor.answer, actor.answered = sequence, True

    def hear(self, actor: Actor, lag: int) -> None:
        actor.waiting = None
        if actor.answer is None:
            self.perform(actor, actor.machine.refused(self.tail(actor, lag)))
        else:
            self.perform(actor, actor.machine.acked(actor.answer))

    def tail(self, actor: Actor, lag: int) -> list[Stored]:
        entries = self.subject.after(actor.machine.log.sequence)
        return entries[: len(entries) - lag] if lag else entries

    def read(self, actor: Actor, lag: int) -> None:
        actor.reading = False
        self.perform(actor, actor.machine.tail(self.tail(actor, lag)))

    def lose(self, actor: Actor) -> None:
        self.saw("an ack is lost" if actor.answered else "an append is lost or late")
        self.perform(actor, actor.machine.ack_lost())

    def step(self, actor: Actor) -> None:
        """The next thing that ``actor`` waits for happens, and happens well."""
        if actor.waiting is not None:
            if not actor.answered:
                self.arrive(actor, actor.waiting)
            self.hear(actor, 0)
        elif actor.reading:
            self.read(actor, 0)

    def send(self, actor: Actor, effect: Effect | None, fate: str) -> None:
        """What becomes of an effect at once; everything else is left to later."""
        self.perform(actor, effect)
        if actor.waiting is None or actor.waiting is not effect:
            return
        if fate in {"well", "ack lost"}:
            self.arrive(actor, actor.waiting)
        if fate == "well":
            self.hear(actor, 0)
        elif fate in {"ack lost", "lost"}:
            self.lose(actor)

    @property
    def busy(self) -> list[Actor]:
        return [actor for actor in self.actors if not actor.idle]

    @property
    def actors(self) -> list[Actor]:
        return self.routers + self.targets

    # Rules

    @initialize()
    def begin(self) -> None:
        self.readers = [(Reader("r", start=start), start, []) for start in (0, 3)]
        opener = Opener(LogState("r"))
        self.publish(opener, opener.open(OPENED))
        self.publish(opener, opener.assign("t1"))
        # Two routers know the request; a third has yet to find out that it is open.
        self.routers = [Actor(Opener(log)) for log in (opener.log, opener.log, LogState("r"))]
        self.start(0)

    def publish(self, opener: Opener, append: Effect) -> None:
        assert isinstance(append, Append)
        opener.acked(self.subject.publish(append) or 0)

    @rule(who=st.integers(0, 2), ask=st.sampled_from(["assign", "assign", "assign", "cancel", "open"]), fate=fates)
    def route(self, who: int, ask: str, fate: str) -> None:
        router = self.routers[who]
        opener = router.machine
        assert isinstance(opener, Opener)
        if not router.idle:
            self.step(router)
        elif opener.log.opened is None or ask == "open":
            self.send(router, opener.open(OPENED), fate)
        elif ask == "assign":
            self.send(router, opener.assign(f"t{opener.log.epoch + 1}"), fate)
        else:
            self.send(router, opener.cancel(f"client {who}"), fate)

    @precondition(lambda self: self.unstarted)
    @rule(lag=st.integers(0, 3))
    def start(self, lag: int) -> None:
        """A target takes over from a log that it may have read too early, but not before its Assigned."""
        for epoch, index in self.unstarted[:1]:
            end = max(index + 1, len(self.subject.entries) - lag)
            known = replay("r", self.subject.entries[:end])
            if known.epoch == epoch:
                self.targets.append(Actor(Writer(known, epoch=epoch, instance=known.instance)))
            self.started.add(epoch)

    @property
    def unstarted(self) -> list[tuple[int, int]]:
        """Epochs whose target has yet to begin, and where each is assigned."""
        payloads = [entry.payload for entry in self.subject.entries]
        assigned = [(payload.epoch, index) for index, payload in enumerate(payloads) if isinstance(payload, Assigned)]
        return [(epoch, index) for epoch, index in assigned if epoch not in self.started]

    @rule(who=st.integers(0, 3), token_ids=st.lists(st.integers(0, 2), min_size=1, max_size=3), fate=fates)
    def verify(self, who: int, token_ids: list[int], fate: str) -> None:
        """A pass on top of everything sampled so far. It samples anything at all: no seed hides a wrong prefix here."""
        target = self.targets[who % len(self.targets)]
        writer = target.machine
        assert isinstance(writer, Writer)
        prefix = writer.log.token_ids + writer.pending
        token_ids = token_ids[: max(0, MAX_TOKENS - len(prefix))]
        if not writer.wants_tokens or not token_ids:
            return
        accepted = len(token_ids) - 1
        effect = writer.extend(token_ids, drafted=accepted + who, accepted=accepted)
        self.verdicts.add(Verdict(prefix, tuple(token_ids)))
        if len(writer.pending) > len(token_ids):
            self.saw("a pass runs ahead of an append")
        self.send(target, effect, fate)

    @rule(who=st.integers(0, 3), fate=fates)
    def close(self, who: int, fate: str) -> None:
        target = self.targets[who % len(self.targets)]
        writer = target.machine
        assert isinstance(writer, Writer)
        stopped = writer.stop is not None and not isinstance(writer.stop, CancelledByClient)
        if not target.idle or writer.in_flight is not None or stopped or writer.log.closed is not None:
            return
        self.send(target, self.sealed(target, writer), fate)

    def sealed(self, target: Actor, writer: Writer) -> Append:
        log = writer.log
        reason = FINISH_REASON_LENGTH if len(log.tokens) == MAX_TOKENS else FINISH_REASON_STOP
        if log.cancelled is not None:
            reason = FINISH_REASON_CANCELLED
        receipt = sha256(repr((log.token_ids, log.digest)).encode()).digest()
        self.receipts[receipt] = (log.token_ids, log.digest)
        if self.reuse_receipt and target.receipt:
            receipt = target.receipt
        target.receipt = receipt
        return writer.close(reason, receipt_sha256=receipt)

    @precondition(lambda self: self.busy)
    @rule(who=st.integers(0, 5), steps=st.integers(1, 4))
    def exchange(self, who: int, steps: int) -> None:
        """The good case: it arrives, the answer is heard, and so on."""
        actor = self.busy[who % len(self.busy)]
        for _ in range(steps):
            self.step(actor)

    @precondition(lambda self: self.network)
    @rule(which=st.integers(0, 15))
    def deliver(self, which: int) -> None:
        """Any message ever sent arrives, late or once more."""
        self.arrive(*self.network[-1 - which % len(self.network)])

    @precondition(lambda self: self.busy)
    @rule(who=st.integers(0, 5), lag=st.integers(0, 2), lost=st.booleans())
    def go_wrong(self, who: int, lag: int, lost: bool) -> None:
        """An answer is lost, or a read lags behind."""
        actor = self.busy[who % len(self.busy)]
        if actor.reading:
            self.read(actor, lag)
        elif lost or not actor.answered:
            self.lose(actor)
        else:
            self.hear(actor, lag)

    @rule(who=st.integers(0, 1), which=st.integers(0, 40), through=st.booleans())
    def stream(self, who: int, which: int, through: bool) -> None:
        """Any stored record reaches a reader, in any order, any number of times; it reads again where it sees a gap."""
        reader, start, seen = self.readers[who]
        missed = self.subject.after(reader.log.sequence)
        entry = self.subject.entries[which % len(self.subject.entries)]
        try:
            events = [] if through else reader.entry(entry.sequence, entry.data)
        except BrokenChain:
            self.saw("a reader sees a gap")
            through, events = True, []
        if through:
            events = [news for entry in missed for news in reader.entry(entry.sequence, entry.data)]
        for news in events:
            if isinstance(news, Committed):
                hold("Agreement", "Agreement" not in self.properties or news.position == start + len(seen))
                seen.extend(news.token_ids)
            if isinstance(news, Ended):
                self.saw("a reader sees the end")

    # Properties

    @invariant()
    def properties_hold(self) -> None:
        """Straight from the records, with none of the code under test but their decoding."""
        epoch, usage = 0, Usage(prompt_tokens=3)
        tokens: list[int] = []
        ended: list[str] = []
        digest = b""
        for entry in self.subject.entries:
            payload = entry.payload
            if "ClosedIsFinal" in self.properties:
                hold("ClosedIsFinal", not ended or (ended == ["Cancelled"] and isinstance(payload, Closed)))
            match payload:
                case Assigned():
                    epoch = payload.epoch
                case Extended():
                    self.check_extended(payload, epoch, tokens)
                    tokens.extend(payload.token_ids)
                    usage.output_tokens += len(payload.token_ids)
                    usage.drafted_tokens += payload.drafted
                    usage.accepted_tokens += payload.accepted
                    usage.target_passes += 1
                case Cancelled():
                    ended.append("Cancelled")
                case Closed():
                    ended.append("Closed")
                    self.check_closed(payload, usage, tuple(tokens), digest)
            digest = entry.digest
        if "Agreement" in self.properties:
            self.check_agreement(tokens)

    def check_extended(self, extended: Extended, epoch: int, tokens: list[int]) -> None:
        if "ExactlyOnce" in self.properties:
            hold("ExactlyOnce", extended.base == len(tokens))
        if "Fenced" in self.properties:
            hold("Fenced", extended.epoch == epoch)
        if "OnlyVerified" in self.properties:
            hold("OnlyVerified", Verdict(tuple(tokens), tuple(extended.token_ids)) in self.verdicts)

    def check_closed(self, closed: Closed, usage: Usage, tokens: tuple[int, ...], digest: bytes) -> None:
        self.saw(f"Closed: {FinishReason.Name(closed.reason)}")
        if "OneReceipt" in self.properties:
            hold("OneReceipt", self.receipts[closed.receipt_sha256] == (tokens, digest))
        if "BilledIsCommitted" in self.properties:
            hold("BilledIsCommitted", closed.usage == usage)

    def check_agreement(self, tokens: list[int]) -> None:
        for _, start, seen in self.readers:
            hold("Agreement", seen == tokens[start : start + len(seen)])
        for actor in self.actors:
            known = list(actor.machine.log.token_ids)
            hold("Agreement", known == tokens[: len(known)])

    def teardown(self) -> None:
        """Faults heal: everything settles, and the owner can end the request."""
        if self.properties != PROPERTIES or not self.subject.entries:
            return
        for _ in range(2):
            for actor in self.actors:
                self.settle(actor)
        self.start(0)
        log = replay("r", self.subject.entries)
        for owner in self.targets:
            writer = owner.machine
            if isinstance(writer, Writer) and writer.epoch == log.epoch and log.closed is None:
                writer.tail(self.tail(owner, 0))
                self.perform(owner, self.sealed(owner, writer))
                self.settle(owner)
                assert replay("r", self.subject.entries).closed is not None
        self.properties_hold()

    def settle(self, actor: Actor) -> None:
        for _ in range(40):
            self.step(actor)
            if actor.idle:
                assert actor.machine.in_flight is None
                return
        raise AssertionError("an append never settles")


def run(machine: type[CommitMachine], *, examples: int) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=50,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )


REACHED = {
    "Opener: Settled",
    "Opener: AssignedTo",
    "Opener: CancelledByClient",
    "Opener: ClosedAlready",
    "Writer: Settled",
    "Writer: Fenced",
    "Writer: CancelledByClient",
    "an ack is lost",
    "an append is lost or late",
    "an append is refused",
    "a pass runs ahead of an append",
    "a reader sees a gap",
    "a reader sees the end",
    "Closed: FINISH_REASON_STOP",
    "Closed: FINISH_REASON_CANCELLED",
}


def test_no_schedule_of_losses_repetitions_and_take_overs_breaks_a_property() -> None:
    seen: set[str] = set()
    run(type("Sound", (CommitMachine,), {"seen": seen}), examples=300)
    assert REACHED - seen == set(), "never reached"


# Deliberate bugs. Each lives where a hurried hand would put it.


def blind(monkeypatch: pytest.MonkeyPatch, *checks: str) -> None:
    """Takes the log's own checks away, which would otherwise stop the bug before it did harm."""
    for name in checks:
        monkeypatch.setattr(LogState, name, lambda *_: None)


def drop_compare_and_set(monkeypatch: pytest.MonkeyPatch) -> None:
    trust_the_tail(monkeypatch)
    monkeypatch.setattr(Writer, "_overtaken", lambda writer, _: writer._heed())
    monkeypatch.setattr(CommitMachine, "compare_and_set", False)


def ignore_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    blind(monkeypatch, "_check_extended")
    heed = Writer._heed

    def deaf(writer: Writer) -> None:
        if writer.log.epoch <= writer.epoch or writer.log.ended:
            heed(writer)

    monkeypatch.setattr(Writer, "_heed", deaf)


def _append_again(writer: Writer, before: LogState) -> None:
    for extended in writer._passes:
        extended.base += len(writer.log.tokens) - len(before.tokens)
    writer._heed()


def never_find_its_own_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a lost ack the append goes out again behind itself."""
    blind(monkeypatch, "_check_extended")
    monkeypatch.setattr(Writer, "_overtaken", _append_again)
    monkeypatch.setattr(Appender, "_is_own", lambda *_: False)


def check_no_base(monkeypatch: pytest.MonkeyPatch) -> None:
    never_find_its_own_record(monkeypatch)
    monkeypatch.setattr(Writer, "_overtaken", lambda writer, _: writer._heed())


def trust_the_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that takes any later record for the next one."""
    blind(monkeypatch, "check")
    apply = LogState.apply

    def believe(log: LogState, sequence: int, data: bytes) -> LogState:
        record, _ = decode(data)
        return apply(replace(log, digest=record.previous_sha256), sequence, data)

    monkeypatch.setattr(LogState, "apply", believe)


def extend_after_cancel(monkeypatch: pytest.MonkeyPatch) -> None:
    blind(monkeypatch, "check")
    heed = Writer._heed

    def deaf(writer: Writer) -> None:
        if writer.log.cancelled is None or writer.log.closed is not None:
            heed(writer)

    monkeypatch.setattr(Writer, "_heed", deaf)


def close_with_the_first_receipt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A close that Cancelled overtook is tried again with the receipt that was made for it."""
    monkeypatch.setattr(CommitMachine, "reuse_receipt", True)


def bill_the_proposals(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = LogState.usage

    def inflated(log: LogState) -> Usage:
        bill = usage(log)
        bill.output_tokens += bill.drafted_tokens - bill.accepted_tokens
        return bill

    monkeypatch.setattr(LogState, "usage", inflated)


MUTANTS = [
    (drop_compare_and_set, "ExactlyOnce"),
    (ignore_epochs, "Fenced"),
    (never_find_its_own_record, "OnlyVerified"),
    (check_no_base, "ExactlyOnce"),
    (trust_the_tail, "Agreement"),
    (extend_after_cancel, "ClosedIsFinal"),
    (close_with_the_first_receipt, "OneReceipt"),
    (bill_the_proposals, "BilledIsCommitted"),
]


@pytest.mark.parametrize(("mutant", "killer"), MUTANTS, ids=lambda value: getattr(value, "__name__", value))
def test_each_deliberate_bug_is_killed_by_the_property_it_should_violate(
    monkeypatch: pytest.MonkeyPatch, mutant: Callable[[pytest.MonkeyPatch], None], killer: str
) -> None:
    mutant(monkeypatch)
    machine = type("Broken", (CommitMachine,), {"seen": set(), "properties": (killer,)})
    with pytest.raises(Violated, match=killer):
        run(machine, examples=3000)
