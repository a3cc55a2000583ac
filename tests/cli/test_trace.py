"""``countersign trace``: the tree of a request's spans, and its waterfall at any width."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from rich.cells import cell_len
from rich.console import Console

from countersign.cli.spans import RequestTrace, rounds, trace_of
from countersign.cli.tables import room, show
from countersign.cli.trace import facts, trace
from countersign.cli.waterfall import bar, waterfall
from countersign.services.runtime.errors import FailedPrecondition, NotFound
from countersign.services.runtime.telemetry import attributes as names
from countersign.services.runtime.telemetry.kept import KeptSpan

MS = 1_000_000
START = 1_800_000_000_000 * MS
CLIENT, SERVER = Span.SPAN_KIND_CLIENT, Span.SPAN_KIND_SERVER
HOSTILE = "\x1b[2J\u202e\n[red]"


def value(given: Any) -> AnyValue:
    match given:
        case bool():
            return AnyValue(bool_value=given)
        case int():
            return AnyValue(int_value=given)
        case float():
            return AnyValue(double_value=given)
        case list():
            return AnyValue(array_value=ArrayValue(values=map(value, given)))
    return AnyValue(string_value=given)


def pairs(given: dict[str, Any]) -> list[KeyValue]:
    return [KeyValue(key=key, value=value(each)) for key, each in given.items()]


def span(
    number: int,
    name: str,
    begin: float,
    end: float,
    *,
    parent: int = 0,
    trace_id: int = 1,
    service: str = "router",
    kind: Any = Span.SPAN_KIND_INTERNAL,
    error: str = "",
    events: Sequence[Span.Event] = (),
    links: Sequence[int] = (),
    **attributes: Any,
) -> KeptSpan:
    """Milliseconds from ``START``; attributes by their constant's name."""
    found = {getattr(names, key, key): each for key, each in attributes.items()}
    if error:
        found["error.type"] = error
    made = Span(
        trace_id=trace_id.to_bytes(16, "big"),
        span_id=number.to_bytes(8, "big"),
        parent_span_id=parent.to_bytes(8, "big") if parent else b"",
        name=name,
        kind=kind,
        start_time_unix_nano=START + round(begin * MS),
        end_time_unix_nano=START + round(end * MS),
        attributes=pairs(found),
        events=events,
        links=[Span.Link(trace_id=link.to_bytes(16, "big")) for link in links],
        status=Status(code=Status.STATUS_CODE_ERROR if error else Status.STATUS_CODE_UNSET),
    )
    return KeptSpan(Resource(attributes=pairs({"service.name": service, "service.instance.id": f"{service}-1"})), made)


def round_at(ms: float, tokens: int, proposed: int, accepted: int) -> Span.Event:
    values: dict[str, Any] = {names.ROUND_TOKENS: tokens, names.ROUND_DRAFTED: proposed, names.ROUND_ACCEPTED: accepted}
    values |= {names.ROUND_BATCH: 2, names.ROUND_TIME: 0.004 * tokens, names.ROUND_COMMIT: 0.001}
    return Span.Event(time_unix_nano=START + round(ms * MS), name=names.ROUND, attributes=pairs(values))


ROUNDS = [round_at(20, 1, 0, 0), round_at(40, 3, 4, 2)]
KEPT = [
    span(1, "text_completion demo", 0, 100, kind=SERVER, REQUEST_ID="r1", OPERATION="text_completion",
         FINISH_REASONS=["length"], INPUT_TOKENS=6, OUTPUT_TOKENS=4, TIME_TO_FIRST_CHUNK=0.02),
    span(2, "tokenizer/Encode", 1, 5, parent=1, kind=CLIENT),
    span(3, "tokenizer/Encode", 2, 3, parent=2, kind=SERVER, service="tokenizer"),
    span(4, "answer", 10, 99, parent=1, service="target", events=ROUNDS, RECEIPT="ab" * 32),
    span(5, "prefill", 10, 30, parent=4, service="target"),
    span(6, "kv/Lookup", 12, 13, parent=5, service="target", kind=CLIENT, error="NO_RESPONDERS"),
    span(7, "audit", 5000, 5100, parent=1, service="auditor", VERDICT="pass", VERDICT_INDEX=0),
    span(8, "RouterService/Cancel", 90, 95, trace_id=2, kind=SERVER, links=[1], REQUEST_ID="r1"),
    span(9, "text_completion demo", 0, 50, trace_id=3, kind=SERVER, REQUEST_ID="r2", OPERATION="text_completion"),
]  # fmt: skip


def found(kept: Sequence[KeptSpan] = KEPT, wanted: str = "r1") -> RequestTrace:
    trace = trace_of(kept, wanted)
    assert trace is not None
    return trace


def printed(trace: RequestTrace, width: int = 120, *, terminal: bool = True) -> list[str]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, color_system=None, width=width)
    show(console, *waterfall(trace, room(console)))
    return out.getvalue().splitlines()


def line(lines: Sequence[str], word: str) -> str:
    return next(each for each in lines if word in each)


def test_a_request_has_one_tree_what_came_afterwards_and_its_other_traces() -> None:
    trace = found()
    assert [node.name for root in trace.roots for node in root.walk()] == [
        "text_completion demo", "tokenizer/Encode", "tokenizer/Encode", "answer", "prefill", "kv/Lookup"
    ]  # fmt: skip
    assert [node.name for node in trace.later] == ["audit"]
    assert [node.name for node in trace.linked] == ["RouterService/Cancel"]
    assert found(wanted=trace.trace_id).roots == trace.roots
    assert trace_of(KEPT, "r3") is None


