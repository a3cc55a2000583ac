"""Exchanges keep order, count bytes, and end with a typed error when a peer drops, delays or repeats a message."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from ring_cases import CASES, LEAF, Batch, attend_as, layout_of

from countersign.kernels.ring.errors import LayoutError, MessageMismatch, PeerGone, PeerTimeout
from countersign.kernels.ring.schedule import Schedule
from countersign.kernels.ring.streams import StreamTransport
from countersign.kernels.ring.threads import ThreadTransport, group, run_ranks
from countersign.kernels.ring.transport import Counted, Pending, Receive, Send, Transport, agree, all_gather

KINDS = [ThreadTransport, StreamTransport]
RINGS = (Schedule.TOKEN_RING, Schedule.PASS_KV, Schedule.GATHER_Q)
F32 = torch.float32


@dataclass(slots=True)
class Faulty:
    """Spoils what rank 1 sends in its second exchange that sends something."""

    inner: Transport
    spoil: Callable[[Sequence[Send]], Sequence[Send]]
    exchange: int = 0

    @property
    def rank(self) -> int:
        return self.inner.rank

    @property
    def size(self) -> int:
        return self.inner.size

    def start(self, sends: Sequence[Send], receives: Sequence[Receive], timeout: float) -> Pending:
        self.exchange += bool(sends)
        spoilt = self.rank == 1 and self.exchange == 2 and sends
        return self.inner.start(self.spoil(sends) if spoilt else sends, receives, min(timeout, 1.0))


def run_with(spoil: Callable[[Sequence[Send]], Sequence[Send]], schedule: Schedule) -> None:
    batch = Batch.draw(CASES["prefill"], 2, 2)
    layout = layout_of(batch, 4, LEAF)
    run_ranks(4, lambda transport: attend_as(Faulty(transport, spoil), batch, layout, schedule))


@pytest.mark.parametrize("schedule", RINGS)
def test_a_dropped_message_is_an_error_in_time(schedule: Schedule) -> None:
    # The sender ends first where it has nothing more to wait for: then it is its leaving that is noticed.
    with pytest.raises((PeerTimeout, PeerGone, MessageMismatch)) as caught:
        run_with(lambda sends: sends[1:], schedule)
    assert caught.value.peer is not None


@pytest.mark.parametrize("schedule", RINGS[:2])
def test_a_message_sent_twice_is_an_error(schedule: Schedule) -> None:
    with pytest.raises(MessageMismatch, match="from rank"):
        run_with(lambda sends: [sends[0], *sends], schedule)


def test_a_message_sent_twice_does_not_pass_for_another_of_its_shape() -> None:
    one, other = group(2)
    keys, values = Send(0, torch.zeros(2)), Send(0, torch.ones(2))
    other.start([keys, keys, values], [], 1)
    with pytest.raises(MessageMismatch, match="one of 3 in exchange 0"):
        one.start([], [Receive(1, (2,), F32)] * 2, 1).wait()


def test_a_tensor_of_another_type_is_an_error() -> None:
    with pytest.raises(MessageMismatch, match=r"torch\.float64; the plan says one of"):
        run_with(lambda sends: [Send(s.peer, s.tensor.double()) for s in sends], Schedule.TOKEN_RING)


def test_an_error_in_one_rank_ends_all_and_is_the_one_raised() -> None:
    batch = Batch.draw(CASES["prefill"], 2, 2)
    layout = layout_of(batch, 4, LEAF)

    def run(transport: Transport) -> object:
        if transport.rank == 2:
            raise ArithmeticError("the weights are gone")
        return attend_as(transport, batch, layout, Schedule.TOKEN_RING)

    start = time.monotonic()
    with pytest.raises(ArithmeticError, match="the weights are gone"):
        run_ranks(4, run)
    assert time.monotonic() - start < 5, "nobody waited out the 20 s that an exchange may take"


def test_a_peer_that_has_ended_is_gone_for_good() -> None:
    one, other = group(2)
    other.start([Send(0, torch.zeros(2))], [], 1).wait()
    other.leave()
    receive = Receive(1, (2,), F32)
    assert one.start([], [receive], 1).wait()[0].tolist() == [0, 0]
    for _ in range(2):
        with pytest.raises(PeerGone, match="rank 1 has ended") as caught:
            one.start([], [receive], 30).wait()
        assert caught.value.peer == 1


def test_a_late_message_is_an_error_and_does_not_pass_for_the_next() -> None:
    one, other = group(2)
    with pytest.raises(PeerTimeout, match="nothing came from rank 1"):
        one.start([], [Receive(1, (2,), F32)], 0.01).wait()
    other.start([Send(0, torch.zeros(2))], [], 1).wait()
    with pytest.raises(
        MessageMismatch, match=r"came one of 1 in exchange 0, \(2,\) .* says one of 1 in exchange 1, \(2,\)"
    ):
        one.start([], [Receive(1, (2,), F32)], 1).wait()


@pytest.mark.parametrize("kind", KINDS)
def test_messages_keep_their_order_and_reach_oneself(kind: type[ThreadTransport]) -> None:
    def run(transport: Transport) -> list[int]:
        ranks = range(transport.size)
        sends = [Send(peer, torch.tensor([10 * i + transport.rank])) for i in range(3) for peer in ranks]
        receives = [Receive(peer, (1,), torch.int64) for _ in range(3) for peer in ranks]
        return [int(tensor) for tensor in transport.start(sends, receives, 5).wait()]

    assert run_ranks(3, run, kind) == [[0, 1, 2, 10, 11, 12, 20, 21, 22]] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_all_gather_gives_every_rank_all(kind: type[ThreadTransport]) -> None:
    def run(transport: Transport) -> list[int]:
        return [int(tensor) for tensor in all_gather(transport, torch.tensor([transport.rank]), 5)]

    assert run_ranks(4, run, kind) == [[0, 1, 2, 3]] * 4


def test_bytes_are_counted_by_peer_and_direction_without_ones_own() -> None:
    def run(transport: Transport) -> Counted:
        counted = Counted(transport)
        to, of = (transport.rank + 1) % 3, (transport.rank - 1) % 3
        sends = [Send(to, torch.zeros(5, 2)), Send(transport.rank, torch.zeros(7))]
        counted.start(sends, [Receive(of, (5, 2), F32), Receive(transport.rank, (7,), F32)], 5).wait()
        return counted

    for rank, counted in enumerate(run_ranks(3, run)):
        assert dict(counted.sent) == {(rank + 1) % 3: 40}
        assert dict(counted.received) == {(rank - 1) % 3: 40}
        assert counted.exchanges == 1


def test_ranks_agree_on_a_plan_or_say_who_does_not() -> None:
    batch = Batch.draw(CASES["prefill"], 2, 2)
    layouts = [layout_of(batch, 3, LEAF), layout_of(batch, 3, None)]
    run_ranks(3, lambda transport: agree(transport, layouts[0], 5))
    with pytest.raises(LayoutError, match="plans another exchange than ranks"):
        run_ranks(3, lambda transport: agree(transport, layouts[transport.rank == 1], 5))
