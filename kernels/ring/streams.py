"""Ranks as streams of one GPU: the schedule of the threads, where an event goes with each tensor.

No host waits for the device: the receiver's stream waits for the event that the sender's recorded. On a machine without
CUDA there are no streams to wait for, and tensors go over as between threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from countersign.kernels.ring.threads import Parcel, Post, ThreadTransport
from countersign.kernels.ring.transport import Transport

Result = TypeVar("Result")


class StreamTransport(ThreadTransport):
    """Use with :func:`~countersign.kernels.ring.threads.run_ranks`: each rank's work goes to a stream of its own.

    The caller's stream goes first and then waits: what it wrote before is there, and it may read the results.
    """

    def __init__(self, rank: int, posts: Sequence[Sequence[Post]]) -> None:
        super().__init__(rank, posts)
        # Made by the caller's thread, whose current stream wrote the inputs.
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None  # type: ignore[no-untyped-call]
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())

    def pack(self, turn: tuple[int, int], tensor: Tensor) -> Parcel:
        if not tensor.is_cuda:
            return Parcel(turn, tensor)
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record()
        return Parcel(turn, tensor, ready)

    def unpack(self, parcel: Parcel) -> Tensor:
        if parcel.ready is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(parcel.ready)
            # The allocator must not give the memory away while this stream reads it.
            parcel.tensor.record_stream(stream)
        return parcel.tensor

    def run(self, function: Callable[[Transport], Result]) -> Result:
        if self._stream is None:
            return function(self)
        with torch.cuda.stream(self._stream):
            result = function(self)
        self._stream.synchronize()
        return result