def test_spans_of_any_order_and_twice_give_the_same_tree() -> None:
    assert found(KEPT[::-1]).roots == found([*KEPT, *KEPT]).roots == found().roots


def test_spans_whose_parent_is_lost_stay_and_a_circle_ends() -> None:
    orphans = found([each for each in KEPT if each.span.name != "answer"])
    assert [root.name for root in orphans.roots] == ["text_completion demo", "prefill"]
    circle = [span(1, "a", 0, 1, parent=2, REQUEST_ID="r"), span(2, "b", 0, 1, parent=1)]
    assert [node.name for root in found(circle, "r").roots for node in root.walk()] == ["a", "b"]
    assert [root.name for root in found([*circle, span(3, "c", 0, 1, parent=3)], "r").roots] == ["c"]
    assert printed(found([KEPT[6]], found().trace_id)), "the audit alone is kept"


def test_rounds_are_summed_up() -> None:
    total = rounds(found().roots[0].children[1])
    assert total is not None
    assert (total.count, total.tokens, total.proposed, total.accepted, total.batch) == (2, 4, 4, 2, 2.0)
    assert total.pass_mean_s == pytest.approx(0.008)
    assert (total.pass_max_s, total.commit_max_s) == (0.012, 0.001)
    assert rounds(found().roots[0]) is None


def test_the_waterfall_tells_when_and_for_how_long() -> None:
    lines = printed(found())
    assert lines[0].startswith("r1  ")
    assert lines[0].endswith(", 4 tokens of a prompt of 6, the first after 20.0 ms, ended by length")
    assert f"receipt {'ab' * 32}" in lines
    root, answer, prefill = (line(lines, each) for each in ("text_completion", "answer", "prefill"))
    assert root.rstrip().endswith("100 ms")
    assert root.count("━") > answer.count("━") > prefill.count("━") > 0
    assert answer.index("━") > root.index("━")
    assert "2 rounds: 4 tokens, 2.0 each; batch 2.0" in "\n".join(lines)
    assert "accepted 2 of 4 proposed (50 %)" in "\n".join(lines)
    assert "failed: NO_RESPONDERS" in "\n".join(lines)
    assert line(lines, "audit") == "audit  auditor-1  after 5.00 s, took 100 ms; verdict pass, entry 0 of the log"
    assert "after 90.0 ms, took 5.00 ms" in line(lines, "Cancel")


def test_a_call_and_its_answer_are_one_line() -> None:
    (encode,) = [each for each in printed(found()) if "Encode" in each]
    assert "tokenizer-1" in encode
    assert encode.endswith("4.00 ms  1.00 ms there")


@pytest.mark.parametrize("width", [10, 24, 40, 56, 60, 96, 100, 160])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    deep = [span(1, "root", 0, 9, REQUEST_ID="r1"), *(span(n, "中" * 30, 0, n / 9, parent=n - 1) for n in range(2, 40))]
    for one in (found(), found(deep)):
        assert max(map(cell_len, printed(one, width))) <= width


def test_a_narrow_terminal_has_no_bars_and_a_middling_one_no_instances() -> None:
    shown = ["\n".join(printed(found(), width)) for width in (40, 80, 120)]
    assert [("━" in text, "tokenizer-1" in text) for text in shown] == [(False, False), (True, False), (True, True)]


def test_hostile_names_and_attributes_are_harmless() -> None:
    event = Span.Event(name=HOSTILE, attributes=pairs({HOSTILE: HOSTILE}))
    about: dict[str, Any] = {"REQUEST_ID": HOSTILE, "FINISH_REASONS": [HOSTILE], "RECEIPT": HOSTILE, "VERDICT": HOSTILE}
    evil = span(1, HOSTILE, 0, 1, service=HOSTILE, error=HOSTILE, events=[event], **about)
    for width in (40, 120):
        assert all(each.isprintable() for each in printed(found([evil], HOSTILE), width))


def test_a_bar_is_never_nothing_and_never_beyond_its_room() -> None:
    assert bar(0, 1, 4) == "━━━━"
    assert bar(0.5, 1, 4) == "  ━━"
    assert bar(0.125, 0.375, 4) == "╺╸  "
    assert [len(bar(begin, end, 4)) for begin, end in ((-1, 9), (5, 9), (0, 0), (1, 1))] == [4] * 4
    assert all(bar(begin, end, 4).strip() for begin, end in ((-1, 9), (5, 9), (0, 0), (1, 1)))


def test_the_object_has_every_span_with_times_from_the_begin() -> None:
    told = json.loads(json.dumps(facts(found())))
    assert (told["request_id"], told["duration_ms"], len(told["spans"])) == ("r1", 100.0, 6)
    answer = told["spans"][3]
    assert (answer["name"], answer["start_ms"], answer["duration_ms"]) == ("answer", 10.0, 89.0)
    assert (answer["rounds"]["tokens"], answer["events"]) == (4, [])
    assert told["spans"][5]["error"] == "NO_RESPONDERS"
    assert [each["name"] for each in told["later"]] == ["audit"]


def test_a_folder_without_spans_and_a_request_that_nobody_knows_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition) as nothing:
        trace("r1", tmp_path)
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "router-1.otlp").write_bytes(b"")
    with pytest.raises(NotFound) as unknown:
        trace("r1", tmp_path)
    assert (nothing.value.reason, unknown.value.reason) == ("NOTHING_KEPT", "NO_TRACE")
