"""Changes to bytes that a parser has to survive: blind ones, and ones that know CBOR."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import cbor2

_BOUNDARIES = (
    0,
    1,
    23,
    24,
    255,
    256,
    65_535,
    65_536,
    2**31,
    2**32 - 1,
    2**32,
    2**63 - 1,
    2**63,
    2**64 - 1,
    -1,
    -(2**63),
)
_ODD: tuple[Any, ...] = (
    *_BOUNDARIES, None, True, False, "", b"", "\x00\x1b[2J", "é\u2028", b"\xff" * 32, b"\x00" * 33, [], {}, [[[[[]]]]],
    float("nan"), float("inf"), -0.0, 1e-310, 1.5, 10**40, {0: 0}, {"v": 1},
)  # fmt: skip


def mutated(data: bytes, draw: random.Random, corpus: Sequence[bytes], limit: int) -> bytes:
    """A few changes to ``data``, of at most ``limit`` bytes; ``corpus`` lends parts."""
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        data = draw.choice(_CHANGES)(data, draw, corpus)[:limit]
    return data


def _flip(data: bytes, draw: random.Random, _: Sequence[bytes]) -> bytes:
    if not data:
        return b"\x00"
    changed = bytearray(data)
    changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _byte(data: bytes, draw: random.Random, _: Sequence[bytes]) -> bytes:
    position = draw.randrange(len(data) + 1)
    odd = bytes([draw.choice((0, 0x1B, 0x3B, 0x5B, 0x7F, 0x9B, 0xBB, 0xD2, 0xF6, 0xFB, 0xFF, draw.randrange(256)))])
    return data[:position] + odd + data[position + draw.randrange(2) :]


def _cut(data: bytes, draw: random.Random, _: Sequence[bytes]) -> bytes:
    begin, end = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    return data[:begin] + data[end:]


def _repeat(data: bytes, draw: random.Random, _: Sequence[bytes]) -> bytes:
    begin, end = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    return data[:end] + data[begin:end] * draw.choice((1, 2, 50)) + data[end:]


def _splice(data: bytes, draw: random.Random, corpus: Sequence[bytes]) -> bytes:
    other = draw.choice(corpus)
    begin, end = sorted(draw.randrange(len(other) + 1) for _ in range(2))
    position = draw.randrange(len(data) + 1)
    return data[:position] + other[begin:end] + data[position + draw.randrange(2) * (end - begin) :]


def _integer(data: bytes, draw: random.Random, _: Sequence[bytes]) -> bytes:
    size = draw.choice((1, 2, 4, 8))
    value = draw.choice(_BOUNDARIES) % (1 << 8 * size)
    position = draw.randrange(len(data) + 1)
    return data[:position] + value.to_bytes(size, "big") + data[position + size :]


def _tree(data: bytes, draw: random.Random, corpus: Sequence[bytes]) -> bytes:
    """One node of the CBOR is another value, or one of another input's; bytes that hold CBOR are opened too."""
    try:
        value = cbor2.loads(data)
        lent = cbor2.loads(draw.choice(corpus))
        return cbor2.dumps(_with_another_node(value, draw, lent), canonical=draw.random() < 0.8)
    except Exception:  # noqa: BLE001  not CBOR, or not any more: the blind changes are for that
        return _flip(data, draw, corpus)


def _with_another_node(value: Any, draw: random.Random, lent: Any) -> Any:
    """``value`` with one of its nodes changed, on the way down with a chance of a third each level."""
    if isinstance(value, cbor2.CBORTag):
        return cbor2.CBORTag(value.tag, _with_another_node(value.value, draw, lent))
    deeper = draw.random() < 0.7
    if deeper and isinstance(value, list) and value:
        place = draw.randrange(len(value))
        return [*value[:place], _with_another_node(value[place], draw, lent), *value[place + 1 :]]
    if deeper and isinstance(value, dict) and value:
        key = draw.choice(list(value))
        changed = {**value, key: _with_another_node(value[key], draw, lent)}
        match draw.randrange(8):
            case 0:
                del changed[key]
            case 1:
                changed[draw.choice((0, 4, "more", -70600, 394))] = draw.choice(_ODD)
        return changed
    if deeper and isinstance(value, bytes):
        inside = cbor2.loads(value)
        return cbor2.dumps(_with_another_node(inside, draw, lent), canonical=True)
    if draw.random() < 0.3:
        return lent.value if isinstance(lent, cbor2.CBORTag) else lent
    if isinstance(value, int) and draw.random() < 0.5:
        return value + draw.choice((-1, 1))
    return draw.choice(_ODD)


_CHANGES = (_flip, _byte, _cut, _repeat, _splice, _integer, _tree, _tree, _tree)
