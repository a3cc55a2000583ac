"""What services count: by a meter of the test's own, read as Prometheus would."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from prometheus_client.samples import Sample

from countersign.services.auditor.intake import Taken
from countersign.services.auditor.metering import AuditMeter
from countersign.services.kv.disk import Disk
from countersign.services.kv.metering import observe_store
from countersign.services.kv.store import BlockStore, Place
from countersign.services.protocol.cache import Tier
from countersign.services.protocol.driver import Final
from countersign.services.protocol.events import CancelledByClient, ClosedAlready, Fenced, Settled
from countersign.services.router.metering import RequestMeter
from countersign.services.runtime.errors import CountersignError, InvalidArgument, ResourceExhausted, Unavailable
from countersign.services.runtime.telemetry.exposition import Families
from countersign.services.runtime.telemetry.instruments import Meter
from countersign.services.target.metering import CommitMeter
from countersign.v1.router_pb2 import Accepted, Finished, StreamEvent, Token, Tokens
from countersign.v1.sampling_pb2 import FinishReason, Usage
from countersign.verify.verdict import Finding


class Counted:
    """A meter, and what it has counted."""

    def __init__(self) -> None:
        self.meter = Meter()
        self._families = Families(self.meter)

    def samples(self, name: str) -> Iterator[Sample]:
        return (sample for each in self._families.collect() for sample in each.samples if sample.name == name)

    def value(self, name: str, **labels: str) -> float:
        """The sum over the series with these labels."""
        return sum(each.value for each in self.samples(name) if labels.items() <= each.labels.items())

    def not_zero(self, name: str, label: str) -> dict[str, float]:
        """By a label's values."""
        return {each.labels.get(label, ""): each.value for each in self.samples(name) if each.value}


@pytest.fixture
def counted() -> Counted:
    return Counted()


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


ACCEPTED = StreamEvent(accepted=Accepted(request_id="r", model="demo-target", prompt_tokens=7))
TOKEN = StreamEvent(tokens=Tokens(position=0, tokens=[Token(id=1)]))
DURATION = "gen_ai_server_request_duration_seconds"
FIRST = "gen_ai_server_time_to_first_token_seconds"
EACH = "gen_ai_server_time_per_output_token_seconds"
ENDS = ("countersign_requests_total", "countersign_finish_reason")


def finished(reason: FinishReason.ValueType, tokens: int = 11) -> StreamEvent:
    return StreamEvent(finished=Finished(reason=reason, usage=Usage(prompt_tokens=7, output_tokens=tokens)))


def test_a_request_is_timed_from_its_arrival_to_its_first_token_and_its_end(counted: Counted) -> None:
    clock = Clock()
    with RequestMeter(clock, counted.meter).request() as measured:
        clock.now += 0.5
        measured.saw(ACCEPTED)
        clock.now += 0.25
        measured.saw(TOKEN)
        clock.now += 2
        measured.saw(TOKEN)
        measured.saw(finished(FinishReason.FINISH_REASON_STOP))
        clock.now += 60  # what the client does with it is its own business
    asked = {
        "gen_ai_operation_name": "text_completion",
        "gen_ai_provider_name": "countersign",
        "gen_ai_request_model": "demo-target",
    }
    assert counted.value(f"{FIRST}_sum", **asked) == 0.75
    assert counted.value(f"{EACH}_sum", **asked) == pytest.approx(2 / 10)
    assert counted.value(f"{DURATION}_sum", **asked) == 2.75
    assert counted.not_zero(f"{DURATION}_count", "error_type") == {"": 1}
    assert counted.not_zero(*ENDS) == {"stop": 1}
    assert counted.value("countersign_request_tokens_sum", gen_ai_token_type="input") == 7
    assert counted.value("countersign_request_tokens_sum", gen_ai_token_type="output") == 11


