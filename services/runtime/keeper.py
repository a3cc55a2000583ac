"""Keeps one process of a stack running: start, wait until healthy, wait for its end, again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Never

from countersign.services.runtime.child import Child
from countersign.services.runtime.errors import CountersignError, DeadlineExceeded, FailedPrecondition, Unavailable
from countersign.services.runtime.restart import GiveUp, RestartPolicy


@dataclass(frozen=True, slots=True)
class Healthy:
    """A process answers at ``address``: for the first time, or again."""

    name: str
    address: str


@dataclass(frozen=True, slots=True)
class Ended:
    """A process ended unasked and will be started again."""

    name: str
    code: int
    restart_in_s: float
    log: Path


class Keeper:
    """One process, kept by a task.

    Args:
        spawn: starts it, without waiting.
        probe: waits until the given child is healthy and returns its address. When the child ends first it raises
            Unavailable, or FailedPrecondition when another try cannot succeed.
        notify: gets each `Healthy` and `Ended`.
        patience: seconds that a start may take until it is healthy.
    """

    def __init__(
        self,
        name: str,
        *,
        spawn: Callable[[], Child],
        probe: Callable[[Child], Awaitable[str]],
        policy: RestartPolicy,
        notify: Callable[[Healthy | Ended], None],
        patience: float,
    ) -> None:
        self.name = name
        self.address = ""
        self.child: Child | None = None
        self.healthy = asyncio.Event()
        self._spawn, self._probe = spawn, probe
        self._policy, self._notify, self._patience = policy, notify, patience
        self._task: asyncio.Task[Never] | None = None

    def start(self) -> asyncio.Task[Never]:
        """Keep it from now on. The task ends by `stop`, or with the error for which the process is given up."""
        self._task = asyncio.create_task(self._keep(), name=f"keep-{self.name}")
        return self._task

    async def stop(self, grace: float) -> None:
        """Keep it no longer: SIGTERM, and SIGKILL after ``grace`` seconds, or at once when this is cancelled."""
        try:
            if self._task is not None:
                self._task.cancel()
                await asyncio.wait({self._task})
            if self.child is not None:
                await self.child.stop(grace)
        finally:
            self.kill()

    def kill(self) -> None:
        """End the running child at once."""
        if self.child is not None:
            self.child.kill()

    async def _keep(self) -> Never:
        clock = asyncio.get_running_loop().time
        while True:
            child = self._start_child()
            await self._until_healthy(child)
            code = await child.wait()
            self.healthy.clear()
            effect = self._policy.exited(self.name, code, clock())
            if isinstance(effect, GiveUp):
                raise self._given_up(effect, child)
            delay = effect.at - clock()
            self._notify(Ended(self.name, code, delay, child.log))
            await asyncio.sleep(delay)

    def _start_child(self) -> Child:
        try:
            self.child = self._spawn()
        except OSError as error:
            raise Unavailable(f"{self.name} cannot be started: {error}", reason="SERVICE_FAILED") from error
        return self.child

    async def _until_healthy(self, child: Child) -> None:
        try:
            async with asyncio.timeout(self._patience):
                self.address = await self._probe(child)
        except TimeoutError:
            child.kill()
            if not self._policy.ever_healthy(self.name):
                raise self._too_slow(child) from None
        except FailedPrecondition:
            if not self._policy.ever_healthy(self.name):
                raise
        except Unavailable:
            return  # it has ended, and the policy says what follows
        else:
            self._policy.healthy(self.name, asyncio.get_running_loop().time())
            self.healthy.set()
            self._notify(Healthy(self.name, self.address))

    def _given_up(self, effect: GiveUp, child: Child) -> CountersignError:
        return Unavailable(
            f"{self.name} ended {effect.failures} times before it was healthy, last with code {effect.code}: "
            f"{child.last_words()}",
            reason="SERVICE_FAILED",
            help=f"see {child.log}",
            log_tail=child.log_tail(),
        )

    def _too_slow(self, child: Child) -> CountersignError:
        return DeadlineExceeded(
            f"{self.name} was not healthy within {self._patience:g} s; it said last: {child.last_words()}",
            reason="SERVICE_FAILED",
            help=f"see {child.log}",
            log_tail=child.log_tail(),
        )
