"""From committed tokens to what a client reads. Pure: the pieces of text come from the tokenizer service."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from countersign.services.engine.text import StopMatcher
from countersign.v1.router_pb2 import Hidden, Token, Tokens, TokenSource
from countersign.verify.segments import Segmenter

CONTEXT_TOKENS = 8


@dataclass(slots=True)
class _Waiting:
    token: Token
    owed: int
    hidden: bool


@dataclass(slots=True)
class Answer:
    """Committed tokens in, tokens with their final text out.

    A token goes out once its text is settled: no character is open in it and no stop string can begin in it. So the
    joined texts are the answer, and a token at a position has the same text for whoever reads it, from any position.
    Of hidden tokens only their number goes out.
    """

    stop: tuple[str, ...] = ()
    position: int = 0
    segmenter: Segmenter = field(default_factory=lambda: Segmenter(None))
    undecoded: list[int] = field(default_factory=list)
    context: list[int] = field(default_factory=list)
    _sources: deque[TokenSource.ValueType] = field(default_factory=deque)
    _waiting: deque[_Waiting] = field(default_factory=deque)
    _matcher: StopMatcher = field(init=False)
    _sent: int = 0

    def __post_init__(self) -> None:
        self._matcher = StopMatcher(self.stop)

    def prompt(self, token_ids: Sequence[int]) -> None:
        """The tokens before the answer, for the text of its first ones."""
        self.context = list(token_ids[-CONTEXT_TOKENS:])

    def committed(self, token_ids: Iterable[int], accepted: int) -> None:
        """More tokens; the first ``accepted`` of them had been proposed by the draft."""
        for index, token in enumerate(token_ids):
            drafted = index < accepted
            self._sources.append(TokenSource.TOKEN_SOURCE_DRAFT if drafted else TokenSource.TOKEN_SOURCE_TARGET)
            self.undecoded.append(token)

    def decoded(self, pieces: Sequence[str], *, final: bool = False) -> list[Tokens | Hidden]:
        """Take the pieces of the first of ``undecoded``; the tokens that may go out now, hidden ones apart.

        ``final``: nothing follows, whatever is held goes out.
        """
        released = "".join(map(self._feed, pieces))
        if final and not self._matcher.stopped:
            released += self._matcher.flush()
        settled = final or self._matcher.stopped
        waited = self._release(released, settled)
        start, self._sent = self._sent, self._sent + len(waited)
        return _runs(max(start, self.position), waited[max(0, self.position - start) :])

    def _feed(self, piece: str) -> str:
        token = self.undecoded.pop(0)
        self.context = [*self.context, token][-CONTEXT_TOKENS:]
        fresh = Token(id=token, source=self._sources.popleft())
        self._waiting.append(_Waiting(fresh, len(piece), self.segmenter.feed(token)))
        return self._matcher.feed(piece).text

    def _release(self, text: str, settled: bool) -> list[_Waiting]:
        """Hand the released text to the waiting tokens in order; once settled, all of them go out."""
        out = []
        while self._waiting:
            first = self._waiting[0]
            taken, text = text[: first.owed], text[first.owed :]
            first.token.text += taken
            first.owed -= len(taken)
            if first.owed and not settled:
                break
            out.append(self._waiting.popleft())
        return out


def _runs(position: int, waited: Iterable[_Waiting]) -> list[Tokens | Hidden]:
    out: list[Tokens | Hidden] = []
    for hidden, run in groupby(waited, key=lambda one: one.hidden):
        tokens = [one.token for one in run]
        if hidden:
            out.append(Hidden(position=position, tokens=len(tokens)))
        else:
            out.append(Tokens(position=position, tokens=tokens))
        position += len(tokens)
    return out
