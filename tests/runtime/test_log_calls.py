"""Every call of a logger in what ships: one message that never varies, what varies in fields of names that are free."""

from __future__ import annotations

import ast
import logging
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(
    file for folder in ("services", "verify", "src/countersign/batch") for file in (ROOT / folder).rglob("*.py")
)
METHODS = {"debug", "info", "warning", "error", "exception", "critical", "log"}
LOGGERS = {"_log", "log", "_logger"}
# A record has these of its own: logging raises KeyError for them, or they would be told under another name.
TAKEN = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}
TAKEN |= {"time", "level", "service", "instance", "trace_id", "span_id", "exception"}
# Never in a log line, under any name.
CONTENT = {"prompt", "text", "token_ids", "tokens_text", "stop", "answer", "output"}


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Attribute) and function.attr in METHODS:
            owner = function.value
            name = owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
            if name in LOGGERS:
                yield node


def keys(node: ast.expr, names: dict[str, list[ast.expr]]) -> Iterator[str]:
    """Of a dict literal, of those that a name was given anywhere in the file, of both sides of ``|``."""
    if isinstance(node, ast.Dict):
        for key in node.keys:
            assert isinstance(key, ast.Constant), "keys that nobody can search for"
            yield str(key.value)
    elif isinstance(node, ast.Name):
        for value in names[node.id]:
            yield from keys(value, names)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        yield from keys(node.left, names)
        yield from keys(node.right, names)
    else:
        pytest.fail(f"extra is {ast.unparse(node)}")


def faults(source: str) -> list[str]:
    """What is wrong with the log calls of a file, each with its line."""
    tree, found = ast.parse(source), []
    names: dict[str, list[ast.expr]] = defaultdict(list)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            names[node.targets[0].id].append(node.value)
    for call in calls(tree):
        message, *others = (
            call.args[1:] if isinstance(call.func, ast.Attribute) and call.func.attr == "log" else call.args
        )
        extra = next((keyword.value for keyword in call.keywords if keyword.arg == "extra"), ast.Dict([], []))
        text = message.value if isinstance(message, ast.Constant) and isinstance(message.value, str) else None
        wrong = set(keys(extra, names)) & (TAKEN | CONTENT)
        if text is None or others or set(text) & set("%={"):
            found.append(f"{call.lineno}: a message that varies: {ast.unparse(call)}")
        if wrong:
            found.append(f"{call.lineno}: fields of names that are not free: {sorted(wrong)}")
    return found


def test_a_message_never_varies_and_its_fields_have_free_names() -> None:
    assert {str(file.relative_to(ROOT)): wrong for file in FILES if (wrong := faults(file.read_text()))} == {}


def test_a_wrong_call_is_found() -> None:
    for call in (
        '_log.info("a %s", 1)',
        '_log.info(f"a {b}")',
        'self._log.info("a request=1")',
        'context.log.info("a", extra={"message": 1})',
        'self._logger.info("a", extra={"prompt": 1})',
        'about = {"b": 1}\n_log.info("a", extra=about | {"trace_id": 2})',
    ):
        assert len(faults(call)) == 1, call
    assert sum(len(list(calls(ast.parse(file.read_text())))) for file in FILES) > 70
