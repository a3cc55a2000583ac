"""Deterministic CBOR (RFC 8949 section 4.2.1), and no more of it than a receipt needs.

A general decoder makes dates, big numbers, regular expressions and cycles out of bytes. So the bytes are first walked
without building anything, and only integers, strings, arrays, maps, floats, true, false and null reach the decoder, few
and shallow. Encoding the result again must then give the same bytes: that refuses longer forms of a number, unsorted or
repeated keys, everything that two readers could read in two ways.

Two orders of map keys are in use, length first and bytewise. They agree for text, and for integers unless a short
negative one stands beside a longer one that is not negative: no map here has such keys.
"""

from __future__ import annotations

import cbor2

from countersign.verify.errors import Malformed

MAX_DEPTH = 8
MAX_ITEMS = 4096

_SIMPLE = {20, 21, 22}  # false, true, null
_FLOATS = {25, 26, 27}  # 16, 32 and 64 bits
_UNSIGNED, _NEGATIVE, _BYTES, _TEXT, _ARRAY, _MAP, _TAG, _OTHER = range(8)


def dumps(value: object) -> bytes:
    """The one encoding of a value."""
    return cbor2.dumps(value, canonical=True)


def loads(data: bytes, *, tag: int | None = None) -> object:
    """The value of ``data``, which must be one item in its one encoding.

    Args:
        data: All of the bytes.
        tag: The tag that must stand in front; the tagged value is returned. No other tag is allowed anywhere.

    Raises:
        Malformed: anything else than that.
    """
    _walk(data, tag)
    try:
        value = cbor2.loads(data)
        again = dumps(value)
    except (cbor2.CBORError, TypeError, ValueError, OverflowError) as error:
        raise Malformed("the bytes are not valid CBOR", cause=error) from error
    if again != data:
        raise Malformed("the CBOR is not in its deterministic form (RFC 8949 section 4.2.1)")
    return value.value if isinstance(value, cbor2.CBORTag) else value


def _walk(data: bytes, tag: int | None) -> None:
    """Refuses what the decoder shall not see."""
    position, items = 0, 0
    if tag is not None:
        kind, _, value, position = _head(data, 0)
        if (kind, value) != (_TAG, tag):
            raise Malformed(f"the bytes do not begin with CBOR tag {tag}")
    open_items = [1]  # for each open container, how many items it still awaits
    while open_items:
        if open_items[-1] == 0:
            open_items.pop()
            continue
        open_items[-1] -= 1
        items += 1
        kind, information, value, position = _head(data, position)
        if kind in (_BYTES, _TEXT):
            position += value
        elif kind in (_ARRAY, _MAP):
            open_items.append(value * (2 if kind == _MAP else 1))
        elif kind == _TAG or (kind == _OTHER and information not in _SIMPLE | _FLOATS):
            raise Malformed("a kind of CBOR item that receipts do not use", offset=position)
        if items > MAX_ITEMS or len(open_items) > MAX_DEPTH + 1 or position > len(data):
            raise Malformed("too many CBOR items, too deep, or cut short", items=items, depth=len(open_items) - 1)
    if position != len(data):
        raise Malformed("bytes follow after the end", extra=len(data) - position)


def _head(data: bytes, position: int) -> tuple[int, int, int, int]:
    """The head of the item at ``position``: major type, additional information, its number, and where it ends."""
    if position >= len(data):
        raise Malformed("the bytes end too early", size=len(data))
    kind, information = data[position] >> 5, data[position] & 0x1F
    position += 1
    if information < 24:
        return kind, information, information, position
    if information > 27:
        raise Malformed("CBOR of unbounded length", offset=position - 1)
    size = 1 << (information - 24)
    number = data[position : position + size]
    if len(number) < size:
        raise Malformed("the bytes end too early", size=len(data))
    return kind, information, int.from_bytes(number, "big"), position + size
