"""No clock, no thread and no randomness but the simulation's: whoever asks for another gets an error."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NoReturn, cast
from unittest import mock

from tests.simulation.network import Node
from tests.simulation.virtual_time import PROCESS, SimLoop

from countersign.services.router import service as router
from countersign.services.target import service as target

EPOCH_MS = 1_700_000_000_000


class NotSimulated(AssertionError):
    """Something of the real world was asked for."""


def wall_ms() -> int:
    """The time of day on the clock of the process that asks; they differ a little."""
    loop, node = _loops[-1], cast("Node | None", PROCESS.get(None))
    return EPOCH_MS + int(loop.now * 1000) + (node.skew_ms if node is not None else 0)


_loops: list[SimLoop] = []
_FORBIDDEN = (
    *((time, name) for name in ("time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "sleep")),
    (threading.Thread, "start"),
    (random, "random"),
    (random, "uniform"),
)


@contextmanager
def sealed(loop: SimLoop, seed: int) -> Iterator[None]:
    """While it lasts, ``loop`` has the only clock; real code that takes the time of day gets its own."""
    keys = random.Random(f"{seed}/keys")
    with ExitStack() as patches:
        for owner, name in _FORBIDDEN:
            patches.enter_context(mock.patch.object(owner, name, _tripwire(name)))
        patches.enter_context(mock.patch("os.urandom", keys.randbytes))
        for module in (router, target):
            patches.enter_context(mock.patch.object(module, "wall_ms", wall_ms))
        disabled = logging.root.manager.disable
        logging.disable()  # a record asks for the time
        _loops.append(loop)
        try:
            yield
        finally:
            _loops.pop()
            logging.disable(disabled)


def _tripwire(name: str) -> object:
    def trip(*_: object, **__: object) -> NoReturn:
        raise NotSimulated(f"{name} was called")

    return trip
