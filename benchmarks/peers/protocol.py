"""What a worker process speaks: JSON lines, a request on stdin, its reply on stdout. Standard library only.

    {"op": "load", "model": DIR, "draft": DIR | null, "threads": n, "precision": "fp32" | "default" | "int8",
     "cache": DIR}
        -> {"version": "5.23.0"}
    {"op": "generate", "prompts": [[id, ...], ...], "new_tokens": n, "speculation": null | "draft" | "lookup",
     "drafted": k}
        -> {"tokens": [[n ids], ...], "seconds": s, "first_token_seconds": s}

Decoding is greedy, of exactly n tokens a prompt, end tokens ignored, nothing cached from one request to the next. The
clock runs around the engine's own call; ``first_token_seconds`` is a call of its own, for one token of the same
prompts, so that nothing streams, or is counted, while ``seconds`` is taken. What an engine cannot do is answered
``{"unsupported": why}``, what went wrong ``{"error": what}``.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

Speculation = Literal["draft", "lookup"]
Precision = Literal["fp32", "default", "int8"]
Tokens = list[list[int]]


class Unsupported(Exception):
    """The engine has no such thing; the message says what it lacks."""


@dataclass(frozen=True, slots=True)
class Load:
    """``model``, ``draft``: Hugging Face folders. ``cache``: where converted checkpoints are kept."""

    model: Path
    draft: Path | None
    threads: int
    precision: Precision
    cache: Path


class Peer(Protocol):
    """A loaded engine. Construction takes a :class:`Load` and raises Unsupported for what cannot be loaded."""

    version: str

    def generate(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, speculation: Speculation | None, drafted: int
    ) -> Tokens:
        """``new_tokens`` ids for each prompt; ``drafted`` proposals a pass. Raises Unsupported."""


def serve(load: Callable[[Load], Peer]) -> None:
    """Answers requests until stdin ends. What libraries print goes to stderr."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = _Worker(load)
    for line in sys.stdin:
        try:
            reply = worker.answer(json.loads(line))
        except Unsupported as error:
            reply = {"unsupported": str(error)}
        except Exception as error:  # noqa: BLE001 - whatever a peer raises is its answer, and the benchmark goes on
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"[:300]}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def keep(folder: Path, make: Callable[[Path], None]) -> Path:
    """``folder``, made once: ``make`` fills a sibling, which gets the name only when it is whole."""
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.{os.getpid()}")
        partial.mkdir(parents=True)
        make(partial)
        partial.rename(folder)
    return folder


class _Worker:
    def __init__(self, load: Callable[[Load], Peer]) -> None:
        self._load = load
        self._peer: Peer | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        op = request.pop("op")
        if op == "load":
            draft = request["draft"] and Path(request["draft"])
            folders = {"model": Path(request["model"]), "draft": draft, "cache": Path(request["cache"])}
            self._peer = self._load(Load(**{**request, **folders}))
            return {"version": self._peer.version}
        if op != "generate" or self._peer is None:
            raise ValueError(f"{op!r} is no operation, or came before load")
        prompts, new_tokens, rest = (
            request["prompts"],
            request["new_tokens"],
            (request["speculation"], request["drafted"]),
        )
        _, first_token_seconds = _timed(self._peer, prompts, 1, *rest)
        tokens, seconds = _timed(self._peer, prompts, new_tokens, *rest)
        wrong = [len(row) for row in tokens if len(row) != new_tokens]
        if wrong or len(tokens) != len(prompts):
            raise ValueError(f"{len(tokens)} rows for {len(prompts)} prompts; of {wrong} tokens, not {new_tokens}")
        return {"tokens": tokens, "seconds": seconds, "first_token_seconds": first_token_seconds}


def _timed(
    peer: Peer, prompts: Tokens, new_tokens: int, speculation: Speculation | None, drafted: int
) -> tuple[Tokens, float]:
    began = time.perf_counter()
    tokens = peer.generate(prompts, new_tokens, speculation, drafted)
    return tokens, time.perf_counter() - began
