"""An asyncio loop whose time is a number: waiting costs nothing, and one integer decides who comes first."""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import random
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

MAX_STEPS = 200_000


class Process(Protocol):
    """What callbacks belong to, by their context."""

    dead: bool
    paused: bool
    frozen: list[asyncio.Handle]


PROCESS: contextvars.ContextVar[Process] = contextvars.ContextVar("PROCESS")


class Deadlock(RuntimeError):
    """Nothing is ready, nothing is scheduled: whoever waits waits for ever."""


class Endless(RuntimeError):
    """Callbacks without end, while the time hardly moves."""


class SimTask(asyncio.Task[Any]):
    """Hashes by its number and not by its address, so that sets of tasks have the same order in every run."""

    def __init__(self, serial: int, coro: Coroutine[Any, Any, Any], **options: Any) -> None:
        self.serial = serial
        super().__init__(coro, **options)

    def __hash__(self) -> int:
        return self.serial


class SimLoop(asyncio.BaseEventLoop):
    """Runs what is ready in an order drawn from ``rng``; when nothing is, the next timer's time has come.

    Callbacks of a paused process wait in it, those of a dead one are kept aside and never run: no ``finally``, no
    destructor. ``revive`` gives them back, so that everything can be ended in order when the run is over. What would
    run in a thread takes up to ``work_s`` seconds.
    """

    _ready: deque[asyncio.Handle]
    _scheduled: list[Any]

    def __init__(self, rng: random.Random, work_s: float) -> None:
        super().__init__()
        self.now = 0.0
        self.steps = 0
        self.tasks: list[asyncio.Task[Any]] = []
        self._rng, self._work_s = rng, work_s
        self._dropped: list[asyncio.Handle] = []
        self._alive = True

    def time(self) -> float:
        return self.now

    def create_task(self, coro: Any, **options: Any) -> asyncio.Task[Any]:
        task = SimTask(len(self.tasks), coro, loop=self, **options)
        self.tasks.append(task)
        return task

    def run_in_executor(self, executor: object, func: Callable[[*Ts], T], *args: *Ts) -> asyncio.Future[T]:
        """No thread: ``func`` runs a little later, at once, as the process that asked for it."""
        future: asyncio.Future[T] = self.create_future()

        def work() -> None:
            if future.cancelled():
                return
            try:
                future.set_result(func(*args))
            except Exception as error:  # noqa: BLE001  as an executor does
                future.set_exception(error)

        self.call_later(self._rng.uniform(0.001, self._work_s), work)
        return future

    def revive(self) -> None:
        """From now on nobody is dead or paused."""
        self._alive, self.steps = False, 0
        self._ready.extend(self._dropped)
        self._dropped.clear()

    def _run_once(self) -> None:
        timers = self._scheduled
        while timers and timers[0]._cancelled:
            heapq.heappop(timers)._scheduled = False
        if not self._ready:
            if not timers:
                raise Deadlock(f"at {self.now:.4f} s")
            self.now = max(self.now, timers[0].when())
        while timers and timers[0].when() <= self.now:
            timer = heapq.heappop(timers)
            timer._scheduled = False
            self._ready.append(timer)
        batch = list(self._ready)
        self._ready.clear()
        if len(batch) > 1:
            self._rng.shuffle(batch)
        for handle in batch:
            self._run(handle)
        self.steps += len(batch)
        if self.steps > MAX_STEPS:
            raise Endless(f"{self.steps} callbacks until {self.now:.4f} s")

    def _run(self, handle: Any) -> None:
        if handle._cancelled:
            return
        process = handle._context.get(PROCESS) if self._alive else None
        if process is not None and process.dead:
            self._dropped.append(handle)
        elif process is not None and process.paused:
            process.frozen.append(handle)
        else:
            handle._run()

    def wake(self, process: Process) -> None:
        """A paused process goes on where it was; all that it should have done meanwhile is due."""
        process.paused = False
        self._ready.extend(process.frozen)
        process.frozen.clear()

    def _process_events(self, event_list: object) -> None:
        """There are none."""

    def _write_to_self(self) -> None:
        """One thread needs no waking."""
