"""The loop of the simulation: time that costs nothing, an order that a seed decides, processes that stop."""

from __future__ import annotations

import asyncio
import contextvars
import random
import time
from collections.abc import Iterator

import pytest
from tests.simulation.sealed import NotSimulated, sealed
from tests.simulation.virtual_time import PROCESS, Deadlock, SimLoop


class Process:
    def __init__(self) -> None:
        self.dead = self.paused = False
        self.frozen: list[asyncio.Handle] = []
        self.did: list[float] = []

    def start(self, loop: SimLoop) -> asyncio.Task[object]:
        context = contextvars.copy_context()
        context.run(PROCESS.set, self)
        return loop.create_task(self._tick(loop), context=context)

    async def _tick(self, loop: SimLoop) -> None:
        try:
            while True:
                await asyncio.sleep(1.0)
                self.did.append(loop.now)
        finally:
            self.did.append(-1.0)


@pytest.fixture
def loop() -> Iterator[SimLoop]:
    made = SimLoop(random.Random(1), 0.01)
    yield made
    made.close()


def until(loop: SimLoop, at: float) -> None:
    loop.run_until_complete(asyncio.sleep(at - loop.now))


def end(loop: SimLoop) -> None:
    loop.revive()
    for task in loop.tasks:
        task.cancel()
    loop.run_until_complete(asyncio.wait(list(loop.tasks)))


def test_an_hour_passes_in_no_time(loop: SimLoop) -> None:
    started = time.monotonic()
    loop.run_until_complete(asyncio.sleep(3600))
    assert loop.now == 3600
    assert time.monotonic() - started < 10


def test_a_paused_process_finds_its_timers_late_and_a_dead_one_never_not_even_its_finally(loop: SimLoop) -> None:
    zombie, crashed = Process(), Process()
    zombie.start(loop)
    crashed.start(loop)
    until(loop, 1.5)
    zombie.paused = crashed.dead = True
    until(loop, 4.5)
    assert zombie.did == crashed.did == [1.0]
    loop.wake(zombie)
    until(loop, 6.0)
    assert zombie.did == [1.0, 4.5, 5.5]
    assert crashed.did == [1.0]
    end(loop)
    assert crashed.did[-1] == -1.0


def test_who_waits_for_nothing_is_told_and_not_waited_for(loop: SimLoop) -> None:
    async def wait() -> None:
        await asyncio.Event().wait()

    with pytest.raises(Deadlock):
        loop.run_until_complete(wait())
    end(loop)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_seed_decides_the_order_and_other_seeds_other_orders(seed: int) -> None:
    def order(seed: int) -> list[int]:
        done: list[int] = []
        loop = SimLoop(random.Random(seed), 0.01)
        for number in range(20):
            loop.call_soon(done.append, number)
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
        return done

    assert order(seed) == order(seed)
    assert order(seed) != order(seed + 2)
    assert sorted(order(seed)) == list(range(20))


def test_what_belongs_in_a_thread_runs_later_without_one_and_the_real_clock_is_out_of_reach(loop: SimLoop) -> None:
    async def work() -> float:
        return await asyncio.get_running_loop().run_in_executor(None, lambda: loop.now)

    with sealed(loop, 1):
        assert 0 < loop.run_until_complete(work()) <= 0.01
        with pytest.raises(NotSimulated):
            time.monotonic()
        with pytest.raises(NotSimulated):
            loop.run_until_complete(asyncio.to_thread(time.time))
