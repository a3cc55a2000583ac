"""The cost model against what must hold whatever the figures are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from countersign.kernels.ring.cost import CASES, LINKS, RANKS, Case, Machine, planned, seconds

GROUPED = Case(131072, 0, 32, 4, 128, 2)
MESH = LINKS["NVLink 4, full mesh"]


def test_one_rank_only_computes() -> None:
    assert seconds("ring", GROUPED, 1, MESH) == seconds("token-ring", GROUPED, 1, MESH) == GROUPED.work / MESH.rate


def test_with_free_links_ranks_share_the_work_evenly() -> None:
    free = replace(MESH, bandwidth=float("inf"), latency=0.0)
    for ranks in RANKS:
        assert seconds("token-ring", GROUPED, ranks, free) == pytest.approx(GROUPED.work / free.rate / ranks)


def test_grouped_keys_make_a_full_prefill_cheaper_to_pass_than_queries() -> None:
    slow = replace(MESH, bandwidth=1e9)
    assert seconds("ring", GROUPED, 8, slow) < seconds("token-ring", GROUPED, 8, slow) / 4


def test_a_long_cached_prefix_is_cheaper_to_leave_where_it_is() -> None:
    case, slow = Case(2048, 129024, 32, 4, 128, 2), replace(MESH, bandwidth=1e9)
    assert seconds("token-ring", case, 8, slow) < seconds("ring", case, 8, slow) / 2


def test_two_directions_at_once_help_on_a_mesh_and_not_behind_a_switch() -> None:
    case, slow = CASES["prefill of 128 k, 32 heads each"], replace(MESH, bandwidth=1e9)
    switch = replace(slow, topology="switch")
    assert seconds("token-ring", case, 8, slow) < seconds("token-ring", case, 8, switch)
    assert seconds("ring", case, 8, slow) == seconds("ring", case, 8, switch)


def test_ranks_that_share_cores_wait_for_them() -> None:
    machine = Machine(1.0, 1.0, 0.0, cores=2, overhead=0.5)
    assert planned([[1, 1, 1, 1]], machine) == 2.5
    assert planned([[3, 1, 1, 1]], machine) == 3.5  # the slowest rank
