"""Looks for a secret in files, in every form in which it could have been written down."""

from __future__ import annotations

import base64
import json
import struct
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import cbor2
from ahocorasick_rs import BytesAhoCorasick

# So many token ids in a row are not there by chance, and less than that tells nothing.
RUN = 6


def forms_of_text(text: str) -> dict[str, bytes]:
    """The text's bytes as they are, escaped, and encoded; base64 in its three alignments, without their unsure ends."""
    data = text.encode()
    forms = {
        "text": data,
        "JSON": json.dumps(text)[1:-1].encode(),
        "JSON in JSON": json.dumps(json.dumps(text)[1:-1])[1:-1].encode(),
        "repr": repr(text)[1:-1].encode(),
        "URL": urllib.parse.quote(text).encode(),
        "hex": data.hex().encode(),
        "HEX": data.hex().upper().encode(),
        "UTF-16": text.encode("utf-16-le"),
    }
    for shift in range(3):
        encoded = base64.b64encode(b"\0" * shift + data)
        sure = slice(-(-8 * shift // 6), 8 * (shift + len(data)) // 6)
        forms[f"base64 at {shift}"] = encoded[sure]
        forms[f"URL-safe base64 at {shift}"] = encoded.translate(bytes.maketrans(b"+/", b"-_"))[sure]
    return forms


def forms_of_ids(ids: Sequence[int]) -> dict[str, bytes]:
    """Token ids one after the other: as text, as protobuf, CBOR and machine words have them."""
    forms = {repr(by): by.join(map(str, ids)).encode() for by in (", ", ",", " ", "\n", ";", "', '", '", "')}
    forms["protobuf"] = b"".join(map(_varint, ids))
    forms["CBOR"] = b"".join(map(cbor2.dumps, ids))
    for name, code in (("16 bits", "<H"), ("32 bits", "<I"), ("64 bits", "<Q"), ("32 bits, big end first", ">I")):
        forms[name] = b"".join(struct.pack(code, each) for each in ids)
    # What is written as bytes may be written as text in turn.
    for name in ("protobuf", "CBOR", "32 bits", "64 bits"):
        forms |= {f"{name} as {how}": form for how, form in _encoded(forms[name]).items()}
    return forms


def runs(ids: Sequence[int]) -> Iterator[Sequence[int]]:
    """Every ``RUN`` ids in a row, but those of one token over and over, which may stand for other things."""
    for begin in range(len(ids) - RUN + 1):
        run = ids[begin : begin + RUN]
        if len(set(run)) >= RUN // 2:
            yield run


class Leaks:
    """Secrets, and where they are found."""

    def __init__(self, texts: Mapping[str, str], ids: Mapping[str, Sequence[int]]) -> None:
        forms = {f"{name} as {how}": form for name, text in texts.items() for how, form in forms_of_text(text).items()}
        for name, sequence in ids.items():
            for run in runs(sequence):
                forms |= {f"ids of {name} as {how} {run}": form for how, form in forms_of_ids(run).items()}
        if not forms:
            raise ValueError("there is nothing to look for")
        self._names, self._finder = list(forms), BytesAhoCorasick(list(forms.values()))

    def within(self, data: bytes) -> list[str]:
        """What of the secrets stands in ``data``."""
        found = {index for index, _, _ in self._finder.find_matches_as_indexes(data, overlapping=True)}
        return [self._names[index] for index in sorted(found)]

    def below(self, folder: Path, exempt: Iterable[Path] = ()) -> dict[str, list[str]]:
        """By file, what of the secrets stands in it, or in its name."""
        spared = list(exempt)
        found: dict[str, list[str]] = {}
        for file in sorted(folder.rglob("*")):
            if any(file.is_relative_to(each) for each in spared) or not file.is_file():
                continue
            told = self.within(file.read_bytes()) + self.within(str(file.relative_to(folder)).encode())
            if told:
                found[str(file.relative_to(folder))] = told
        return found


def _varint(number: int) -> bytes:
    data = bytearray()
    while number > 0x7F:
        data.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*data, number])


def _encoded(data: bytes) -> dict[str, bytes]:
    found = {"hex": data.hex().encode(), "repr": repr(data)[2:-1].encode()}
    for shift in range(3):
        encoded = base64.b64encode(b"\0" * shift + data)
        found[f"base64 at {shift}"] = encoded[-(-8 * shift // 6) : 8 * (shift + len(data)) // 6]
    return found
