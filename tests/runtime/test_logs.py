"""Log records as lines: for people and as JSON, whatever they hold, and what each of them knows of its process."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.trace import NonRecordingSpan, SpanContext

from countersign.services.runtime.telemetry import lines
from countersign.services.runtime.telemetry.context import (
    bind_request,
    current_request,
    request_context,
    request_of,
    span_context,
)
from countersign.services.runtime.telemetry.logs import make_handler
from countersign.v1.kv_pb2 import LookupRequest
from countersign.v1.target_pb2 import StartRequest

HOSTILE = "two\nlines\r\x1b[31m\u2028\x9b2J \ud800\x00"
WORDS = ("exc_type", "exc_value", "frames", "exceptions", "filename", "lineno", "name", "message", "exception")
CONTEXT = SpanContext(trace_id=0xABC, span_id=0xDEF, is_remote=False)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


Log = Callable[..., tuple[logging.Logger, io.StringIO]]


@pytest.fixture
def log(request: pytest.FixtureRequest) -> Iterator[Log]:
    """A logger of its own, and what it writes."""
    logger = logging.Logger(request.node.name)  # noqa: LOG001  not of the tree, so that no test changes it

    def make(style: str = "auto", stream: io.StringIO | None = None) -> tuple[logging.Logger, io.StringIO]:
        stream = stream or io.StringIO()
        logger.handlers = [make_handler(stream, "kv", instance="kv-1", style=style)]
        return logger, stream

    yield make
    logger.handlers = []


def only(stream: io.StringIO) -> dict[str, Any]:
    """The one JSON line that was written."""
    (line,) = stream.getvalue().splitlines()
    found = json.loads(line)
    assert isinstance(found, dict)
    return found


def test_a_record_of_json_tells_time_level_process_message_and_fields(log: Log) -> None:
    logger, stream = log()
    logger.info("ready", extra={"address": "127.0.0.1:1", "blocks": 3, "share": 0.5, "on": True, "none": None})
    found = only(stream)
    assert found.pop("time").endswith("Z")
    assert found == {
        "level": "info",
        "service": "kv",
        "instance": "kv-1",
        "message": "ready",
        "address": "127.0.0.1:1",
        "blocks": 3,
        "share": 0.5,
        "on": True,
        "none": None,
    }


def test_a_terminal_gets_a_line_for_people_unless_json_is_asked_for(log: Log) -> None:
    for style, stream, human in (
        ("auto", Terminal(), True),
        ("auto", io.StringIO(), False),
        ("human", io.StringIO(), True),
        ("json", Terminal(), False),
    ):
        logger, out = log(style, stream)
        logger.info("ready", extra={"blocks": 3})
        assert out.getvalue().endswith(" INFO kv ready blocks=3\n") is human, (style, out.getvalue())
        assert out.getvalue().startswith("{") is not human


def test_levels_are_coloured_on_a_terminal_only_and_not_with_no_color(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for style, stream, coloured in (("human", Terminal(), True), ("human", io.StringIO(), False)):
        logger, out = log(style, stream)
        logger.warning("full")
        assert ("\x1b[33mWARNING\x1b[0m" in out.getvalue()) is coloured
    monkeypatch.setenv("NO_COLOR", "1")
    logger, out = log("human", Terminal())
    logger.warning("full")
    assert "\x1b" not in out.getvalue()


def test_a_record_names_the_request_and_the_span_that_it_was_made_in(log: Log) -> None:
    logger, stream = log()
    with request_context("r1"), span_context(NonRecordingSpan(CONTEXT)):
        logger.info("put")
        logger.info("put", extra={"request_id": "another"})
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert (first["request_id"], first["trace_id"], first["span_id"]) == ("r1", f"{0xABC:032x}", f"{0xDEF:016x}")
    assert second["request_id"] == "another", "what the call names is meant"
    logger.info("put")
    assert not {"request_id", "trace_id", "span_id"} & json.loads(stream.getvalue().splitlines()[-1]).keys()


def test_the_request_of_a_call_is_the_one_that_its_message_names() -> None:
    assert request_of(StartRequest(request_id="r1")) == "r1"
    assert request_of(LookupRequest()) == ""
    assert request_of(StartRequest(request_id="x" * 65)) == "", "no request has such an id"


async def test_tasks_work_for_the_request_they_were_started_for() -> None:

    async def work() -> str:
        await asyncio.sleep(0)
        return current_request()

    async def call(request_id: str) -> str:
        bind_request(request_id)
        return await asyncio.create_task(work())

    assert await asyncio.gather(*(asyncio.create_task(call(name)) for name in ("a", "b"))) == ["a", "b"]
    assert current_request() == ""


async def test_a_generator_may_be_closed_from_another_task() -> None:
    async def answers() -> AsyncGenerator[str]:
        with request_context("r1"):
            yield "first"

    running = answers()
    assert await asyncio.create_task(anext(running)) == "first"
    await asyncio.create_task(running.aclose())


def test_a_value_can_neither_end_its_line_nor_steer_a_terminal(log: Log) -> None:
    for style in ("human", "json"):
        logger, stream = log(style)
        logger.info(HOSTILE, extra={"key": HOSTILE})
        assert stream.getvalue().count("\n") == 1
        assert stream.getvalue()[:-1].isprintable()
    assert only(stream)["key"] == HOSTILE


@pytest.mark.parametrize("value", ["two words", "", 'a"b', "a=b", "line\nbreak"])
def test_a_value_that_could_be_misread_is_quoted(value: str) -> None:
    assert lines.to_human({"message": "put", "key": value}).startswith('put key="')


def test_a_long_value_is_cut(log: Log) -> None:
    logger, stream = log()
    logger.info("x" * 9999, extra={"key": "y" * 9999})
    found = only(stream)
    assert (len(found["message"]), len(found["key"])) == (lines.MOST, lines.MOST)


def test_an_exception_is_structured_without_local_variables(log: Log) -> None:
    logger, stream = log()

    def fail() -> None:
        planted = "the secret of a local variable"
        raise KeyError(len(planted))

    try:
        try:
            fail()
        except KeyError as cause:
            raise ValueError("two\nlines") from cause
    except ValueError:
        logger.exception("failed")
    outer, inner = only(stream)["exception"]
    assert (outer["exc_type"], outer["exc_value"], inner["exc_type"]) == ("ValueError", "two\nlines", "KeyError")
    assert inner["frames"][-1]["name"] == "fail"
    assert "secret" not in stream.getvalue()
    human = lines.readable(stream.getvalue().strip()).splitlines()
    assert human[0].endswith("ERROR kv failed")
    assert human[-1] == "  ValueError: two\\nlines"
    assert [line for line in human if line.endswith(" in fail")]


def test_the_exceptions_of_a_group_are_told_too(log: Log) -> None:
    for style in ("human", "json"):
        logger, stream = log(style)
        try:
            raise ExceptionGroup("tasks", [ValueError("one"), OSError("x" * 9999)])  # noqa: TRY301
        except ExceptionGroup:
            logger.exception("failed")
        assert "ValueError" in stream.getvalue()
        assert "x" * lines.MOST not in stream.getvalue()


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError


def test_a_wrong_log_call_is_told_and_never_raises(log: Log) -> None:
    for style in ("human", "json"):
        logger, stream = log(style)
        logger.info("of %d blocks", "three")
        logger.info("%d %d", 1)  # noqa: PLE1206  wrong on purpose
        logger.info("put", extra={"key": Unprintable(), "nan": float("nan"), "bytes": b"\xff", "time": "mine"})
        wrong, _, odd = stream.getvalue().splitlines()
        assert "a log call is wrong" in wrong
        assert "test_logs.py:" in wrong
        assert "<Unprintable>" in odd
        assert "nan" in odd
    record = json.loads(odd)
    assert record["time"] != "mine" == record["time_"]


def test_a_stream_that_is_gone_harms_nobody(log: Log) -> None:
    logger, stream = log()
    stream.close()
    logger.info("ready")


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS) | st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(message=st.text(st.characters()), fields=st.dictionaries(st.text(st.characters()), ANYTHING, max_size=4))
def test_whatever_a_record_holds_it_is_one_line_that_can_be_read_back(message: str, fields: dict[str, Any]) -> None:
    record = {"message": message, **fields}
    line = lines.to_json(record)
    assert line.isascii()
    assert line.isprintable()
    assert (lines.parsed(line) or {}).keys() == record.keys()
    assert lines.to_human(record | {"exception": None}).isprintable()


@given(exception=ANYTHING)
def test_a_line_of_another_program_is_no_trap(exception: Any) -> None:
    line = json.dumps({"message": "x", "exception": exception})
    assert all(each.isprintable() for each in lines.readable(line).split("\n"))


def test_what_is_no_record_is_read_as_it_is() -> None:
    for line in ("", "plain", "{", '{"a": 1}', '{"message": ', "[1]", '{"x'):
        assert lines.readable(line) == line
    record = {"time": "t", "level": "info", "service": "kv", "message": "ready", "blocks": 3}
    assert lines.readable(lines.to_json(record)) == "t INFO kv ready blocks=3"
