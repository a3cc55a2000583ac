"""The simulated fleets of ``countersign bench split``: right where queueing theory knows the answer, and whole."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from countersign.cli import bench

FLEET: Any = bench.load("fleet")
SPLIT: Any = bench.load("split")
PASSES: Any = bench.load("passes")
COST = FLEET.Cost(base=0.004, decode=0.0002, prefill=0.0001, key=1e-8)
CONVERSATION = FLEET.CONVERSATION


@pytest.mark.parametrize("busy", [0.5, 0.7, 0.85])
def test_one_machine_with_prompts_of_one_length_waits_as_an_m_d_1_queue(busy: float) -> None:
    service = 0.1
    cost = FLEET.Cost(base=0.0, decode=0.0, prefill=service / 100, key=0.0)
    requests = FLEET.Load("fixed", 100, 1, spread=0.0).requests(busy / service, 60_000, seed=3)
    result = FLEET.Fleet(cost, 1, "unsplit", budget=100).serve(requests)
    waited = sum(request.ttft for request in requests) / len(requests) - service
    busy = service * len(requests) / requests[-1].arrival  # as it turned out
    # Pollaczek and Khinchine.
    assert waited == pytest.approx(busy * service / (2 * (1 - busy)), rel=0.06)
    assert result.seconds == pytest.approx(requests[-1].arrival, rel=0.01)


def test_a_request_alone_takes_the_passes_that_it_needs() -> None:
    request = FLEET.Request(arrival=1.0, prompt=1000, output=5)
    result = FLEET.Fleet(COST, 1, "unsplit", budget=512).serve([request])
    prompt = 2 * COST.base + COST.prefill * 1000 + COST.key * 1000 * 1000 / 2
    assert request.ttft == pytest.approx(prompt)
    answer = 4 * (COST.base + COST.decode) + COST.key * (1001 + 1002 + 1003 + 1004)
    assert request.last - request.first == pytest.approx(answer)
    assert sum(weight for _, weight in result.gaps) == 4


def test_a_split_request_pays_the_handover_and_the_rest_of_its_prompt_and_decodes_as_fast() -> None:
    requests = [FLEET.Request(arrival=0.0, prompt=1000, output=5) for _ in range(2)]
    for request, policy in zip(requests, ("unsplit", "split"), strict=True):
        FLEET.Fleet(COST, 2, policy, prefill=1).serve([request])
    whole, split = requests
    rest = COST.base  # of one pass more
    more = COST.handover + COST.token * (1000 - FLEET.Fleet.REST) + rest
    assert split.ttft - whole.ttft == pytest.approx(more, rel=1e-6)
    assert split.gap == pytest.approx(whole.gap)


def test_prompts_hold_up_the_answers_of_unsplit_machines_and_not_of_split_ones() -> None:
    gaps = {}
    for policy in ("unsplit", "split"):
        trial = FLEET.Trial(COST, CONVERSATION, 4, policy, prefill=2, each=40)
        gaps[policy] = trial.at(2.5).gap(0.99)
    assert gaps["split"] < 0.5 * gaps["unsplit"]


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(FLEET.POLICIES),
    st.integers(2, 6),
    st.integers(1, 5),
    st.floats(0.1, 20),
    st.sampled_from([1.0, 3.0]),
)
def test_every_request_gets_all_its_tokens_and_no_machine_keeps_any(
    policy: str, machines: int, prefill: int, rate: float, burst: float
) -> None:
    load = replace(CONVERSATION, burst=burst)
    requests = load.requests(rate * machines, 20 * machines, seed=7)
    prompts = [request.prompt for request in requests]
    fleet = FLEET.Fleet(COST, machines, policy, prefill=min(prefill, machines - 1))
    result = fleet.serve(requests)
    assert [request.prompt for request in requests] == prompts
    assert all(request.computed == request.prompt for request in requests)
    assert sum(weight for _, weight in result.gaps) == sum(request.output - 1 for request in requests)
    assert all(request.last >= request.first >= request.arrival for request in requests)
    for machine in fleet.machines:
        assert (machine.active_requests, machine.pending_prompt_tokens, machine.running) == (0, 0, 0)
        assert machine.keys == pytest.approx(0, abs=1e-6)


def test_bursts_are_as_frequent_as_poisson_arrivals_and_come_closer_together() -> None:
    even, bursty = (replace(CONVERSATION, burst=burst).requests(2.0, 4000, seed=1) for burst in (1.0, 3.0))
    for requests in (even, bursty):
        assert requests[-1].arrival == pytest.approx(2000, rel=0.15)

    def close(requests: list[Any]) -> int:
        arrivals = [request.arrival for request in requests]
        return sum(later - before < 0.05 for before, later in pairwise(arrivals))

    assert close(bursty) > 3 * close(even)


def test_the_line_of_passes_that_lie_on_one_is_that_line() -> None:
    line = (5e-4, 2e-4, 1e-4, 1e-7)
    shapes = [(d, p, 100.0 * d + p * p / 2) for d in (0, 1, 16) for p in (0, 64, 256) if d + p]
    found = PASSES.fit([(shape, PASSES.line_of(line, shape)) for shape in shapes])
    assert found == pytest.approx(line)


def test_a_curve_breaks_even_where_it_passes_one() -> None:
    assert SPLIT.break_even([1, 4, 16], [0.5, 1.5, 2]) == pytest.approx([2.0])
    assert SPLIT.break_even([1, 4, 16], [0.5, 0.6, 0.7]) == []
    assert SPLIT.break_even([1, 100], [2, 0.5]) == pytest.approx([100 ** (2 / 3)])


def test_the_quick_fleets_give_every_figure_and_the_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = SPLIT._fleets(COST, quick=True)
    assert all(row.bench == "split" and row.value >= 0 for row in rows)
    curves = {row.case for row in rows if row.metric.startswith(SPLIT.GOODPUT)}
    assert len(curves) == 4
    told = {row.case for row in rows if row.metric.startswith("breaks even") or " at all " in row.metric}
    assert told == curves, "a curve without a word on where splitting pays"
    assert all(file.stat().st_size > 1000 for file in SPLIT.plot(rows, tmp_path))
