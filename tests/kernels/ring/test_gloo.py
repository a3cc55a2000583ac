"""Ranks as processes over gloo give the bits of ranks as threads, and a peer that fails is a typed error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ring_workers as work
import torch
from ring_cases import CASES, LEAF, Batch, attend_as, layout_of

from countersign.kernels.ring.errors import LayoutError, PeerGone, PeerTimeout
from countersign.kernels.ring.schedule import Schedule
from countersign.kernels.ring.threads import run_ranks

WAYS = [(Schedule.TOKEN_RING, False), (Schedule.PASS_KV, False), (Schedule.GATHER_Q, False), (Schedule.GATHER_Q, True)]


@pytest.fixture(scope="module", params=[2, 4])
def workers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[work.Workers]:
    started = work.Workers(request.param, tmp_path_factory.mktemp("gloo"))
    yield started
    started.close()


@pytest.mark.parametrize("leaf", [LEAF, None])
@pytest.mark.parametrize("name", CASES)
def test_processes_give_the_bits_of_threads(workers: work.Workers, name: str, leaf: int | None) -> None:
    batch, size = Batch.draw(CASES[name], 4, 2, dtype=torch.bfloat16), len(workers.processes)
    for schedule, replicated in WAYS:
        layout = layout_of(batch, size, leaf, replicated)
        threads = run_ranks(size, lambda transport: attend_as(transport, batch, layout, schedule))  # noqa: B023
        processes = workers.run(work.attention, batch, layout, schedule)
        for (rows, out, lse), (theirs, other_out, other_lse) in zip(threads, processes, strict=True):
            assert rows == theirs
            assert torch.equal(out, other_out)
            assert torch.equal(lse, other_lse)


def test_messages_keep_their_order(workers: work.Workers) -> None:
    assert workers.run(work.in_order) == [[0, 1, 2, 3, 4, 5]] * len(workers.processes)


def test_a_message_to_oneself_arrives(workers: work.Workers) -> None:
    assert [t.tolist() for t in workers.run(work.to_itself)] == [[float(r)] * 3 for r in range(len(workers.processes))]


def test_ranks_that_plan_differently_find_out_before_anything_is_sent(workers: work.Workers) -> None:
    assert all(isinstance(error, LayoutError) for error in workers.run(work.plans_of_its_own))


def test_a_strided_tensor_is_refused(workers: work.Workers) -> None:
    assert all("strided tensor" in str(error) for error in workers.run(work.strided))


def test_a_silent_peer_is_an_error_in_time(tmp_path: Path) -> None:
    workers = work.Workers(2, tmp_path)
    try:
        error, other = workers.run(work.silent)
        assert isinstance(error, PeerTimeout)
        assert error.peer == 1
        assert other is None
    finally:
        workers.close()


def test_a_peer_that_dies_in_an_exchange_is_an_error_at_once(tmp_path: Path) -> None:
    workers = work.Workers(2, tmp_path)
    try:
        error, other = workers.run(work.dies)
        assert isinstance(error, PeerGone)
        assert error.peer == 1
        assert isinstance(other, EOFError)
    finally:
        workers.close()
