"""Text to token ids and back, token by token.

A token is a run of bytes and need not hold whole characters, so the text of a stream of tokens is found in two steps:
the bytes of each token, then UTF-8 decoded as it comes. A token's text is what it completes: tokens that end inside a
character give the empty string, and the token that completes the character gives all of it. Malformed bytes become one
U+FFFD for each maximal subpart (Unicode 15, section 3.9), as in the ``tokenizers`` library's own byte-level decoder.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from countersign.services.engine.errors import CheckpointError

MAX_OPEN_TOKENS = 4
"""A character has at most four bytes. One that is open for more tokens than that has tokens without bytes in it (end of
text, again and again): it is given up, so that nothing waits for it for ever."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Decoders under which the bytes of a token depend on nothing but the token and whether it is the first.
_TOKENWISE_DECODERS = frozenset({"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip", "WordPiece"})


class Tokenizer:
    """The ``tokenizer.json`` of a Hugging Face folder: byte-level BPE and Metaspace/SentencePiece families.

    Raises:
        CheckpointError: there is no ``tokenizer.json``, it is not valid, or its decoder is of another family.

    """

    def __init__(self, folder: Path) -> None:
        self._tokenizer, decoder = _load(folder / "tokenizer.json")
        # A tokenizer.json may carry the truncation of its training; a prompt must never be cut silently.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._bytes = _TokenBytes(self._tokenizer, decoder, folder / "tokenizer.json")
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocabulary_size = max(max(ids, default=-1) + 1, _padded_size(folder / "config.json"))
        """Number of token ids that a model of this folder can give, rows that only pad its matrices included."""

    def encode(self, text: str, plain: bool = False) -> list[int]:
        """The token ids of ``text``; ``plain`` leaves out the begin-of-text token and its like.

        The name of a special token in the text gives that token, as chat templates need it.

        Raises:
            TypeError: the text holds a lone surrogate.

        """
        return self._tokenizer.encode(text, add_special_tokens=not plain).ids

    def decode_pieces(self, context_ids: Sequence[int], token_ids: Sequence[int], final: bool) -> list[str]:
        """The text of ``token_ids``, one piece for each token that is consumed.

        ``context_ids`` are the tokens before them, whose text is out. The last ``MAX_OPEN_TOKENS`` + 1 are enough: all
        that counts is whether a character is open, and whether these tokens begin the text (a SentencePiece decoder
        drops the space there).

        Tokens at the end that hold an open character are not consumed: the caller sends them again with what follows.
        They are consumed all the same when ``final`` says that nothing follows (the open character becomes U+FFFD), and
        when more than ``MAX_OPEN_TOKENS`` are open. Then a character that has been open for so long is given up; and of
        a run in which every token ends one character and begins the next, only what the last one needs is kept back.
        Special tokens and ids without a token give ''. The joined pieces do not depend on the cut into calls.
        """
        stream = _PieceStream(self._bytes)
        for token_id in context_ids:
            stream.feed(token_id)
        pieces, closed = [], 0
        for token_id in token_ids:
            pieces.append(stream.feed(token_id))
            if not stream.open_tokens:
                closed = len(pieces)
        if final and pieces:
            pieces[-1] += stream.give_up()
            return pieces
        if len(pieces) - closed > MAX_OPEN_TOKENS:
            # The token that opened the character goes out; as context it brings the open bytes back.
            closed = len(pieces) - stream.open_tokens + 1
        return pieces[:closed]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a whole sequence."""
        return "".join(self.decode_pieces((), token_ids, final=True))

    def vocabulary(self) -> dict[str, int]:
        """Token ids by the tokens' own spelling, in which a space may be another character."""
        return self._tokenizer.get_vocab(with_added_tokens=False)

    def canonical(self, token_ids: Sequence[int]) -> list[int]:
        """What ``encode`` gives for their text, special tokens written out: the same ids if they are canonical."""
        text = self._tokenizer.decode(list(token_ids), skip_special_tokens=False)
        return self.encode(text, plain=True)


def _load(file: Path) -> tuple[tokenizers.Tokenizer, list[str]]:
    """The tokenizer, and the types of its decoders in order."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file.parent} has no readable tokenizer.json: {error.strerror}") from error
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{file} is not a tokenizer.json that can be read: {error}") from error
    return tokenizer, _decoder_kinds(json.loads(content).get("decoder"))


def _padded_size(config: Path) -> int:
    """Models round their vocabulary up: ids past the tokenizer's last are possible samples, without text."""
    try:
        size = json.loads(config.read_bytes()).get("vocab_size", 0)
    except (OSError, ValueError, AttributeError):
        return 0  # a tokenizer may stand alone; the model's loader is the one to complain
    return size if isinstance(size, int) else 0


