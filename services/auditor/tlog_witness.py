"""The bytes of ``POST /add-checkpoint``, by which a log asks a witness for its cosignature (c2sp.org/tlog-witness).

old 20852014                       the size from which the proof goes on
PlRNCrwHpqhGrupue0L7gxbjbMiKA9t... the proof's hashes, base64
an empty line
example.org/log                    the signed checkpoint
...

200  a cosignature line     409  the size that the witness saw last (text/x.tlog.size), or two roots of one size
400  not such a request     403  not signed by the log     404  a log that is not followed     422  the proof is wrong
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence

from countersign.verify import merkle
from countersign.verify.errors import Malformed
from countersign.verify.log.checkpoint import MAX_NOTE_BYTES

SIZE_TYPE = "text/x.tlog.size"
MAX_HASHES = 63
MAX_REQUEST_BYTES = MAX_NOTE_BYTES + 64 + MAX_HASHES * 48

_OLD = re.compile(r"old (0|[1-9][0-9]{0,18})", re.ASCII)
_SIZE = re.compile(r"(0|[1-9][0-9]{0,18})\n", re.ASCII)


def encode_request(old: int, path: Sequence[bytes], note: bytes) -> bytes:
    """The body that asks for a cosignature."""
    lines = [f"old {old}", *(base64.b64encode(part).decode() for part in path), ""]
    return "".join(f"{line}\n" for line in lines).encode() + note


def parse_request(body: bytes) -> tuple[int, list[bytes], bytes]:
    """Size, proof and note of a body.

    Raises:
        Malformed: it is none.
    """
    head, gap, note = body.partition(b"\n\n")
    if len(body) > MAX_REQUEST_BYTES or not gap or not head.isascii():
        raise Malformed("not a request to add a checkpoint", size=len(body))
    first, *hashes = head.decode().split("\n")
    found = _OLD.fullmatch(first)
    if found is None or len(hashes) > MAX_HASHES:
        raise Malformed("a request to add a checkpoint begins with old and a size, at most 63 hashes follow")
    return int(found[1]), [_hash(line) for line in hashes], note


def parse_size(body: bytes) -> int:
    """The size in an answer 409.

    Raises:
        Malformed: there is none.
    """
    found = _SIZE.fullmatch(body[:32].decode("ascii", errors="replace"))
    if found is None:
        raise Malformed("not the size of a log", body=body[:32])
    return int(found[1])


def _hash(line: str) -> bytes:
    try:
        data = base64.b64decode(line, validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if len(data) != merkle.HASH_SIZE:
        raise Malformed("a line of the proof is not a hash in base64", line=line)
    return data
