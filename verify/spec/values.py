"""Values of TLA+ as TLC prints them, and as it reads them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from countersign.verify.spec.errors import SpecError

Value = bool | int | str | tuple["Value", ...] | frozenset["Value"] | dict["Value", "Value"]
"""A sequence is a tuple, a record or function a dict; a model value is a string as its name is."""

_TOKEN = re.compile(r'\s*("(?:[^"\\]|\\.)*"|<<|>>|\|->|:>|@@|[{}\[\](),]|-?\d+|\w+)')


def variables(text: str) -> dict[str, Value]:
    r"""A state: lines ``/\ name = value``.

    Raises:
        SpecError: it is not in TLC's notation.
    """
    state: dict[str, Value] = {}
    for part in re.split(r"^/\\ ", text, flags=re.MULTILINE)[1:]:
        name, _, value = part.partition("=")
        state[name.strip()] = parse(value)
    return state


def parse(text: str) -> Value:
    """One value.

    Raises:
        SpecError: it is not in TLC's notation.
    """
    tokens: list[str] = []
    position, text = 0, text.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise SpecError(f"no TLA+ value: {text[position : position + 40]!r}")
        tokens.append(match[1])
        position = match.end()
    tokens.reverse()
    try:
        value = _value(tokens)
    except IndexError:
        raise SpecError(f"a TLA+ value ends too early: {text[-40:]!r}") from None
    if tokens:
        raise SpecError(f"more than one TLA+ value: {text[:40]!r}")
    return value


def write(value: Value) -> str:
    """The value as TLC reads it. Keys of dicts are names of fields."""
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, Mapping):
        return "[" + ", ".join(f"{key} |-> {write(item)}" for key, item in value.items()) + "]"
    inner = ", ".join(map(write, value))
    return f"<<{inner}>>" if isinstance(value, Sequence) else "{" + inner + "}"


def _value(tokens: list[str]) -> Value:
    word = tokens.pop()
    match word:
        case "<<":
            return tuple(_items(tokens, ">>"))
        case "{":
            return frozenset(_hashable(item) for item in _items(tokens, "}"))
        case "[":
            return _pairs(tokens, "|->", ",", "]")
        case "(":
            return _pairs(tokens, ":>", "@@", ")")
        case "TRUE" | "FALSE":
            return word == "TRUE"
    if word[0] == '"':
        return word[1:-1].replace('\\"', '"').replace("\\\\", "\\")
    return int(word) if word.lstrip("-").isdigit() else word


def _items(tokens: list[str], end: str) -> list[Value]:
    items: list[Value] = []
    while tokens[-1] != end:
        items.append(_value(tokens))
        if tokens[-1] == ",":
            tokens.pop()
    tokens.pop()
    return items


def _pairs(tokens: list[str], arrow: str, separator: str, end: str) -> dict[Value, Value]:
    pairs: dict[Value, Value] = {}
    while tokens[-1] != end:
        key = _hashable(_value(tokens))
        if tokens.pop() != arrow:
            raise SpecError(f"no TLA+ value: {arrow} is missing behind {key!r}")
        pairs[key] = _value(tokens)
        if tokens[-1] == separator:
            tokens.pop()
    tokens.pop()
    return pairs


def _hashable(value: Value) -> Value:
    try:
        hash(value)
    except TypeError:
        return write(value)
    return value
