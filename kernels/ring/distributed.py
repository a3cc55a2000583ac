"""Ranks as processes of torch.distributed: gloo on CPU, NCCL on GPU.

One ``batch_isend_irecv`` an exchange, as two communicators may wait for each other for ever (NVIDIA/nccl#783). gloo
ends the process when a size is not the receiver's: sizes come from plans that :func:`transport.agree` has compared.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from countersign.kernels.ring.errors import MessageMismatch, PeerGone, PeerTimeout, TransportError
from countersign.kernels.ring.transport import Receive, Send

Backend = Literal["gloo", "nccl"]


class DistributedTransport:
    """A process's end of the default process group; make it by :func:`connect`."""

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def size(self) -> int:
        return dist.get_world_size()

    def start(self, sends: Sequence[Send], receives: Sequence[Receive], timeout: float) -> DistributedPending:
        """See :class:`~countersign.kernels.ring.transport.Transport`."""
        device = _device()
        for send in sends:
            if not send.tensor.is_contiguous() or send.tensor.device.type != device.type:
                kind = f"a {'contiguous' if send.tensor.is_contiguous() else 'strided'} tensor on {send.tensor.device}"
                raise ValueError(
                    f"send to rank {send.peer}: {kind}, but {dist.get_backend()} takes contiguous ones on {device.type}"
                )
        buffers = [torch.empty(receive.shape, dtype=receive.dtype, device=device) for receive in receives]
        self._hand_over(sends, receives, buffers)
        posted = [
            (dist.P2POp(dist.isend, send.tensor, send.peer), send.peer) for send in sends if send.peer != self.rank
        ]
        posted += [
            (dist.P2POp(dist.irecv, buffer, receive.peer), receive.peer)
            for receive, buffer in zip(receives, buffers, strict=True)
            if receive.peer != self.rank
        ]
        deadline = time.monotonic() + timeout
        try:
            works = dist.batch_isend_irecv([operation for operation, _ in posted]) if posted else []
        except RuntimeError as error:
            raise self.failed(error, None) from error
        # NCCL gives one work for all; gloo one for each.
        peers = [peer for _, peer in posted] if len(works) == len(posted) else [None] * len(works)
        return DistributedPending(self, list(zip(works, peers, strict=True)), buffers, deadline)

    def close(self) -> None:
        """Leave the group; needs nobody else."""
        dist.destroy_process_group()

    def failed(self, error: Exception, peer: int | None) -> TransportError:
        """The error of ours that one of torch's means."""
        text = str(error).splitlines()[0]
        who = f"rank {self.rank}: the exchange with {'a peer' if peer is None else f'rank {peer}'}"
        if "imed out" in text or "imeout" in text:
            return PeerTimeout(f"{who} did not end in time ({text})", peer)
        return PeerGone(f"{who} broke off: it has ended or cannot be reached ({text})", peer)

    def _hand_over(self, sends: Sequence[Send], receives: Sequence[Receive], buffers: Sequence[Tensor]) -> None:
        """Messages to oneself, which gloo refuses."""
        mine = deque(send.tensor for send in sends if send.peer == self.rank)
        for receive, buffer in zip(receives, buffers, strict=True):
            if receive.peer == self.rank:
                if not mine or mine[0].shape != buffer.shape or mine[0].dtype != buffer.dtype:
                    raise MessageMismatch(f"rank {self.rank} sends itself something else than it receives", self.rank)
                buffer.copy_(mine.popleft())


@dataclass(frozen=True, slots=True)
class DistributedPending:
    transport: DistributedTransport
    works: list[tuple[dist.Work, int | None]]
    buffers: list[Tensor]
    deadline: float

    def wait(self) -> list[Tensor]:
        """See :class:`~countersign.kernels.ring.transport.Pending`."""
        for work, peer in self.works:
            # gloo reads 0 as no limit at all.
            left = max(0.001, self.deadline - time.monotonic())
            try:
                work.wait(timedelta(seconds=left))
            except RuntimeError as error:
                raise self.transport.failed(error, peer) from error
        return self.buffers


def connect(
    rank: int, size: int, where: str, *, backend: Backend = "gloo", timeout: float = 60.0
) -> DistributedTransport:
    """Join the group of ``size`` processes that meet at ``where``: tcp://host:port of rank 0, or file:///path.

    With NCCL, set the process's CUDA device first. ``timeout``: seconds to wait for the others.

    Raises:
        PeerTimeout: not all came in time.
        PeerGone: ``where`` cannot be reached.
    """
    try:
        dist.init_process_group(
            backend, init_method=where, rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
        )
        # NCCL makes its communicator at the first call, which all must join; exchanges may be among a few only.
        dist.barrier(device_ids=[torch.cuda.current_device()] if backend == "nccl" else None)
    except (RuntimeError, ValueError) as error:
        text = str(error).splitlines()[0]
        kind = PeerTimeout if "imed out" in text or "imeout" in text else PeerGone
        raise kind(f"rank {rank} of {size} could not join the group at {where}: {text}") from error
    return DistributedTransport()


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
