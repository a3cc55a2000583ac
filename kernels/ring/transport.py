"""The seam between ranks: batches of tensors sent and received together.

All receives and sends of an exchange are posted at once and waited for later, so that computing goes on meanwhile.
Messages between two ranks keep their order. Every wait ends: with the tensors, or with a TransportError within
``timeout``. A message to oneself is handed over without leaving.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from countersign.kernels.ring.errors import LayoutError


@dataclass(frozen=True, slots=True)
class Send:
    """``tensor`` must be contiguous and stay as it is until the exchange has been waited for."""

    peer: int
    tensor: Tensor


@dataclass(frozen=True, slots=True)
class Receive:
    peer: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Pending(Protocol):
    """An exchange under way."""

    def wait(self) -> list[Tensor]:
        """The tensors received, in the order asked for, once all is sent and received.

        Raises:
            TransportError: a peer is gone, sent nothing in time, or sent something else.
        """


class Transport(Protocol):
    """One rank's way to the others."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def start(self, sends: Sequence[Send], receives: Sequence[Receive], timeout: float) -> Pending:
        """Post one batched exchange; all ranks post equally many, if need be empty ones.

        Args:
            sends: what goes out.
            receives: what comes in.
            timeout: seconds until ``wait`` gives up, counted from here.

        Raises:
            TransportError: as ``wait``.
        """


def all_gather(transport: Transport, tensor: Tensor, timeout: float) -> list[Tensor]:
    """Every rank's tensor, by rank; all of the same shape and type.

    Raises:
        TransportError: see :class:`Pending`.
    """
    ranks = range(transport.size)
    receives = [Receive(peer, tuple(tensor.shape), tensor.dtype) for peer in ranks]
    return transport.start([Send(peer, tensor) for peer in ranks], receives, timeout).wait()


def agree(transport: Transport, what: object, timeout: float) -> None:
    """Make sure that all ranks plan from the same thing, before a tensor of a wrong size can break the group.

    Args:
        transport: to the others.
        what: anything whose ``repr`` says all that matters, as a Layout's does.
        timeout: seconds.

    Raises:
        LayoutError: a rank has another; names it.
        TransportError: see :class:`Pending`.
    """
    digest = torch.frombuffer(bytearray(hashlib.sha256(repr(what).encode()).digest()), dtype=torch.uint8)
    others = all_gather(transport, digest, timeout)
    strangers = [rank for rank, other in enumerate(others) if not torch.equal(other, digest)]
    if strangers:
        raise LayoutError(f"rank {transport.rank} plans another exchange than ranks {strangers}; nothing was sent")


@dataclass(slots=True)
class Counted:
    """Counts the bytes that leave and reach this rank, by peer; messages to oneself do neither."""

    inner: Transport
    sent: Counter[int] = field(default_factory=Counter)
    received: Counter[int] = field(default_factory=Counter)
    exchanges: int = 0

    @property
    def rank(self) -> int:
        return self.inner.rank

    @property
    def size(self) -> int:
        return self.inner.size

    def start(self, sends: Sequence[Send], receives: Sequence[Receive], timeout: float) -> Pending:
        self.exchanges += 1
        for send in sends:
            if send.peer != self.rank:
                self.sent[send.peer] += send.tensor.nbytes
        for receive in receives:
            if receive.peer != self.rank:
                elements = torch.Size(receive.shape).numel()
                self.received[receive.peer] += elements * receive.dtype.itemsize
        return self.inner.start(sends, receives, timeout)