@pytest.mark.parametrize(
    ("reason", "end", "error"),
    [
        (FinishReason.FINISH_REASON_LENGTH, "length", ""),
        (FinishReason.FINISH_REASON_CANCELLED, "cancelled", ""),
        (FinishReason.FINISH_REASON_DEADLINE, "deadline", "DEADLINE_EXCEEDED"),
        (FinishReason.FINISH_REASON_ERROR, "error", "FINISHED_WITH_ERROR"),
    ],
)
def test_an_answer_ends_by_its_reason(counted: Counted, reason: FinishReason.ValueType, end: str, error: str) -> None:
    with RequestMeter(Clock(), counted.meter).request() as measured:
        measured.saw(ACCEPTED)
        measured.saw(finished(reason))
    assert counted.not_zero(*ENDS) == {end: 1}
    assert counted.not_zero(f"{DURATION}_count", "error_type") == {error: 1}


def test_the_time_to_a_first_token_is_told_with_the_next_event_so_that_nothing_keeps_the_token(
    counted: Counted,
) -> None:
    clock = Clock()
    with RequestMeter(clock, counted.meter).request() as measured:
        measured.saw(ACCEPTED)
        clock.now += 0.25
        measured.saw(TOKEN)
        assert counted.value(f"{FIRST}_count") == 0
        clock.now += 60
        for _ in range(3):
            measured.saw(TOKEN)
            assert counted.value(f"{FIRST}_sum") == 0.25
    assert counted.value(f"{FIRST}_count") == 1


def test_an_answer_of_one_token_says_nothing_of_the_next(counted: Counted) -> None:
    with RequestMeter(Clock(), counted.meter).request() as measured:
        measured.saw(ACCEPTED)
        measured.saw(TOKEN)
        measured.saw(finished(FinishReason.FINISH_REASON_LENGTH, tokens=1))
    assert counted.value(f"{EACH}_count") == 0
    assert counted.value(f"{FIRST}_count") == 1


def ends_with(error: BaseException, seen: Sequence[StreamEvent], meter: RequestMeter) -> None:
    """A request whose stream breaks."""
    with meter.request() as measured:
        for event in seen:
            measured.saw(event)
        raise error


@pytest.mark.parametrize(
    ("error", "seen", "end"),
    [
        (InvalidArgument("no", reason="EMPTY_PROMPT"), [], "refused"),
        (ResourceExhausted("full", reason="ROUTER_FULL"), [], "refused"),
        (Unavailable("no target is alive", reason="NO_TARGET"), [], "failed"),
        (Unavailable("gone", reason="CONNECTION_LOST"), [ACCEPTED], "failed"),
    ],
)
def test_a_typed_error_is_counted_by_its_reason_and_reaches_the_client(
    counted: Counted, error: CountersignError, seen: list[StreamEvent], end: str
) -> None:
    with pytest.raises(type(error)):
        ends_with(error, seen, RequestMeter(Clock(), counted.meter))
    assert counted.not_zero(*ENDS) == {end: 1}
    assert counted.not_zero(f"{DURATION}_count", "error_type") == {error.reason: 1}


def test_a_client_that_leaves_at_its_first_token_had_one(counted: Counted) -> None:
    with pytest.raises(GeneratorExit):
        ends_with(GeneratorExit(), [ACCEPTED, TOKEN], RequestMeter(Clock(), counted.meter))
    assert counted.not_zero(*ENDS) == {"left": 1}
    assert counted.value(f"{FIRST}_count") == 1


def test_a_bug_is_counted_as_one(counted: Counted) -> None:
    with pytest.raises(ZeroDivisionError):
        ends_with(ZeroDivisionError(), [ACCEPTED], RequestMeter(Clock(), counted.meter))
    assert counted.not_zero(*ENDS) == {"failed": 1}
    assert counted.not_zero(f"{DURATION}_count", "error_type") == {"INTERNAL": 1}


@pytest.mark.parametrize("how", [asyncio.CancelledError, GeneratorExit])
def test_a_client_that_goes_away_is_no_error(counted: Counted, how: type[BaseException]) -> None:
    with pytest.raises(how):
        ends_with(how(), [ACCEPTED], RequestMeter(Clock(), counted.meter))
    assert counted.not_zero(*ENDS) == {"left": 1}
    assert counted.not_zero(f"{DURATION}_count", "error_type") == {"": 1}


