"""Ranks as threads of one process, with a queue for each pair: for tests and for measuring schedules."""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from countersign.kernels.ring.errors import MessageMismatch, PeerGone, PeerTimeout
from countersign.kernels.ring.transport import Receive, Send, Transport

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Parcel:
    """A tensor under way: in which of the sender's exchanges, one of how many to this peer."""

    turn: tuple[int, int]
    tensor: Tensor
    ready: torch.cuda.Event | None = None
    """After which the tensor is there, where a stream still writes to it."""


@dataclass(frozen=True, slots=True)
class Departed:
    """The sender has ended and will send nothing more."""


Post = queue.SimpleQueue[Parcel | Departed]


class ThreadTransport:
    """Tensors are handed over as they are, not copied: neither side may write to them."""

    def __init__(self, rank: int, posts: Sequence[Sequence[Post]]) -> None:
        """``posts[from][to]``."""
        self._rank, self._posts = rank, posts
        self._exchanges = 0

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return len(self._posts)

    def start(self, sends: Sequence[Send], receives: Sequence[Receive], timeout: float) -> ThreadPending:
        """See :class:`~countersign.kernels.ring.transport.Transport`."""
        peers = Counter(send.peer for send in sends)
        for send in sends:
            self._posts[self._rank][send.peer].put(self.pack((self._exchanges, peers[send.peer]), send.tensor))
        self._exchanges += 1
        return ThreadPending(self, self._exchanges - 1, receives, time.monotonic() + timeout)

    def pack(self, turn: tuple[int, int], tensor: Tensor) -> Parcel:
        return Parcel(turn, tensor)

    def unpack(self, parcel: Parcel) -> Tensor:
        return parcel.tensor

    def run(self, function: Callable[[Transport], Result]) -> Result:
        return function(self)

    def leave(self) -> None:
        """Tell all others that nothing more will come."""
        for post in self._posts[self._rank]:
            post.put(Departed())

    def take(self, wanted: Receive, turn: tuple[int, int], deadline: float) -> Tensor:
        """The next tensor from a peer.

        Raises:
            TransportError: see :class:`~countersign.kernels.ring.transport.Pending`.
        """
        peer, post = wanted.peer, self._posts[wanted.peer][self._rank]
        try:
            parcel = post.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise PeerTimeout(f"rank {self._rank}: nothing came from rank {peer} in time", peer) from None
        if isinstance(parcel, Departed):
            post.put(parcel)
            raise PeerGone(f"rank {self._rank}: rank {peer} has ended, and a message from it was due", peer)
        came = _described(parcel.turn, parcel.tensor.shape, parcel.tensor.dtype)
        due = _described(turn, wanted.shape, wanted.dtype)
        if came != due:
            raise MessageMismatch(f"rank {self._rank}: from rank {peer} came {came}; the plan says {due}", peer)
        return self.unpack(parcel)


@dataclass(frozen=True, slots=True)
class ThreadPending:
    """Receives that are still to be taken from the queues."""

    transport: ThreadTransport
    exchange: int
    receives: Sequence[Receive]
    deadline: float

    def wait(self) -> list[Tensor]:
        """See :class:`~countersign.kernels.ring.transport.Pending`."""
        peers = Counter(receive.peer for receive in self.receives)
        return [self.transport.take(one, (self.exchange, peers[one.peer]), self.deadline) for one in self.receives]


def _described(turn: tuple[int, int], shape: Sequence[int], dtype: torch.dtype) -> str:
    return f"one of {turn[1]} in exchange {turn[0]}, {tuple(shape)} {dtype}"


def group(size: int, kind: type[ThreadTransport] = ThreadTransport) -> list[ThreadTransport]:
    """The ends of ``size`` connected ranks."""
    posts: list[list[Post]] = [[queue.SimpleQueue() for _ in range(size)] for _ in range(size)]
    return [kind(rank, posts) for rank in range(size)]


def run_ranks(
    size: int, function: Callable[[Transport], Result], kind: type[ThreadTransport] = ThreadTransport
) -> list[Result]:
    """Run ``function(transport)`` as each rank in a thread of its own; the results by rank.

    A rank that fails or returns leaves, so that nobody waits for it. Of several errors, the first that is not about
    a peer's leaving is raised.
    """
    results: dict[int, Result] = {}
    errors: list[BaseException] = []

    def run(transport: ThreadTransport) -> None:
        try:
            results[transport.rank] = transport.run(function)
        except BaseException as error:  # noqa: BLE001  raised again by the caller's thread
            errors.append(error)
        finally:
            transport.leave()

    threads = [threading.Thread(target=run, args=(one,), name=f"rank-{one.rank}") for one in group(size, kind)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise min(errors, key=lambda error: isinstance(error, PeerGone))
    return [results[rank] for rank in range(size)]
