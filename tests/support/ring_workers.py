"""Rank processes over gloo that live as long as a test module: starting them costs seconds, a job milliseconds."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from ring_cases import Batch, attend_as
from torch import Tensor

from countersign.kernels.ring.distributed import connect
from countersign.kernels.ring.layout import Layout, Parts
from countersign.kernels.ring.schedule import Schedule
from countersign.kernels.ring.transport import Counted, Receive, Send, Transport, agree

Job = Callable[..., Any]
DEADLINE = 120.0


def serve(rank: int, size: int, where: str, jobs: Connection) -> None:
    """A worker: joins, then runs (job, arguments) until None comes; answers (result, None) or (None, error)."""
    torch.set_num_threads(1)
    transport = connect(rank, size, where, timeout=60)
    while (job := jobs.recv()) is not None:
        function, arguments = job
        try:
            jobs.send((function(transport, *arguments), None))
        except Exception as error:  # noqa: BLE001  the parent raises it
            traceback.print_exc()
            jobs.send((None, error))
    transport.close()


class Workers:
    def __init__(self, size: int, folder: Path) -> None:
        context = get_context("spawn")
        where = f"file://{folder / f'gloo-{size}'}"
        pipes = [context.Pipe() for _ in range(size)]
        self._jobs = [mine for mine, _ in pipes]
        self.processes = [
            context.Process(target=serve, args=(rank, size, where, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()

    def run(self, function: Job, *arguments: Any) -> list[Any]:
        """The function's results by rank, an error in place of the result where it raised one."""
        for jobs in self._jobs:
            jobs.send((function, arguments))
        return [self._answer(rank) for rank in range(len(self._jobs))]

    def _answer(self, rank: int) -> Any:
        if not self._jobs[rank].poll(DEADLINE):
            raise TimeoutError(f"worker {rank} gave no answer")
        try:
            result, error = self._jobs[rank].recv()
        except EOFError:
            return EOFError()
        return error or result

    def close(self) -> None:
        for jobs, process in zip(self._jobs, self.processes, strict=True):
            if process.is_alive():
                jobs.send(None)
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()


def attention(transport: Transport, batch: Batch, layout: Layout, schedule: Schedule) -> tuple[Parts, Tensor, Tensor]:
    return attend_as(transport, batch, layout, schedule)


def bytes_sent(transport: Transport, batch: Batch, layout: Layout, schedule: Schedule) -> int:
    counted = Counted(transport)
    attend_as(counted, batch, layout, schedule)
    return counted.sent.total()


def plans_of_its_own(transport: Transport) -> None:
    agree(transport, ("layout", transport.rank == 0), 20)


def strided(transport: Transport) -> None:
    transport.start([Send(0, torch.zeros(4, 4).T)], [], 1)


def to_itself(transport: Transport) -> Tensor:
    mine = torch.full((3,), float(transport.rank), dtype=torch.bfloat16)
    return transport.start([Send(transport.rank, mine)], [Receive(transport.rank, (3,), mine.dtype)], 5).wait()[0]


def in_order(transport: Transport) -> list[int]:
    """Three messages to the next rank in one exchange, then three more in another."""
    to, of = (transport.rank + 1) % transport.size, (transport.rank - 1) % transport.size
    found = []
    for base in (0, 3):
        sends = [Send(to, torch.tensor([base + i])) for i in range(3)]
        receives = [Receive(of, (1,), torch.int64)] * 3
        found += [int(tensor) for tensor in transport.start(sends, receives, 20).wait()]
    return found


def silent(transport: Transport) -> None:
    """Rank 0 waits for what nobody sends."""
    if transport.rank == 0:
        transport.start([], [Receive(1, (2,), torch.float32)], 0.5).wait()


def dies(transport: Transport) -> None:
    """Rank 1 dies while rank 0 waits for it."""
    if transport.rank == 1:
        os._exit(7)
    transport.start([], [Receive(1, (2,), torch.float32)], 60).wait()
