"""A service of a real stack with one deliberate bug: ``python planted.py SERVICE BUG --config FILE``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from countersign.services.protocol.events import Append
from countersign.services.protocol.writer import Writer
from countersign.services.router.answer import Answer
from countersign.services.runtime.process import main
from countersign.v1.router_pb2 import Hidden, Tokens


def commits_another_token() -> None:
    """The target appends other tokens than it has sampled (OnlyVerified)."""
    honest = Writer.extend

    def extend(writer: Writer, token_ids: Sequence[int], **more: Any) -> Append | None:
        return honest(writer, [*token_ids[:-1], token_ids[-1] ^ 1], **more)

    setattr(Writer, "extend", extend)  # noqa: B010


def skips_a_token() -> None:
    """The router loses a token between log and client (Agreement)."""
    honest = Answer.decoded

    def decoded(answer: Answer, pieces: Sequence[str], *, final: bool = False) -> list[Tokens | Hidden]:
        return [
            Tokens(position=event.position + 1, tokens=event.tokens[1:])
            if isinstance(event, Tokens) and event.position > 0 and len(event.tokens) > 1
            else event
            for event in honest(answer, pieces, final=final)
        ]

    setattr(Answer, "decoded", decoded)  # noqa: B010


BUGS: dict[str, Callable[[], None]] = {bug.__name__: bug for bug in (commits_another_token, skips_a_token)}

if __name__ == "__main__":
    service, bug = sys.argv[1:3]
    BUGS[bug]()
    create: Any = importlib.import_module(f"countersign.services.{service}.service").create
    main(service, create, sys.argv[3:])