class _TokenBytes:
    """The bytes that a token stands for, asked of the library once for each token."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, decoder: list[str], file: Path) -> None:
        self._byte_level = decoder == ["ByteLevel"]
        self._byte_fallback = "ByteFallback" in decoder
        if not self._byte_level and not _TOKENWISE_DECODERS.issuperset(decoder):
            known = "ByteLevel, or any of " + ", ".join(sorted(_TOKENWISE_DECODERS))
            raise CheckpointError(f"{file} has the decoder {' + '.join(decoder)}; known are {known}")
        self._tokenizer = tokenizer
        self._special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._alphabet = _byte_alphabet()
        self._anchor = None if self._byte_level else self._find_anchor(file)
        self._seen: dict[tuple[int, bool], bytes] = {}

    def is_skipped(self, token_id: int) -> bool:
        """Whether decoding passes over the id: a special token, or one without an entry in the vocabulary."""
        return token_id in self._special or self._tokenizer.id_to_token(token_id) is None

    def of(self, token_id: int, first: bool) -> bytes:
        key = (token_id, first)
        if key not in self._seen:
            self._seen[key] = self._find(token_id, first)
        return self._seen[key]

    def _find(self, token_id: int, first: bool) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token_id in self._special:
            return b""
        if self._byte_level:
            # An added token may hold characters outside the alphabet; the library then takes it as plain text.
            known = all(character in self._alphabet for character in token)
            return bytes(self._alphabet[character] for character in token) if known else token.encode()
        byte = _BYTE_TOKEN.fullmatch(token) if self._byte_fallback else None
        if byte and not (first and not self._tokenizer.decode([token_id])):
            return bytes.fromhex(byte[1])
        return self._text(token_id, first).encode()

    def _text(self, token_id: int, first: bool) -> str:
        if first or self._anchor is None:
            return self._tokenizer.decode([token_id])
        anchor = self._tokenizer.decode([self._anchor])
        return self._tokenizer.decode([self._anchor, token_id])[len(anchor) :]

    def _find_anchor(self, file: Path) -> int:
        """A token of plain letters, to stand before another: what the pair gives more than it is that other's text."""
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=False)
        for token, token_id in sorted(vocabulary.items(), key=lambda item: item[1]):
            if token.isascii() and token.isalnum() and token_id not in self._special:
                return token_id
        raise CheckpointError(f"{file} has no token of plain letters, so the text of a token cannot be told")


def _decoder_kinds(decoder: dict[str, Any] | None) -> list[str]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [kind for part in decoder["decoders"] for kind in _decoder_kinds(part)]
    return [decoder["type"]]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: printable Latin-1 stands for itself, the others follow from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


class _PieceStream:
    """UTF-8 decoding of tokens as they come; counts for how many tokens the current character has been open."""

    def __init__(self, token_bytes: _TokenBytes) -> None:
        self._bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = True
        self.open_tokens = 0

    def feed(self, token_id: int) -> str:
        text = self._utf8.decode(self._bytes.of(token_id, self._first))
        self._first = self._first and self._bytes.is_skipped(token_id)
        if not self._utf8.getstate()[0]:
            self.open_tokens = 0
        elif text:
            self.open_tokens = 1  # it ended one character and begins the next
        else:
            self.open_tokens += 1
        return self.give_up() if self.open_tokens > MAX_OPEN_TOKENS else text

    def give_up(self) -> str:
        """What is left of an open character: U+FFFD or nothing."""
        self.open_tokens = 0
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


@dataclass(frozen=True, slots=True)
class Released:
    """Text that can no longer become part of a stop string, and whether one is complete (nothing follows then)."""

    text: str
    stopped: bool


class StopMatcher:
    """Finds the stop string that is completed first and says how much text may go out before it.

    Of two that end at one place the longer counts, so the text is cut before it. What may still be the beginning of a
    stop string is held back. The result does not depend on how the text is cut into pieces.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        if "" in self._stops:
            raise ValueError("a stop string is empty")
        self._heads = frozenset(stop[0] for stop in self._stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.stopped = False

    def feed(self, piece: str) -> Released:
        """Take the text of one token. After a stop nothing more is released."""
        if self.stopped:
            return Released("", stopped=True)
        text = self._held + piece
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self._held, self.stopped = "", True
            return Released(text[: min(found)[1]], stopped=True)
        kept = self._first_open(text)
        self._held = text[kept:]
        return Released(text[:kept], stopped=False)

    def flush(self) -> str:
        """The text held back, when nothing follows."""
        held, self._held = self._held, ""
        return held

    def _first_open(self, text: str) -> int:
        """Where the longest tail that begins a stop string starts."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in self._heads and any(stop.startswith(text[start:]) for stop in self._stops):
                return start
        return len(text)
