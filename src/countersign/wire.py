"""Arguments on their way to the wire: a value that a field cannot carry is refused by the argument's name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from operator import index
from typing import TypeVar

from countersign.services.runtime.errors import InvalidArgument

_K = TypeVar("_K")
_V = TypeVar("_V")


def text(name: str, value: str) -> str:
    """Raises InvalidArgument(BAD_UTF8): a lone surrogate, which is what undecodable bytes become in Python."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument(
            f"{name} is not valid UTF-8: character {error.start} is the lone surrogate U+{ord(value[error.start]):04X}",
            reason="BAD_UTF8",
            help="give text that is valid UTF-8",
            argument=name,
        ) from None
    return value


def unsigned(name: str, value: int, bits: int) -> int:
    """Raises InvalidArgument(OUT_OF_RANGE); TypeError for what is no integer."""
    if not 0 <= index(value) < 2**bits:
        raise InvalidArgument(
            f"{name} is {value}",
            reason="OUT_OF_RANGE",
            help=f"use an integer from 0 to {2**bits - 1}",
            argument=name,
        )
    return value


def milliseconds(name: str, seconds: float) -> int:
    """Rounded up, at least 1, since 0 means something else there. Raises InvalidArgument(OUT_OF_RANGE)."""
    largest = (2**32 - 1) / 1000
    if not 0 < seconds <= largest:  # NaN too
        raise InvalidArgument(
            f"{name} is {seconds}",
            reason="OUT_OF_RANGE",
            help=f"use a number of seconds above 0, at most {largest:.0f}",
            argument=name,
        )
    return math.ceil(seconds * 1000)


def one_of(name: str, value: _K, known: Mapping[_K, _V]) -> _V:
    """Raises InvalidArgument(UNKNOWN_CHOICE)."""
    if value not in known:
        raise InvalidArgument(
            f"{name} is {value!r}",
            reason="UNKNOWN_CHOICE",
            help="use one of: " + ", ".join(map(repr, known)),
            argument=name,
        )
    return known[value]
