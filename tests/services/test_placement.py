"""Who computes a prompt, who answers, and that pools which lend machines come to rest."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from countersign.services.protocol.commit import LogState
from countersign.services.protocol.tokens import Tokens
from countersign.services.router.placement import DECODE, PREFILL, Limits, Pools, candidates
from countersign.v1.commit_pb2 import Opened
from countersign.v1.registry_pb2 import Instance, TargetRole
from countersign.v1.router_pb2 import ModelInfo

MIXED = TargetRole.TARGET_ROLE_MIXED
LIMITS = Limits(prompt_tokens=1000, requests=10)
WEIGHTS = b"w" * 32


def target(
    name: str,
    role: TargetRole.ValueType = MIXED,
    tokens: int = 0,
    requests: int = 0,
    *,
    draining: bool = False,
    dtype: str = "fp32",
) -> Instance:
    model = ModelInfo(weights_sha256=WEIGHTS, executor="native", dtype=dtype)
    return Instance(
        instance=name,
        role=role,
        pending_prompt_tokens=tokens,
        active_requests=requests,
        draining=draining,
        model=model,
    )


def names(found: Sequence[Instance]) -> list[str]:
    return [each.instance for each in found]


roles = st.sampled_from([PREFILL, DECODE, MIXED, TargetRole.TARGET_ROLE_UNSPECIFIED])
houses = st.lists(st.tuples(roles, st.integers(0, 3000), st.integers(0, 30)), max_size=8).map(
    lambda drawn: [target(f"t{index}", *each) for index, each in enumerate(drawn)]
)


def test_a_prompt_joins_the_shortest_queue_of_its_pool_then_of_the_mixed_then_none() -> None:
    pools = Pools(LIMITS)
    idle, busy, mixed = target("p1", PREFILL, 100), target("p2", PREFILL, 900), target("m", MIXED, 50)
    answers = target("d", DECODE)
    assert pools.prefiller([busy, idle, mixed, answers]) is idle
    assert pools.prefiller([busy, idle, mixed, answers], {"p1": 950}) is busy
    full = target("p1", PREFILL, 1000)
    assert pools.prefiller([full, mixed, answers]) is mixed
    assert pools.prefiller([full, target("m", MIXED, 1000), answers]) is None
    assert pools.prefiller([mixed, answers]) is None, "nobody is there for it"


def test_requests_go_to_who_answers_then_to_mixed_ones_and_to_prefill_last() -> None:
    pools = Pools(LIMITS)
    house = [
        target("p", PREFILL),
        target("m", MIXED, requests=3),
        target("d1", DECODE, requests=5),
        target("d2", DECODE),
    ]
    assert names(pools.answerers(house)) == ["d2", "d1", "m", "p"]
    house[2].active_requests = 10
    assert names(pools.answerers(house)) == ["d2", "m", "d1", "p"]


def test_among_mixed_targets_the_least_busy_is_asked_first_as_ever() -> None:
    house = [target("b", requests=1), target("c"), target("a", requests=1)]
    assert names(Pools(LIMITS).answerers(house)) == ["c", "a", "b"]


def test_only_those_that_serve_the_weights_and_take_new_requests_are_candidates() -> None:
    house = [target("a"), target("b", draining=True)]
    assert names(candidates(house, log())) == ["a"]
    assert candidates(house, log(b"x" * 32)) == []


def log(weights: bytes = WEIGHTS, arithmetic: str = "", tokens: int = 0) -> LogState:
    opened = Opened(weights_sha256=weights)
    return LogState("r", opened=opened, arithmetic=arithmetic, tokens=Tokens().extended([1] * tokens, 0))


def test_tokens_stay_with_the_arithmetic_that_computed_them() -> None:
    house = [target("a"), target("b", dtype="bf16"), target("c")]
    assert names(candidates(house, log(arithmetic="native fp32", tokens=1))) == ["a", "c"]
    assert names(candidates(house, log(arithmetic="native bf16", tokens=1))) == ["b"]
    assert names(candidates(house, log(arithmetic="eager fp32", tokens=1))) == []
    assert names(candidates(house, log(arithmetic="native bf16"))) == ["a", "b", "c"], "there are none yet"
    assert names(candidates(house, log(tokens=1))) == ["a", "b", "c"], "another release did not say"


@given(houses)
def test_nobody_is_left_out_of_those_who_may_answer(house: list[Instance]) -> None:
    pools = Pools(LIMITS)
    for _ in range(4):
        pools.rebalance(house)
    assert sorted(names(pools.answerers(house))) == sorted(names(house))


@given(houses, st.dictionaries(st.sampled_from([f"t{index}" for index in range(8)]), st.integers(0, 2000)))
def test_who_prefills_is_never_full_and_nobody_of_the_pool_has_less_to_do(
    house: list[Instance], own: dict[str, int]
) -> None:
    def load(each: Instance) -> int:
        return max(each.pending_prompt_tokens, own.get(each.instance, 0))

    found = Pools(LIMITS).prefiller(house, own)
    queue = [load(each) for each in house if each.role == PREFILL]
    if found is None:
        assert not queue or min(queue) >= LIMITS.prompt_tokens
    else:
        assert load(found) < LIMITS.prompt_tokens
        assert found.role != DECODE
        assert load(found) == min(queue) if found.role == PREFILL else min(queue) >= LIMITS.prompt_tokens


def shared(house: list[Instance], tokens: int, requests: int, pools: Pools) -> list[Instance]:
    """The same house with work spread evenly over whoever does it."""

    def serves(each: Instance, kind: int) -> bool:
        return each.role not in {PREFILL, DECODE} or each.role == kind or each.instance in pools.lent

    prompts = [each.instance for each in house if serves(each, PREFILL)]
    answers = [each.instance for each in house if serves(each, DECODE)]
    return [
        target(
            each.instance,
            each.role,
            tokens // len(prompts) if each.instance in prompts else 0,
            requests // len(answers) if each.instance in answers else 0,
        )
        for each in house
    ]


@given(houses.filter(bool), st.integers(0, 20_000), st.integers(0, 300))
def test_under_a_steady_load_pools_come_to_rest_and_drained_ones_get_everybody_back(
    house: list[Instance], tokens: int, requests: int
) -> None:
    pools = Pools(LIMITS)
    history = []
    for _ in range(3 * len(house) + 3):
        pools.rebalance(shared(house, tokens, requests, pools))
        history.append(frozenset(pools.lent))
    assert all(before <= after for before, after in pairwise(history)), "it took one back"
    assert len(set(history[2 * len(house) + 2 :])) == 1, "it has not come to rest"
    for _ in range(len(house) + 1):
        pools.rebalance(shared(house, 0, 0, pools))
    assert not pools.lent


def test_an_overloaded_pool_borrows_the_least_busy_of_the_other_until_its_load_has_drained() -> None:
    pools = Pools(LIMITS)

    def house(tokens: int) -> list[Instance]:
        return [target("p", PREFILL, tokens), target("d1", DECODE, requests=4), target("d2", DECODE, requests=1)]

    pools.rebalance(house(900))
    assert pools.lent == set()
    pools.rebalance(house(1500))
    assert pools.lent == {"d2"}
    found = pools.prefiller(house(1500))
    assert found is not None
    assert found.instance == "d2", "the lent one prefills"
    assert names(pools.answerers(house(1500)))[0] == "d1", "and answers last of those that answer"
    pools.rebalance(house(600))
    assert pools.lent == {"d2"}, "half drained is not drained"
    pools.rebalance(house(100))
    assert pools.lent == set()


def test_a_pool_that_is_loaded_itself_lends_nobody() -> None:
    pools = Pools(LIMITS)
    pools.rebalance([target("p", PREFILL, 1500), target("d1", DECODE, requests=9), target("d2", DECODE, requests=9)])
    assert pools.lent == set()


def test_who_is_gone_or_has_another_role_is_lent_no_more() -> None:
    pools = Pools(LIMITS, lent={"gone", "d"})
    pools.rebalance([target("p", PREFILL, 900), target("d", DECODE)])
    assert pools.lent == {"d"}
    pools.rebalance([target("p", PREFILL, 900), target("d", MIXED)])
    assert pools.lent == set()
