"""A log record as a line: of JSON, or for people.

    {"time": "2026-11-21T16:04:05.678Z", "level": "info", "service": "kv", "instance": "kv-1f2e3d4c",
     "message": "blocks from disk", "request_id": "r1", "trace_id": "...", "span_id": "...", "blocks": 3}
    2026-11-21T16:04:05.678Z INFO kv blocks from disk request_id=r1 blocks=3

An exception is a list in JSON, it and then what it came from: ``[{"exc_type", "exc_value", "frames": [...]}, ...]``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

# Of one value, in characters.
MOST = 2000

Fields = Mapping[str, object]

# What a line for people says before the fields; the rest it leaves to JSON.
_HEAD = ("time", "level", "service", "message")
_LEFT_OUT = frozenset({*_HEAD, "instance", "span_id", "exception"})
_STYLES = {"warning": "\x1b[33m", "error": "\x1b[31m", "critical": "\x1b[31m", "debug": "\x1b[2m"}
_PLAIN = "\x1b[0m"


def to_json(fields: Fields) -> str:
    """One line of ASCII, whatever the values are."""
    values = {key: value if key == "exception" else _json_value(value) for key, value in fields.items()}
    return json.dumps(values, default=text_of).replace("\x7f", "\\u007f")


def to_human(fields: Fields, *, colour: bool = False) -> str:
    """One line, and the traceback below it if there is one. Values with spaces, quotes or line ends are quoted."""
    level = str(fields.get("level", ""))
    name = level.upper()
    if colour and level in _STYLES:
        name = f"{_STYLES[level]}{name}{_PLAIN}"
    head = [_line(fields.get("time", "")), name, _line(fields.get("service", "")), _line(fields.get("message", ""))]
    rest = [f"{_line(key)}={_quoted(value)}" for key, value in fields.items() if key not in _LEFT_OUT]
    return "\n".join([" ".join(part for part in (*head, *rest) if part), *_traceback(fields.get("exception"))])


def readable(line: str) -> str:
    """A line of a log file for people: of a JSON record its human form, and all others as they are."""
    fields = parsed(line)
    return line if fields is None else to_human(fields)


def parsed(line: str) -> dict[str, object] | None:
    """The record that a line holds; None when it holds none."""
    if not line.startswith('{"'):
        return None
    try:
        fields = json.loads(line)
    except ValueError:
        return None
    return fields if isinstance(fields, dict) and "message" in fields else None


def text_of(value: object) -> str:
    """The value's text, clipped; a value that cannot even be shown is named by its type."""
    try:
        text = str(value)
    except Exception:  # noqa: BLE001  a log line must not end what it tells of
        return f"<{type(value).__name__}>"
    return text if len(text) <= MOST else f"{text[: MOST - 1]}…"


def _json_value(value: object) -> object:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    return text_of(value)


def _quoted(value: object) -> str:
    text = text_of(value)
    plain = text.isprintable() and text and not set(text) & set(" \"='")
    return text if plain else _escaped(text)


def _line(value: object) -> str:
    text = text_of(value)
    return text if text.isprintable() else _escaped(text)[1:-1]


def _escaped(text: str) -> str:
    """In quotes; what cannot be printed, and then all beyond ASCII, by its number."""
    return json.dumps(text, ensure_ascii=not text.isprintable()).replace("\x7f", "\\u007f")


def _traceback(exception: object, indent: str = "  ") -> list[str]:
    """As Python tells it: what came first first."""
    if not isinstance(exception, list):
        return []
    lines: list[str] = []
    for one in reversed(_dicts(exception)):
        for frame in _dicts(one.get("frames")):
            place = f"{_line(frame.get('filename'))}:{_line(frame.get('lineno'))}"
            lines.append(f"{indent}  {place} in {_line(frame.get('name'))}")
        lines.append(f"{indent}{_line(one.get('exc_type'))}: {_line(one.get('exc_value'))}")
        group = one.get("exceptions")
        for each in group if isinstance(group, list) else ():
            lines += _traceback(each, f"{indent}  | ")
    return lines


def _dicts(value: object) -> list[dict[str, object]]:
    """Those of a list; a line of a log file may hold anything."""
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []
