"""The rank processes of one model, as their coordinator sees them."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypeVar

from countersign.services.engine.config import Dtype
from countersign.services.engine.errors import RankLost
from countersign.services.engine.ranks.placement import Placement
from countersign.services.engine.ranks.rank import Result, Step
from countersign.services.engine.ranks.worker import (
    Answer,
    Clean,
    Command,
    Export,
    Failed,
    Ready,
    Request,
    Setting,
    main,
)

START_S = 120.0
STOP_S = 2.0
# A rank that has ended says more about a failure than its peers do, who only miss it.
LAST_WORDS_S = 0.5

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Member:
    process: BaseProcess
    pipe: Connection


@dataclass(slots=True)
class RankGroup:
    """Starts with the first call, and anew with the first one after a failure.

    ``pages``: of the whole cache, page 0 included. ``timeout``: seconds that a step may take.
    """

    placement: Placement
    folder: Path
    dtype: Dtype
    threads: int
    pages: int
    timeout: float
    _members: list[_Member] = field(default_factory=list)
    _waiting: list[list[Command]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._waiting = [[] for _ in range(self.placement.ranks)]

    @property
    def pids(self) -> list[int]:
        """Of the processes that run, by rank."""
        return [member.process.pid or 0 for member in self._members]

    def start(self) -> None:
        """Raises:
        RankLost: a rank did not come up.
        """
        if self._members:
            return
        context = multiprocessing.get_context("spawn")
        with tempfile.TemporaryDirectory(prefix="countersign-ranks-") as meeting:
            for rank in range(self.placement.ranks):
                setting = Setting(
                    rank, self.placement, self.folder, self.dtype, self.threads, self.pages, Path(meeting, "ranks"),
                    self.timeout,
                )  # fmt: skip
                ours, theirs = context.Pipe()
                name = f"rank-{rank}"
                process = context.Process(target=main, args=(theirs, setting, os.getpid()), name=name, daemon=True)
                process.start()
                theirs.close()
                self._members.append(_Member(process, ours))
            self._answers(dict.fromkeys(range(len(self._members)), Ready), time.monotonic() + START_S)

    def tell(self, rank: int, command: Command) -> None:
        """To be done before the next request. A group that is not up has nothing to do it to."""
        if self._members:
            self._waiting[rank].append(command)

    def run(self, step: Step) -> list[Result]:
        """A step on all ranks; their results by rank.

        Raises:
            RankLost: see there; the others are ended too.
        """
        answers = self._ask(dict.fromkeys(range(self.placement.ranks), step), Result)
        return [answers[rank] for rank in range(self.placement.ranks)]

    def export(self, rank: int, page: int) -> bytes:
        """Raises:
        RankLost: see there.
        """
        return self._ask({rank: Export(page)}, bytes)[rank]

    def is_clean(self) -> bool:
        """Whether page 0 is zero on every rank.

        Raises:
            RankLost: see there.
        """
        return all(self._ask(dict.fromkeys(range(self.placement.ranks), Clean()), bool).values())

    def stop(self) -> None:
        """Ends all ranks."""
        members, self._members = self._members, []
        self._waiting = [[] for _ in range(self.placement.ranks)]
        for member in members:
            member.pipe.close()
        deadline = time.monotonic() + STOP_S
        for member in members:
            member.process.join(max(0.0, deadline - time.monotonic()))
        for member in members:
            if member.process.is_alive():
                member.process.kill()
                member.process.join()
            member.process.close()

    def _ask(self, requests: Mapping[int, Request], kind: type[T]) -> dict[int, T]:
        self.start()
        for rank, request in requests.items():
            commands, self._waiting[rank] = self._waiting[rank], []
            try:
                self._members[rank].pipe.send((commands, request))
            except OSError as error:
                raise self._lost(rank) from error
        return self._answers(dict.fromkeys(requests, kind), time.monotonic() + self.timeout)

    def _answers(self, wanted: Mapping[int, type[T]], deadline: float) -> dict[int, T]:
        answers: dict[int, T] = {}
        while missing := [rank for rank in wanted if rank not in answers]:
            ready = wait([self._members[rank].pipe for rank in missing], max(0.0, deadline - time.monotonic()))
            if not ready:
                rank = missing[0] if len(missing) == 1 else None
                self.stop()
                raise RankLost(f"did not answer in time; silent: {missing}", rank)
            for rank in [rank for rank in missing if self._members[rank].pipe in ready]:
                answer = self._received(rank)
                if not isinstance(answer, wanted[rank]):
                    raise self._lost(rank, answer)
                answers[rank] = answer
        return answers

    def _received(self, rank: int) -> Answer | Ready | Failed | None:
        try:
            answer: Answer | Ready | Failed = self._members[rank].pipe.recv()
        except (EOFError, OSError):
            return None
        return answer

    def _lost(self, rank: int, answer: object = None) -> RankLost:
        """Ends all; the error names who ended without a word, else who complained."""
        deadline = time.monotonic() + LAST_WORDS_S
        while True:
            ended = [(place, member.process.exitcode) for place, member in enumerate(self._members)]
            alive = [self._members[place].process.sentinel for place, code in ended if code is None]
            left = deadline - time.monotonic()
            if any(code for _, code in ended) or not alive or left <= 0:
                break
            wait(alive, left)
        self.stop()
        for place, code in ended:
            if code:  # neither running nor ended by itself
                return RankLost(f"ended with code {code}", place)
        return RankLost(f"failed: {answer.why if isinstance(answer, Failed) else 'it ended'}", rank)
