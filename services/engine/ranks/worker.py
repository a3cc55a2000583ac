"""A rank as a process: loads the model, meets the other ranks, then does what the coordinator sends, step by step.

It ends when the coordinator's end of the pipe closes, when the coordinator dies, or when a step fails: the ranks are
then no longer in step, and the coordinator starts new ones.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import torch

from countersign.kernels.ring.distributed import connect
from countersign.kernels.ring.errors import TransportError
from countersign.services.engine.config import TORCH_DTYPES, Dtype
from countersign.services.engine.errors import EngineError
from countersign.services.engine.kv import LocalPages
from countersign.services.engine.model import load_model
from countersign.services.engine.native import NativeExecutor
from countersign.services.engine.ranks.placement import Placement
from countersign.services.engine.ranks.rank import Rank, Result, Step

PR_SET_PDEATHSIG = 1  # linux/prctl.h

START_S = 120.0
"""Until all have loaded the model and met."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What a rank must know to start. ``meeting``: a file where the ranks find each other; ``timeout`` in seconds."""

    rank: int
    placement: Placement
    folder: Path
    dtype: Dtype
    threads: int
    pages: int
    meeting: Path
    timeout: float


Command = tuple[Literal["copy"], int, int] | tuple[Literal["zero"], int, int] | tuple[Literal["fill"], int, bytes]
"""For pages of this rank: copy(source, target), zero(page, from slot), fill(page, data)."""


@dataclass(frozen=True, slots=True)
class Export:
    """Asks for a page's bytes."""

    page: int


@dataclass(frozen=True, slots=True)
class Clean:
    """Asks whether page 0 is still zero."""


Request = Step | Export | Clean
Answer = Result | bytes | bool


@dataclass(frozen=True, slots=True)
class Failed:
    """The rank's last words. ``peer``: the rank that it misses, if that is why."""

    why: str
    peer: int | None = None


@dataclass(frozen=True, slots=True)
class Ready:
    """The model is loaded and the other ranks are met."""


def main(pipe: Connection, setting: Setting, parent: int) -> None:
    """The process."""
    _die_with(parent)
    try:
        rank = _start(setting)
        pipe.send(Ready())
        while True:
            commands, request = pipe.recv()
            carry_out(rank.pages, commands)
            pipe.send(_answer(rank, request))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the coordinator has let go
    except (EngineError, TransportError, MemoryError) as error:
        with suppress(OSError):
            pipe.send(Failed(str(error), error.peer if isinstance(error, TransportError) else None))


def carry_out(pages: LocalPages, commands: Sequence[Command]) -> None:
    """Does to this rank's pages what the cache's owner decided."""
    for command in commands:
        match command:
            case "copy", source, target:
                pages.copy(0, source, target)
            case "zero", page, int(place):
                pages.zero(0, page, place)
            case "fill", page, bytes(data):
                pages.fill(0, page, data)


def _answer(rank: Rank, request: Request) -> Answer:
    match request:
        case Step():
            return rank.run(request)
        case Export(page):
            return rank.pages.export(0, page)
        case Clean():
            return rank.pages.is_clean()


def _start(setting: Setting) -> Rank:
    torch.set_num_threads(setting.threads)
    model = load_model(setting.folder, dtype=setting.dtype, backend="native", threads=setting.threads)
    if not isinstance(model.executor, NativeExecutor):
        raise EngineError("ranks run in native code only")
    cache_dtype = TORCH_DTYPES["bf16" if setting.dtype == "int8" else setting.dtype]
    pages = LocalPages(model.config, cache_dtype, setting.pages, "cpu")
    if sys.platform.startswith("linux"):
        # Without it gloo listens where the host's name points, and any that connects could send it numbers.
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    where = setting.meeting.absolute().as_uri()
    transport = connect(setting.rank, setting.placement.ranks, where, timeout=START_S)
    return Rank(model.executor, pages, setting.placement, transport, setting.timeout)


def _die_with(parent: int) -> None:
    """No rank outlives its coordinator, whatever it waits for. A terminal's Ctrl-C is the coordinator's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            sys.exit("the coordinator is gone")