def test_a_model_that_a_client_names_is_no_label(counted: Counted) -> None:
    with pytest.raises(InvalidArgument), RequestMeter(Clock(), counted.meter).request():
        raise InvalidArgument("model 'what I always wanted to say' is not served here", reason="UNKNOWN_MODEL")
    assert counted.not_zero(f"{DURATION}_count", "gen_ai_request_model") == {"": 1}


@pytest.mark.parametrize(
    ("final", "conflicts"),
    [
        (Settled(), {}),
        (Fenced(2, "target-2"), {"fenced": 1}),
        (CancelledByClient("asked"), {"cancelled": 1}),
        (ClosedAlready(FinishReason.FINISH_REASON_ERROR), {"closed": 1}),
    ],
)
def test_an_append_that_meets_another_record_is_a_conflict(
    counted: Counted, final: Final, conflicts: dict[str, float]
) -> None:
    CommitMeter(counted.meter).settled(final, 0.004)
    assert counted.not_zero("countersign_commit_conflicts_total", "countersign_outcome") == conflicts
    assert counted.value("countersign_commit_duration_seconds_sum") == 0.004


def test_a_verdict_tells_its_delay_and_how_much_of_each_limit_was_used(counted: Counted) -> None:
    tokens = Finding("tokens", "pass", "fine", {"mean_score": 0.01, "mean_threshold": 0.04})
    activations = Finding("activations", "pass", "fine", {"mean_distance": 0.3, "mean_threshold": 0.4})
    unlimited = Finding("tokens", "inconclusive", "too short", {"mean_score": 0.01, "mean_threshold": 0.0})
    AuditMeter(counted.meter).decided("pass", [Finding("form", "pass", "fine"), tokens, activations, unlimited], 3.5)
    assert counted.not_zero("countersign_auditor_verdicts_total", "countersign_outcome") == {"pass": 1}
    assert counted.value("countersign_audit_delay_seconds_sum") == 3.5
    used = counted.not_zero("countersign_audit_limit_used_sum", "countersign_audit_level")
    assert used == {"tokens": pytest.approx(0.25), "activations": pytest.approx(0.75)}


def test_receipts_are_counted_by_what_became_of_them(counted: Counted) -> None:
    AuditMeter(counted.meter).taken(Taken(logged=5, known=2, refused=0, later=frozenset({1, 4})))
    became = counted.not_zero("countersign_auditor_receipts_total", "countersign_outcome")
    assert became == {"logged": 5, "known": 2, "later": 2}


async def test_a_store_tells_what_it_holds_in_each_tier(counted: Counted, tmp_path: Path) -> None:
    store = BlockStore(1 << 20, disk=Disk(tmp_path, 1 << 20))
    try:
        observe_store(store, counted.meter)
        [reserved] = store.reserve([Place(b"k" * 32, b"")], 5000, b"kind", "test", ttl=10)
        assert reserved.lease
        assert counted.value("countersign_store_blocks") == 1
        held = counted.value("countersign_store_bytes", countersign_tier="ram")
        assert held == store.cache.room(Tier.RAM) >= 5000
        assert counted.value("countersign_store_bytes", countersign_tier="disk") == 0
        assert counted.value("countersign_store_capacity_bytes", countersign_tier="ram") == 1 << 20
        store.counts.lookups, store.counts.hits = 9, 4
        assert counted.value("countersign_store_lookups_total") == 9
        assert counted.value("countersign_store_hits_total") == 4
    finally:
        await store.close()


def test_what_is_counted_once_is_one_instrument_however_often_it_is_made(counted: Counted) -> None:
    makers: list[Callable[[], CommitMeter]] = [lambda: CommitMeter(counted.meter)] * 3
    for make in makers:
        make().receipt()
    assert counted.value("countersign_receipts_made_total") == 3
