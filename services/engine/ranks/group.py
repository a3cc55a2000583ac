"""The rank processes of one model, as their coordinator sees them."""

from __future__ import annotations

import multiprocessing
import os
import socket
import struct
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypeVar

from countersign.services.engine.config import Dtype
from countersign.services.engine.errors import RankLost
from countersign.services.engine.ranks.placement import Placement
from countersign.services.engine.ranks.rank import Result, Sent, Step
from countersign.services.engine.ranks.worker import (
    START_S,
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

STOP_S = 2.0
# A rank that has ended, or that its peers name, says more about a failure than silence does: they get this long to.
LAST_WORDS_S = 0.5

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Member:
    process: BaseProcess
    pipe: Connection


@dataclass(slots=True)
class RankGroup:
    """Starts with the first call, and anew with the first one after a failure and ``renew``.

    ``pages``: of the whole cache, page 0 included. ``timeout``: seconds that a step may take.
    ``sent``: between all ranks, since the start.
    """

    placement: Placement
    folder: Path
    dtype: Dtype
    threads: int
    pages: int
    timeout: float
    sent: Sent = field(default_factory=Sent)
    _members: list[_Member] = field(default_factory=list)
    _waiting: list[list[Command]] = field(default_factory=list)
    _lost: bool = False

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
                try:
                    self._members.append(_started(context, setting, self.timeout))
                except OSError as error:
                    raise self._failed(f"could not be started: {error}", rank) from error
            self._answers(dict.fromkeys(range(len(self._members)), Ready), time.monotonic() + START_S + LAST_WORDS_S)

    def renew(self) -> None:
        """Whoever used the pages knows that what they held is lost, if it is: new ranks may start."""
        self._lost = False

    def tell(self, rank: int, command: Command) -> None:
        """To be done before the next request, by new ranks if these are not up."""
        self._waiting[rank].append(command)

    def run(self, step: Step) -> list[Result]:
        """A step on all ranks; their results by rank.

        Raises:
            RankLost: see there; the others are ended too.
        """
        answers = self._ask(dict.fromkeys(range(self.placement.ranks), step), Result)
        results = [answers[rank] for rank in range(self.placement.ranks)]
        self.sent = sum((result.sent for result in results), self.sent)
        return results

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
        if self._lost:
            raise RankLost("was lost, and what it kept is still in use")
        self.start()
        for rank, request in requests.items():
            commands, self._waiting[rank] = self._waiting[rank], []
            try:
                self._members[rank].pipe.send((commands, request))
            except OSError as error:
                raise self._ended(rank) from error
        return self._answers(dict.fromkeys(requests, kind), time.monotonic() + self.timeout + LAST_WORDS_S)

    def _answers(self, wanted: Mapping[int, type[T]], deadline: float) -> dict[int, T]:
        answers: dict[int, T] = {}
        while missing := [rank for rank in wanted if rank not in answers]:
            ready = wait([self._members[rank].pipe for rank in missing], max(0.0, deadline - time.monotonic()))
            if not ready:
                silent = missing[0] if len(missing) == 1 else None
                raise self._failed(f"did not answer in time; silent: {missing}", silent)
            for rank in [rank for rank in missing if self._members[rank].pipe in ready]:
                answer = self._received(rank)
                if not isinstance(answer, wanted[rank]):
                    raise self._ended(rank, answer)
                answers[rank] = answer
        return answers

    def _received(self, rank: int) -> Answer | Ready | Failed | None:
        try:
            answer: Answer | Ready | Failed = self._members[rank].pipe.recv()
        except (EOFError, OSError):
            return None
        return answer

    def _ended(self, rank: int, answer: object = None) -> RankLost:
        """The error names who ended without a word, else whom the rank misses, else the rank."""
        running = {member.process.sentinel: place for place, member in enumerate(self._members)}
        deadline = time.monotonic() + LAST_WORDS_S
        while ready := wait(list(running), max(0.0, deadline - time.monotonic())):
            for sentinel in [one for one in running if one in ready]:
                place = running.pop(sentinel)
                process = self._members[place].process
                process.join()  # the system closes a process's files before it can tell the code
                if process.exitcode:
                    return self._failed(f"ended with code {process.exitcode}", place)
        if not isinstance(answer, Failed):
            return self._failed("ended, or sent nothing that could be read in time", rank)
        return self._failed(f"failed: {answer.why}", rank if answer.peer is None else answer.peer)

    def _failed(self, why: str, rank: int | None) -> RankLost:
        """Ends all."""
        self.stop()
        self._lost = True
        return RankLost(why, rank)


def _started(context: SpawnContext, setting: Setting, timeout: float) -> _Member:
    """A rank that begins to start."""
    ours, theirs = context.Pipe()
    # A rank may stop in the middle of a message, and to wait until one begins is then not enough.
    with socket.socket(fileno=os.dup(ours.fileno())) as end:
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            end.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(timeout) + 1, 0))
    name = f"rank-{setting.rank}"
    process = context.Process(target=main, args=(theirs, setting, os.getpid()), name=name, daemon=True)
    with theirs:
        process.start()
    return _Member(process, ours)
