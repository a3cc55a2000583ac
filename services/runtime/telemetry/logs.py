"""Log records on stderr: for people on a terminal, else a JSON object a line (see ``lines``).

All code logs by the standard ``logging``: a constant message, and what varies in ``extra``. structlog makes the line,
with the process, the request that is worked for (``context``) and the current span. Other libraries speak from warnings
on, whatever the level: what they say of their work at lower levels may hold what was asked and answered.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any, TextIO

from structlog.stdlib import ProcessorFormatter
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import EventDict

from countersign.services.runtime.telemetry.context import current_request, current_span
from countersign.services.runtime.telemetry.lines import text_of, to_human, to_json
from countersign.services.runtime.telemetry.traceparent import ids, traceparent

_OURS = "countersign"
_MAX_FRAMES = 30
# What every record has; the rest came by ``extra``.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
# Without local variables: they hold prompts and tokens.
_describe = ExceptionDictTransformer(show_locals=False, max_frames=_MAX_FRAMES, use_rich=False)


def configure(service: str, *, instance: str = "", level: str = "info", style: str = "auto") -> None:
    """Send the process's log records to stderr, in place of what was set before.

    Args:
        service: such as ``kv``.
        instance: such as ``kv-1f2e3d4c``, once there is one.
        level: the lowest that is told: debug, info, warning, error.
        style: human, json, or auto: human where stderr is a terminal.
    """
    handler = make_handler(sys.stderr, service, instance=instance, style=style)
    logging.basicConfig(level=max(logging.WARNING, _number(level)), handlers=[handler], force=True)
    logging.getLogger(_OURS).setLevel(_number(level))


def make_handler(
    stream: TextIO, service: str, *, instance: str = "", style: str = "auto"
) -> logging.StreamHandler[TextIO]:
    """What writes records to ``stream``, each as one line or, for people, with the traceback below it."""
    terminal = stream.isatty()
    human = style == "human" or (style == "auto" and terminal)
    render = partial(to_human, colour=terminal and "NO_COLOR" not in os.environ) if human else to_json
    handler = _Handler(stream)
    gather = partial(_gather, service, instance)
    handler.setFormatter(ProcessorFormatter(processors=[gather, lambda _, __, fields: render(fields)]))
    return handler


class _Handler(logging.StreamHandler[TextIO]):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  its base's name
        """A record that makes no line: say where it was logged. Whoever logs must never fail for it."""
        about = {"place": f"{record.pathname}:{record.lineno}", "error": text_of(sys.exc_info()[1])}
        wrong = {"name": record.name, "levelno": logging.ERROR, "levelname": "ERROR", "msg": "a log call is wrong"}
        with suppress(Exception):  # a stream that is full or closed: then there is nobody to tell
            self.stream.write(self.format(logging.makeLogRecord(wrong | about)) + self.terminator)
            self.flush()


def _gather(service: str, instance: str, _: object, __: str, event: EventDict) -> EventDict:
    """A processor of structlog: all that is known of a record, in the order in which it is read."""
    record: logging.LogRecord = event["_record"]
    time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    fields: dict[str, object] = {"time": time, "level": record.levelname.lower(), "service": service}
    if instance:
        fields["instance"] = instance
    fields["message"] = text_of(event["event"])
    if request_id := current_request():
        fields["request_id"] = request_id
    if span := traceparent(current_span()):
        fields["trace_id"], fields["span_id"] = ids(span)
    for key, value in vars(record).items():
        if key not in _STANDARD and not key.startswith("_"):
            # The request that a call names is the one that is meant; nothing else is overwritten.
            fields[key if key not in fields or key == "request_id" else f"{key}_"] = value
    if exc_info := event.get("exc_info"):
        fields["exception"] = _clipped(_describe(exc_info))
    return fields


def _clipped(exceptions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """As structlog tells them, without what is empty, long texts cut; groups hold more of them."""
    clipped = []
    for exception in exceptions:
        one = {key: value for key, value in exception.items() if value}
        one["exc_value"] = text_of(exception["exc_value"])
        if group := one.get("exceptions"):
            one["exceptions"] = [_clipped(each) for each in group]
        clipped.append(one)
    return clipped


def _number(level: str) -> int:
    return int(logging.getLevelNamesMapping()[level.upper()])
