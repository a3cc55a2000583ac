"""The output tokens of a log, as a persistent sequence."""

from __future__ import annotations

from collections.abc import Sequence


class Tokens:
    """Token ids and, for each, whether the draft had proposed it, and the fingerprint of the state that it was sampled
    from, if all have one of the same size. Never changes: ``extended`` gives a new one.

    All versions of one log share one buffer and differ in how much of it they see, so that a log of n tokens costs O(n)
    and not O(n^2). Extending an older version once more copies it. Not safe across threads.
    """

    __slots__ = ("_ids", "_length", "_print_size", "_prints", "_proposed")

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._proposed = bytearray()
        self._prints = bytearray()
        self._print_size = 0
        self._length = 0

    def extended(self, token_ids: Sequence[int], accepted: int, fingerprints: bytes = b"") -> Tokens:
        """These tokens and ``token_ids`` after them, the first ``accepted`` of which the draft had proposed.

        ``fingerprints``: of the new tokens one after another; their size is the same for each.
        """
        longer = Tokens()
        longer._ids, longer._proposed, longer._prints = self._ids, self._proposed, self._prints
        if len(self._ids) != self._length:
            longer._ids, longer._proposed = self._ids[: self._length], self._proposed[: self._length]
            longer._prints = self._prints[: self._length * self._print_size]
        size = len(fingerprints) // len(token_ids) if token_ids else 0
        longer._print_size = size if not self._length or size == self._print_size else 0
        if longer._print_size:
            longer._prints.extend(fingerprints)
        longer._ids.extend(token_ids)
        longer._proposed.extend(b"\1" * accepted + b"\0" * (len(token_ids) - accepted))
        longer._length = self._length + len(token_ids)
        return longer

    def ids(self, start: int = 0) -> tuple[int, ...]:
        """Token ids from position ``start`` on."""
        return tuple(self._ids[start : self._length])

    def proposed(self, start: int = 0) -> tuple[bool, ...]:
        """Whether the draft had proposed each token from position ``start`` on."""
        return tuple(map(bool, self._proposed[start : self._length]))

    def fingerprints(self) -> tuple[bytes, ...]:
        """Of each token; none at all where one has none, or one of another size."""
        size = self._print_size
        return tuple(bytes(self._prints[i * size : (i + 1) * size]) for i in range(self._length if size else 0))

    def __len__(self) -> int:
        return self._length

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tokens):
            return NotImplemented
        return self._all() == other._all()

    def __hash__(self) -> int:
        return hash(self._all())

    def _all(self) -> tuple[object, ...]:
        return self.ids(), self.proposed(), self.fingerprints()

    def __repr__(self) -> str:
        return f"Tokens({list(self.ids())})"
