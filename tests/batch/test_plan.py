"""The pure part of a batch: its prefix tree, groups, order, and what is in flight, against brute force."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import event, example, given
from hypothesis import strategies as st

from countersign.batch.admission import Admission
from countersign.batch.plan import BatchPlan, Job, plan_batch, shareable
from countersign.batch.prefix_tree import PrefixTree

PAGE = 16


@st.composite
def nested(draw: st.DrawFn, most: int = 12) -> list[list[int]]:
    """Prompts that are grown from each other: long common beginnings, twins, and one inside another."""
    prompts: list[list[int]] = []
    for number in range(draw(st.integers(1, most))):
        base = draw(st.sampled_from([[], *prompts]))
        kept = base[: draw(st.integers(0, len(base)))]
        own = draw(st.integers(0, 40)) if kept else draw(st.integers(1, 40))
        # Ids that need more than one byte sort as numbers too.
        prompts.append([*kept, *([draw(st.sampled_from((1, 2, 300, 70_000)))] + [number] * own)[:own]])
    return prompts


jobs_of = nested().flatmap(
    lambda prompts: st.lists(st.integers(1, 60), min_size=len(prompts), max_size=len(prompts)).map(
        lambda most: [Job(prompt, count) for prompt, count in zip(prompts, most, strict=True)]
    )
)


def prefixes(prompts: Sequence[Sequence[int]]) -> set[tuple[int, ...]]:
    """Every beginning of any of these, of one token or more."""
    return {tuple(prompt[: end + 1]) for prompt in prompts for end in range(len(prompt))}


def common(prompts: Sequence[Sequence[int]]) -> int:
    return next((i for i in range(min(map(len, prompts))) if len({p[i] for p in prompts}) > 1), min(map(len, prompts)))


@given(nested())
def test_the_tree_has_an_edge_for_each_token_that_is_computed_once(prompts: list[list[int]]) -> None:
    tree = PrefixTree(prompts)
    assert tree.prompt_tokens == sum(map(len, prompts))
    assert tree.distinct_tokens == len(prefixes(prompts))
    assert [prompts[index] for index in tree.order] == sorted(prompts)
    for first in range(len(prompts)):
        part = [prompts[index] for index in tree.order[first:]]
        assert tree.distinct(first, len(prompts)) == len(prefixes(part))


@given(nested())
def test_each_node_holds_just_those_that_share_its_prefix(prompts: list[list[int]]) -> None:
    tree = PrefixTree(prompts)
    ordered = [prompts[index] for index in tree.order]
    shared = {(0, len(prompts))}
    for first in range(len(ordered)):
        for end in range(first + 2, len(ordered) + 1):
            depth = common(ordered[first:end])
            whole = [p for p in ordered if p[:depth] == ordered[first][:depth]]
            if depth and len(whole) == end - first:
                shared.add((first, end))
    assert {(node.first, node.end) for node in tree.nodes} == shared
    for node in tree.nodes[:-1]:
        assert node.depth == common(ordered[node.first : node.end])
        assert node.parent is not None
        above = tree.nodes[node.parent]
        assert above.first <= node.first
        assert node.end <= above.end
        assert above.depth < node.depth
    deepest = tree.deepest()
    for place in range(len(ordered)):
        around = [node for node in tree.nodes if node.first <= place < node.end]
        assert tree.nodes[deepest[place]] == max(around, key=lambda node: (node.depth, node.first - node.end))


def best(prompts: Sequence[Sequence[int]]) -> int:
    """The most that groups of one prefix each can save: all ways to part the prompts are tried."""
    shared = [
        shareable(common([p for i, p in enumerate(prompts) if part >> i & 1])) for part in range(1, 1 << len(prompts))
    ]
    saved = [0]
    for left in range(1, 1 << len(prompts)):
        first, part, most = left & -left, left, 0
        while part:
            if part & first:
                most = max(most, (part.bit_count() - 1) * shared[part - 1] + saved[left ^ part])
            part = (part - 1) & left
        saved.append(most)
    return saved[-1]


@given(jobs_of)
def test_each_job_is_in_one_group_whose_prefix_it_has(jobs: list[Job]) -> None:
    plan = plan_batch(jobs)
    assert sorted(plan.order) == list(range(len(jobs)))
    assert sorted(job for group in plan.groups for job in group.jobs) == list(range(len(jobs)))
    for group in plan.groups:
        prompts = [jobs[job].token_ids for job in group.jobs]
        assert list(group.jobs) == sorted(group.jobs, key=plan.order.index)
        assert group.prefix % PAGE == 0
        assert len(prompts) == 1 if group.prefix == 0 else group.prefix <= common(prompts)
    assert plan.saved == sum((len(group.jobs) - 1) * group.prefix for group in plan.groups)
    assert plan.saved <= plan.tree.prompt_tokens - plan.tree.distinct_tokens
    event(f"groups: {min(len(plan.groups), 4)}")


@given(nested(most=9))
@example([[1] * 16] * 2 + [[1] * 16 + [2] * 32] * 2)
@example([[1] * 16 + [token] * 16 * (token > 0) for token in (0, 2, 0, 3, 0, 2, 3, 3, 2)])
def test_no_groups_of_one_prefix_save_more(prompts: list[list[int]]) -> None:
    assert plan_batch([Job(prompt, 1) for prompt in prompts]).saved == best(prompts)


@given(jobs_of)
def test_all_that_begin_with_a_prefix_follow_each_other(jobs: list[Job]) -> None:
    """So that a cache that holds one path of the tree computes each of its tokens once."""
    plan = plan_batch(jobs)
    ordered = [tuple(jobs[index].token_ids) for index in plan.order]
    for prefix in prefixes(ordered):
        places = [place for place, prompt in enumerate(ordered) if prompt[: len(prefix)] == prefix]
        assert places == list(range(places[0], places[-1] + 1))


def test_of_what_stands_side_by_side_the_higher_share_of_decoding_goes_first() -> None:
    long, short = list(range(100, 164)), list(range(200, 264))
    jobs = [
        Job([*long, 1], 5),
        Job([*short, 1], 80),
        Job([*long, 2], 7),
        Job([*short, 2], 90),
        Job([9] * 10, 1000),
        Job([8] * 500, 1),
    ]
    plan = plan_batch(jobs)
    assert list(plan.order) == [4, 3, 1, 2, 0, 5]
    assert [(group.prefix, list(group.jobs)) for group in plan.groups] == [
        (0, [4]),
        (64, [3, 1]),
        (64, [2, 0]),
        (0, [5]),
    ]


def test_a_batch_of_none_and_of_twins() -> None:
    assert (list(plan_batch([]).order), plan_batch([]).tree.distinct_tokens) == ([], 0)
    plan = plan_batch([Job([5] * 40, 3)] * 3)
    assert (plan.saved, plan.tree.distinct_tokens) == (2 * 32, 40)


def test_prefixes_nested_a_thousand_deep_are_no_deeper_for_the_planner() -> None:
    jobs = [Job([7] * length, 1) for length in range(1, 1500)]
    plan = plan_batch(jobs)
    assert plan.tree.distinct_tokens == 1499
    admission = Admission(plan, jobs, 4000, 100)
    while not admission.over:
        for job in admission.admit():
            admission.done(job)


def pages_of(jobs: Sequence[Job]) -> int:
    """Pages that these hold at once, whole answers included: a full page of the prompt once, whoever has it."""
    shared = {tuple(job.token_ids[:end]) for job in jobs for end in range(PAGE, len(job.token_ids) + 1, PAGE)}
    own = [-(-(len(job.token_ids) + job.max_tokens) // PAGE) - len(job.token_ids) // PAGE for job in jobs]
    return len(shared) + sum(own)


@given(jobs_of, st.integers(1, 400), st.integers(1, 6), st.randoms(use_true_random=False))
def test_what_is_in_flight_fits_the_cache_and_nothing_that_fits_waits(
    jobs: list[Job], tokens: int, most: int, random: Random
) -> None:
    plan: BatchPlan = plan_batch(jobs)
    admission = Admission(plan, jobs, tokens, most)
    flying: list[int] = []
    started: list[int] = []
    while not admission.over:
        for job in admission.admit():
            flying.append(job)
            started.append(job)
        assert flying
        assert len(flying) == admission.flying <= most
        held = pages_of([jobs[job] for job in flying])
        assert held <= tokens // PAGE or len(flying) == 1
        waiting = [job for job in plan.order if job not in started]
        if waiting and len(flying) < most:
            assert pages_of([jobs[job] for job in [*flying, waiting[0]]]) > tokens // PAGE
        job = random.choice(flying)
        flying.remove(job)
        admission.done(job)
    assert started == list(plan.order)


def test_what_was_done_before_is_not_run_again() -> None:
    jobs = [Job([number] * 20, 1) for number in range(4)]
    admission = Admission(plan_batch(jobs), jobs, 10_000, 100)
    admission.skip({1, 2})
    assert sorted(admission.admit()) == [0, 3]
    with pytest.raises(KeyError):
        admission.done(1)
