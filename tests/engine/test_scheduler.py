"""The scheduler's rules one by one; test_scheduler_machine.py plays whole engines with it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from countersign.services.engine.errors import EngineError, RequestTooLarge
from countersign.services.engine.scheduler import Plan, Request, Scheduler

PLENTY = 10_000


def request(
    name: str,
    prompt: int = 16,
    most: int = 100,
    *,
    tenant: str = "acme",
    priority: int = 0,
    deadline: int | None = None,
) -> Request:
    return Request(name, tenant, priority, prompt, most, deadline)


def run(scheduler: Scheduler, plan: Plan) -> Plan:
    """What an engine does that accepts no proposal."""
    for name, count in {**dict.fromkeys(plan.decodes, 1), **plan.prefills}.items():
        entry = scheduler._entries[name]
        done = entry.computed + count
        scheduler.computed(name, done, entry.known + (done == entry.known))
    scheduler.check()
    return plan


def decoding(scheduler: Scheduler, *requests: Request) -> None:
    """Submits these and runs passes until the prompts of all are computed."""
    for each in requests:
        scheduler.submit(each)
    while any(entry.computed < entry.request.prompt_tokens for entry in scheduler._entries.values()):
        run(scheduler, scheduler.plan(0, PLENTY))


def refused(action: Callable[[], object], words: str) -> None:
    with pytest.raises(EngineError, match=words):
        action()


# A pass


def test_decodes_come_first_and_prefill_gets_the_budget_that_is_left() -> None:
    scheduler = Scheduler(PLENTY, budget=64, chunk=60)
    decoding(scheduler, request("a"), request("b"))
    scheduler.submit(request("new", 500))
    assert scheduler.decodes() == ["a", "b"]
    plan = scheduler.plan(0, PLENTY, {"a": 3, "b": 4})
    assert (plan.decodes, plan.prefills, plan.admitted) == ({"a": 3, "b": 4}, {"new": 64 - 9}, ["new"])


def test_a_chunk_is_never_longer_than_the_limit_and_others_get_the_rest() -> None:
    scheduler = Scheduler(PLENTY, budget=64, chunk=40)
    for name in ("a", "b", "c"):
        scheduler.submit(request(name, 100))
    plan = run(scheduler, scheduler.plan(0, PLENTY))
    assert (plan.prefills, plan.admitted) == ({"a": 40, "b": 24}, ["a", "b"])
    assert run(scheduler, scheduler.plan(0, PLENTY)).prefills == {"a": 40, "b": 24}
    assert run(scheduler, scheduler.plan(0, PLENTY)).prefills == {"a": 20, "b": 40, "c": 4}


def test_a_full_house_of_decodes_leaves_a_quarter_of_the_budget_to_the_first_prefill() -> None:
    scheduler = Scheduler(PLENTY, budget=64, room=8)
    house = [f"d{number}" for number in range(40)]
    decoding(scheduler, *(request(name) for name in house))
    scheduler.submit(request("new", 500))
    scheduler.submit(request("newer", 500))
    plan = scheduler.plan(0, PLENTY, dict.fromkeys(house, 8))
    assert plan.prefills == {"new": 16}
    assert list(plan.decodes) == house
    assert sum(plan.decodes.values()) == 64 - 40 - 16


def test_decodes_beyond_the_budget_take_turns() -> None:
    scheduler = Scheduler(PLENTY, budget=8, chunk=8)
    decoding(scheduler, *(request(str(number), 1) for number in range(12)))
    plans = [run(scheduler, scheduler.plan(0, PLENTY)) for _ in range(3)]
    assert [len(plan.decodes) for plan in plans] == [8, 8, 8]
    assert [sum(str(number) in plan.decodes for plan in plans) for number in range(12)] == [2] * 12


@pytest.mark.parametrize(
    ("wanted", "granted"),
    [([9, 9, 9], [4, 4, 3]), ([1, 9, 9], [1, 5, 5]), ([2, 2, 2], [2, 2, 2]), ([0, 0, 20], [0, 0, 8])],
)
def test_short_of_tokens_proposals_are_cut_evenly(wanted: list[int], granted: list[int]) -> None:
    scheduler = Scheduler(PLENTY, budget=14, chunk=14, room=8)
    names = ["a", "b", "c"]
    decoding(scheduler, *(request(name, 1) for name in names))
    plan = scheduler.plan(0, PLENTY, dict(zip(names, wanted, strict=True)))
    assert list(plan.decodes.values()) == granted


def test_short_of_pages_proposals_are_cut_to_what_is_left_in_the_page() -> None:
    scheduler = Scheduler(PLENTY)
    decoding(scheduler, request("edge", 16), request("middle", 20))
    plan = scheduler.plan(0, 1, {"edge": 20, "middle": 20})
    # The free page goes to the first's own token, where 15 slots are left; the second has 11 in the page it holds.
    assert (plan.decodes, plan.preempted) == ({"edge": 15, "middle": 11}, [])


def test_a_prefill_takes_no_page_that_is_not_there() -> None:
    scheduler = Scheduler(PLENTY)
    scheduler.submit(request("long", 100))
    assert run(scheduler, scheduler.plan(0, 7)).prefills == {"long": 100}
    scheduler.submit(request("longer", 500))
    assert scheduler.plan(0, PLENTY).prefills == {"longer": 256}
    assert scheduler.plan(0, 2).prefills == {"longer": 32}


# Admission


def test_a_request_is_admitted_when_its_prompt_fits_and_everybody_could_take_one_page_more() -> None:
    scheduler = Scheduler(PLENTY)
    decoding(scheduler, request("a", 20), request("b", 20))
    scheduler.submit(request("new", 40))
    assert scheduler.plan(0, 5).admitted == []
    assert scheduler.plan(0, 6).admitted == ["new"]


def test_pages_promised_to_a_prompt_are_not_given_away() -> None:
    scheduler = Scheduler(PLENTY, budget=32, chunk=16)
    scheduler.submit(request("first", 160))
    run(scheduler, scheduler.plan(0, 20))
    scheduler.submit(request("second", 160))
    # 19 free, 9 promised: 10 left for 10 and two to grow.
    assert scheduler.plan(0, 19).admitted == []
    assert scheduler.plan(0, 21).admitted == ["second"]


def test_alone_a_request_may_fill_the_cache() -> None:
    scheduler = Scheduler(10, room=0)
    scheduler.submit(request("all", 159, 1))
    assert scheduler.plan(0, 9).admitted == []
    assert scheduler.plan(0, 10).admitted == ["all"]


def test_a_small_request_does_not_pass_one_that_waits_for_room() -> None:
    scheduler = Scheduler(PLENTY)
    decoding(scheduler, request("a"))
    scheduler.submit(request("large", 800))
    scheduler.submit(request("small"))
    assert scheduler.plan(0, 20).admitted == []
    assert scheduler.plan(0, 60).admitted == ["large", "small"]


def test_a_request_that_adopts_a_prefix_needs_no_more_than_its_plan_says() -> None:
    scheduler = Scheduler(PLENTY)
    decoding(scheduler, request("d", 15))
    scheduler.submit(request("long", 320))
    plan = scheduler.plan(0, 22, {"d": 40})
    # 20 pages are kept for the prompt, all of which it may adopt but for the last: two are left for proposals.
    assert (plan.admitted, plan.decodes) == (["long"], {"d": 32})
    scheduler.adopted("long", 304)
    assert scheduler.plan(0, 1).prefills == {"long": 16}


def test_who_can_never_fit_is_refused_with_the_number_that_would() -> None:
    scheduler = Scheduler(10, room=20)
    with pytest.raises(RequestTooLarge, match=r"129 tokens.*at most 128") as failure:
        scheduler.submit(request("large", 100, 29))
    assert (failure.value.tokens, failure.value.fits, len(scheduler)) == (129, 128, 0)
    scheduler.submit(request("fits", 100, 28))
    assert "fits" in scheduler


def test_a_held_request_is_left_out_until_it_is_released() -> None:
    scheduler = Scheduler(PLENTY)
    scheduler.submit(request("a"))
    scheduler.hold("a")
    assert scheduler.plan(0, PLENTY) == Plan({}, {}, [], [], [], [])
    scheduler.release("a")
    assert scheduler.plan(0, PLENTY).prefills == {"a": 16}
    scheduler.hold("a")
    scheduler.hold("a")
    assert scheduler.plan(0, PLENTY).prefills == {}
    scheduler.release("a")
    assert run(scheduler, scheduler.plan(0, PLENTY)).prefills == {"a": 16}
    scheduler.hold("a")
    assert (scheduler.decodes(), scheduler.plan(0, PLENTY).decodes) == ([], {})
    scheduler.release("a")
    assert scheduler.decodes() == ["a"]


# Order of admission


def admissions(scheduler: Scheduler, count: int, now: int = 0) -> list[str]:
    """Who is admitted, one a plan, each removed at once."""
    order: list[str] = []
    for _ in range(count):
        order += scheduler.plan(now, PLENTY).admitted
        scheduler.remove(order[-1])
    return order


def one_by_one(**options: int) -> Scheduler:
    """Admits one request a plan."""
    return Scheduler(PLENTY, budget=1, chunk=1, **options)


def test_a_higher_priority_is_admitted_first() -> None:
    scheduler = one_by_one()
    for name, priority in (("low", -3), ("middle", 0), ("high", 7)):
        scheduler.submit(request(name, priority=priority))
    assert admissions(scheduler, 3) == ["high", "middle", "low"]


def test_a_priority_that_waits_outweighs_one_more_each_so_many_plans() -> None:
    scheduler = one_by_one(aging=5)
    for number in range(40):
        scheduler.submit(request(f"high{number}", priority=2))
    for number in range(2):
        scheduler.submit(request(f"low{number}", priority=0))
    order = admissions(scheduler, 30)
    # Two priorities are worth ten plans since it was served last, and at a tie the higher is first.
    assert [order.index("low0"), order.index("low1")] == [11, 23]


def test_among_equals_the_earlier_deadline_is_first_and_none_counts_as_due_after_a_while() -> None:
    scheduler = one_by_one(patience=1000)
    for name, deadline in (("none", None), ("far", 5000), ("later", 900), ("soon", 500)):
        scheduler.submit(request(name, deadline=deadline))
    assert admissions(scheduler, 4) == ["soon", "later", "none", "far"]


def test_a_stream_of_deadlines_passes_a_request_without_one_for_a_while_only() -> None:
    scheduler = one_by_one(patience=50)
    scheduler.submit(request("none"))
    for now in range(0, 100, 10):
        scheduler.submit(request(f"due{now}", deadline=now + 15))
        if admissions(scheduler, 1, now) == ["none"]:
            assert now == 40
            return
    pytest.fail("starved")


def test_the_tenant_that_has_got_least_is_admitted_next() -> None:
    scheduler = one_by_one()
    for number in range(4):
        scheduler.submit(request(f"long{number}", 16, tenant="long"))
    for number in range(8):
        scheduler.submit(request(f"short{number}", 8, tenant="short"))
    assert [name[0] for name in admissions(scheduler, 12)] == [*"lss" * 4]


def test_an_output_token_costs_a_tenant_as_much_as_two_of_a_prompt() -> None:
    scheduler = Scheduler(PLENTY)
    decoding(scheduler, request("a", 20))
    share = scheduler._levels[0].shares["acme"]
    assert share.counter == 20 + 2
    scheduler.plan(0, PLENTY, {"a": 4})
    scheduler.computed("a", 24, 25)
    assert share.counter == 20 + 2 * 5


def test_time_in_which_a_tenant_wanted_nothing_is_not_saved_up() -> None:
    scheduler = one_by_one()
    for number in range(40):
        scheduler.submit(request(f"busy{number}", tenant="busy"))
    admissions(scheduler, 20)
    for number in range(20):
        scheduler.submit(request(f"late{number}", tenant="late"))
    order = admissions(scheduler, 20)
    assert sum(name.startswith("late") for name in order) == 10


def test_a_tenant_is_lifted_to_the_last_that_waited_when_nobody_waits() -> None:
    scheduler = one_by_one()
    decoding(scheduler, request("busy", 16, tenant="busy"))
    for _ in range(10):
        run(scheduler, scheduler.plan(0, PLENTY))
    scheduler.submit(request("late", tenant="late"))
    shares = scheduler._levels[0].shares
    assert shares["late"].counter == shares["busy"].counter > 20


def test_tenants_that_are_gone_are_forgotten() -> None:
    scheduler = one_by_one()
    decoding(scheduler, request("stays", 1, 5000, tenant="stays"))
    for number in range(1000):
        scheduler.submit(request(f"guest{number}", tenant=f"guest{number}"))
        run(scheduler, scheduler.plan(0, PLENTY))
        scheduler.remove(f"guest{number}")
    assert len(scheduler._levels[0].shares) < 5
    scheduler.remove("stays")
    assert not scheduler._levels


# Preemption


def test_nobody_is_preempted_while_every_decode_has_its_page() -> None:
    scheduler = Scheduler(PLENTY)
    decoding(scheduler, request("a", 16), request("b", 16), request("c", 17))
    plan = scheduler.plan(0, 2, dict.fromkeys("abc", 64))
    assert (plan.decodes, plan.preempted) == ({"a": 15, "b": 15, "c": 14}, [])


@pytest.mark.parametrize(
    ("requests", "victim"),
    [
        ([request("a"), request("b", priority=-1), request("c")], "b"),
        ([request("a"), request("b"), request("c")], "c"),
        ([request("a", tenant="x"), request("b", tenant="used"), request("c", tenant="x")], "b"),
        ([request("a", tenant="used"), request("b", tenant="x"), request("c", tenant="x")], "c"),
    ],
    ids=["the lowest priority", "the latest arrival", "of the tenant that used most", "but never the most senior"],
)
def test_the_victim_is(requests: list[Request], victim: str) -> None:
    scheduler = Scheduler(PLENTY)
    decoding(scheduler, *requests)
    used = next((share for share in scheduler._levels[0].shares.values() if share.tenant == "used"), None)
    if used is not None:
        used.counter += 1000
    for name in ("a", "b", "c"):
        scheduler.computed(name, 32, 33)
    plan = scheduler.plan(0, 1)
    assert (list(plan.decodes), plan.preempted) == (["a"], [victim])


def test_age_protects_from_preemption_in_the_end() -> None:
    scheduler = Scheduler(PLENTY, aging=10)
    decoding(scheduler, request("old", priority=0, most=1000))
    while scheduler._tick < 35:
        run(scheduler, scheduler.plan(0, PLENTY))
    decoding(scheduler, request("new", priority=2, most=1000))
    scheduler.computed("old", 96, 97)
    scheduler.computed("new", 97, 98)
    plan = scheduler.plan(0, 0)
    assert (list(plan.decodes), plan.preempted) == ([], ["new"])


def test_pages_of_the_preempted_serve_the_next_plan_and_it_is_computed_anew() -> None:
    scheduler = Scheduler(PLENTY)
    decoding(scheduler, request("a", 16), request("b", 40))
    scheduler.computed("a", 32, 33)
    known = scheduler._entries["b"].known
    plan = run(scheduler, scheduler.plan(0, 0))
    assert (plan.decodes, plan.prefills, plan.admitted, plan.preempted) == ({}, {}, [], ["b"])
    plan = run(scheduler, scheduler.plan(0, 3))
    assert (plan.decodes, plan.admitted) == ({"a": 0}, [])
    plan = run(scheduler, scheduler.plan(0, 6))
    assert (plan.prefills, plan.admitted) == ({"b": known}, ["b"])
    outputs = scheduler._entries["a"].known - 16 + scheduler._entries["b"].known - 40
    assert scheduler._levels[0].shares["acme"].counter == 16 + 40 + 2 * outputs


def test_nobody_is_admitted_while_somebody_is_preempted() -> None:
    scheduler = Scheduler(PLENTY)
    decoding(scheduler, request("a"), request("b", 17))
    scheduler.submit(request("urgent", 1, priority=5))
    scheduler.computed("a", 32, 33)
    plan = scheduler.plan(0, 0)
    assert (plan.preempted, plan.admitted) == (["b"], [])


def test_a_prefill_that_is_most_senior_gets_its_page_too() -> None:
    scheduler = Scheduler(PLENTY, budget=48, chunk=32)
    scheduler.submit(request("senior", 100, priority=1))
    run(scheduler, scheduler.plan(0, PLENTY))
    scheduler.submit(request("junior", 16))
    run(scheduler, scheduler.plan(0, PLENTY))
    assert scheduler.plan(0, 0).preempted == ["junior"]
    assert scheduler.plan(0, 1).prefills == {"senior": 16}


def test_a_held_request_is_no_victim() -> None:
    scheduler = Scheduler(PLENTY)
    decoding(scheduler, request("a"), request("b"), request("c"))
    scheduler.computed("a", 32, 33)
    scheduler.hold("c")
    plan = scheduler.plan(0, 0)
    assert plan.preempted == ["b"]
    assert scheduler.plan(0, 0).preempted == []


# Ends


def test_what_is_past_its_deadline_is_forgotten_whatever_its_state() -> None:
    scheduler = Scheduler(PLENTY)
    decoding(scheduler, request("runs", deadline=30))
    scheduler.submit(request("waits", deadline=20))
    scheduler.submit(request("held", deadline=20))
    scheduler.submit(request("lives", deadline=31))
    scheduler.hold("held")
    assert (scheduler.next_deadline, scheduler.plan(19, 0).expired) == (20, [])
    assert scheduler.plan(20, 0).expired == ["waits", "held"]
    plan = scheduler.plan(30, PLENTY, {"runs": 3})
    assert (plan.expired, plan.decodes, plan.admitted) == (["runs"], {}, ["lives"])
    assert (len(scheduler), scheduler.running, scheduler.next_deadline) == (1, 1, 31)
    scheduler.check()


def test_a_request_is_removed_from_any_state() -> None:
    scheduler = Scheduler(PLENTY)
    decoding(scheduler, request("runs"), request("held", deadline=9))
    scheduler.submit(request("waits", deadline=8))
    scheduler.submit(request("waits held"))
    scheduler.hold("held")
    scheduler.hold("waits held")
    for name in ("runs", "held", "waits", "waits held", "never there"):
        scheduler.remove(name)
        scheduler.check()
    assert (len(scheduler), scheduler.next_deadline, scheduler.plan(0, PLENTY)) == (
        0,
        None,
        Plan({}, {}, [], [], [], []),
    )


def test_what_makes_no_sense_is_refused() -> None:
    scheduler = Scheduler(PLENTY)
    scheduler.submit(request("a", 40, 10))
    refused(lambda: scheduler.submit(request("a")), "scheduled already")
    refused(lambda: scheduler.submit(request("b", 0)), "a prompt token")
    refused(lambda: scheduler.submit(request("b", 1, 0)), "at least one more")
    refused(lambda: scheduler.computed("a", 16, 40), "it is waiting")
    refused(lambda: scheduler.adopted("a", 16), "it is waiting")
    scheduler.plan(0, PLENTY)
    refused(lambda: scheduler.adopted("a", 15), "cannot adopt 15 tokens")
    refused(lambda: scheduler.adopted("a", 48), "cannot adopt 48 tokens")
    scheduler.adopted("a", 32)
    refused(lambda: scheduler.published("a", 1), "cannot share 1 pages")
    refused(lambda: scheduler.adopted("a", 16), "KV for 32 of 40")
    for tokens, known in ((16, 40), (41, 40), (40, 39), (50, 51)):
        refused(lambda tokens=tokens, known=known: scheduler.computed("a", tokens, known), "cannot have")  # type: ignore[misc]
    for action in (scheduler.hold, scheduler.release):
        refused(lambda action=action: action("b"), "request b is not")  # type: ignore[misc]
    assert scheduler._entries["a"].computed == 32


@pytest.mark.parametrize(
    ("what", "breaks"),
    [
        ("tokens with KV", lambda s: setattr(s._entries["waits"], "computed", 1)),
        ("running requests", lambda s: s._running.clear()),
        ("deadlines", lambda s: s._deadlines.clear()),
        ("queues", lambda s: s._levels[0].shares["acme"].queue.clear()),
        ("waiting tenants", lambda s: s._levels[0].waiting.clear()),
        ("tenants", lambda s: setattr(s._levels[0].shares["acme"], "members", 1)),
        ("priorities", lambda s: setattr(s._levels[0], "members", 1)),
    ],
)
def test_the_check_finds(what: str, breaks: Callable[[Scheduler], None]) -> None:
    scheduler = Scheduler(PLENTY)
    decoding(scheduler, request("runs"))
    scheduler.submit(request("waits", deadline=5))
    scheduler.check()
    breaks(scheduler)
    refused(scheduler.check, f"scheduler's {what} are not")
