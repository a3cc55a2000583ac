"""Whole engines on the scheduler: what no sequence of events breaks, that nobody starves, and fairness.

The engine is played: its cache counts pages as the paged one does, shared prefixes included, and what the model would
accept is drawn. Every plan is checked from outside before it is run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import Phase, event, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from countersign.services.engine.errors import RequestTooLarge
from countersign.services.engine.scheduler import Plan, Request, Scheduler

PAGE = 16
# To explain a failure takes longer than to find it.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)


def whole(tokens: int) -> int:
    """Pages for so many tokens, counted without the scheduler's arithmetic."""
    return len(range(0, tokens, PAGE))


class Cache:
    """Pages with holders, and the table of each request."""

    def __init__(self, pages: int) -> None:
        self.free = list(range(pages))
        self.holders: Counter[int] = Counter()
        self.tables: dict[str, list[int]] = {}

    def grow(self, name: str, tokens: int) -> int:
        """Takes what a request of so many tokens lacks."""
        table = self.tables.setdefault(name, [])
        taken = max(0, whole(tokens) - len(table))
        assert taken <= len(self.free), f"{name} needs {taken} pages, {len(self.free)} are free"
        pages = [self.free.pop() for _ in range(taken)]
        self.holders.update(pages)
        table += pages
        return taken

    def share(self, name: str, donor: str, pages: int) -> list[int]:
        """In place of its own; those of them that came free are the caller's to return."""
        own = self.cut(name, 0)
        self.tables[name] = self.tables[donor][:pages]
        self.holders.update(self.tables[name])
        return own

    def cut(self, name: str, tokens: int) -> list[int]:
        """Gives back what is behind so many tokens; the pages that came free are the caller's to return."""
        table = self.tables.setdefault(name, [])
        surplus = table[whole(tokens) :]
        del table[whole(tokens) :]
        self.holders.subtract(surplus)
        return [page for page in surplus if not self.holders[page]]


@dataclass
class Sequence:
    """What the engine knows of a request. ``submitted``, ``arrived``: plans made and calls before it came; ``bad``: its
    numbers are not finite, so that nobody gets its pages; ``published``: how many others find.
    """

    request: Request
    submitted: int
    arrived: int
    bad: bool = False
    published: int = 0
    length: int = 0
    known: int = 0
    running: bool = False
    held: bool = False
    served: int = 0

    @property
    def most(self) -> int:
        return self.request.prompt_tokens + self.request.max_tokens

    @property
    def usable(self) -> tuple[bytes, ...]:
        """Keys of the pages that it may adopt."""
        return tuple(self.request.keys[: (self.known - 1) // PAGE])

    @property
    def missing(self) -> int:
        return self.known - self.length


@dataclass
class Engine:
    """Runs the scheduler's plans; ``rng`` decides what a model, a draft and a network would."""

    pages: int
    budget: int = 32
    chunk: int = 16
    room: int = 8
    aging: int = 8
    patience: int = 50
    lively: bool = True
    rng: Random = field(default_factory=lambda: Random(0))

    def __post_init__(self) -> None:
        self.scheduler = self.new()
        self.cache = Cache(self.pages)
        self.sequences: dict[str, Sequence] = {}
        self.leaving: list[str] = []
        self.now = self.plans = self.preemptions = self.peak = self.joins = 0
        self.ends: dict[str, str] = {}
        self.service: Counter[str] = Counter()
        self.calls: list[tuple[str, tuple[object, ...]]] = []
        self.made: list[Plan] = []

    def new(self) -> Scheduler:
        return Scheduler(
            self.pages,
            budget=self.budget,
            chunk=self.chunk,
            room=self.room,
            aging=self.aging,
            patience=self.patience,
        )

    @property
    def share(self) -> int:
        return max(1, min(self.chunk, self.budget // 4))

    def call(self, method: str, *arguments: object) -> object:
        self.calls.append((method, arguments))
        return getattr(self.scheduler, method)(*arguments)

    # Events

    def submit(self, request: Request) -> None:
        fits = whole(request.prompt_tokens + request.max_tokens) + whole(self.room) <= self.pages
        if not fits:
            with pytest.raises(RequestTooLarge) as refusal:
                self.scheduler.submit(request)
            assert refusal.value.fits == (self.pages - whole(self.room)) * PAGE
            return
        self.call("submit", request)
        bad = self.lively and self.rng.random() < 0.05
        self.sequences[request.id] = Sequence(request, self.plans, len(self.calls), bad, known=request.prompt_tokens)

    def hold(self, name: str) -> None:
        self.call("hold", name)
        self.sequences[name].held = True

    def release(self, name: str) -> None:
        self.call("release", name)
        self.sequences[name].held = False

    def end(self, name: str, how: str, *, later: bool = False) -> None:
        """Its pages come back now, or later as when blocks are stored first."""
        assert name not in self.ends, f"{name} ended twice"
        self.ends[name] = how
        self.sequences.pop(name)
        self.call("remove", name)
        self.leaving.append(name)
        if not later:
            self.leave()

    def leave(self) -> None:
        for name in self.leaving:
            self.cache.free += self.cache.cut(name, 0)
        self.leaving.clear()

    # One pass

    def step(self, elapsed: int = 1, *, lent: int = 0, greedy: bool = False) -> Plan:
        """Plans, checks the plan, runs it.

        ``lent``: pages that somebody else has meanwhile; ``greedy``: everybody wants as many proposals as it can.
        """
        self.now += elapsed
        asked = self.scheduler.decodes()
        wants = {name: self.room if greedy else self.rng.randint(0, self.room + 2) for name in asked}
        free = max(0, len(self.cache.free) - lent)
        plan = self.call("plan", self.now, free, wants)
        assert isinstance(plan, Plan)
        self.plans += 1
        self.made.append(plan)
        for name in plan.expired:
            deadline = self.sequences[name].request.deadline
            assert deadline is not None
            assert deadline <= self.now
            self.end(name, "expired", later=self.rng.random() < 0.5)
        assert not any(
            s.request.deadline is not None and s.request.deadline <= self.now for s in self.sequences.values()
        )
        self.check(plan, asked, wants, free)
        # Something happens, unless all that could run waits for what others hold.
        if not (lent or self.leaving or plan.expired or any(s.held for s in self.sequences.values())):
            assert plan.decodes or plan.prefills or plan.preempted or not self.sequences
        self.execute(plan, free)
        return plan

    def check(self, plan: Plan, asked: list[str], wants: dict[str, int], free: int) -> None:
        """What a plan must be, given who is ready and how many pages are free."""
        ready = {name: s for name, s in self.sequences.items() if s.running and not s.held}
        decodes = {name for name, s in ready.items() if s.missing == 1}
        prefills = {name for name, s in ready.items() if s.missing > 1}
        # Each runs once, in its state, and only who was asked for proposals decodes.
        assert len(set(plan.admitted)) == len(plan.admitted)
        assert all(not self.sequences[n].running and not self.sequences[n].held for n in plan.admitted)
        assert plan.decodes.keys() <= decodes & set(asked)
        assert plan.prefills.keys() <= prefills | set(plan.admitted)
        assert set(plan.preempted) <= ready.keys() - plan.decodes.keys() - plan.prefills.keys()
        # Tokens.
        chunks = sum(plan.prefills.values())
        assert len(plan.decodes) + sum(plan.decodes.values()) + chunks <= self.budget
        for name, count in plan.prefills.items():
            assert 1 <= count <= min(self.chunk, self.sequences[name].missing)
        # Decodes before prefill: who is left out has no page, or no token beside the first prefill's share.
        needy = sum(not ready[name].length % PAGE for name in decodes) + bool(prefills)
        for name in decodes - plan.decodes.keys() - set(plan.preempted):
            paged = not ready[name].length % PAGE and needy > free
            # Those asked that ran out of pages leave their tokens to prefill, not to others' decodes.
            turns = len(asked) >= self.budget - self.share
            assert paged or (turns and chunks <= self.share + len(asked) - len(plan.decodes)), f"{name} is left out"
        # A prefill that could run has a chunk.
        if prefills - set(plan.preempted) and needy <= free:
            assert chunks
        # Proposals are cut only for tokens or pages, and before anybody is preempted.
        most = {name: min(wants[name], self.room) for name in plan.decodes}
        assert all(count <= most[name] for name, count in plan.decodes.items())
        if plan.preempted:
            assert sum(not s.length % PAGE for s in ready.values()) > free
        if sum(plan.decodes.values()) < sum(most.values()):
            full = len(plan.decodes) + sum(plan.decodes.values()) + chunks == self.budget
            spare = self.share + len(asked) - len(plan.decodes)
            assert self.needed(plan) == free or (full and chunks <= spare)
        self.check_victims(plan, ready)
        self.check_joining(plan, prefills)

    def check_joining(self, plan: Plan, prefills: set[str]) -> None:
        """Whoever joins would compute what somebody does in this pass, and nobody computes what another does."""
        assert set(plan.joining) <= (prefills | set(plan.admitted)) - plan.prefills.keys() - set(plan.preempted)
        for name in plan.joining:
            first = self.sequences[name].length // PAGE
            wanted = set(self.sequences[name].usable[first:])
            assert any(wanted & self.touched(maker, count) for maker, count in plan.prefills.items())
        fed = list(plan.prefills)
        for index, name in enumerate(fed):
            sequence, earlier = self.sequences[name], fed[:index]
            own = sequence.usable[sequence.length // PAGE :]
            if not sequence.length % PAGE:
                assert all(set(own).isdisjoint(self.touched(maker, plan.prefills[maker])) for maker in earlier)

    def touched(self, name: str, count: int) -> set[bytes]:
        """Blocks that a chunk computes, of those that have keys."""
        sequence = self.sequences[name]
        return set(sequence.request.keys[sequence.length // PAGE : whole(sequence.length + count)])

    def aged(self, sequence: Sequence) -> int:
        return sequence.request.priority - sequence.submitted // self.aging

    def check_victims(self, plan: Plan, ready: dict[str, Sequence]) -> None:
        """Those of least aged priority that have pages, and never the most senior."""
        rest = [sequence for name, sequence in ready.items() if name not in plan.preempted]
        if plan.preempted:
            senior = max(ready.values(), key=lambda s: (self.aged(s), s.request.priority, -s.arrived))
            assert senior in rest
        for name in plan.preempted:
            assert all(self.aged(ready[name]) <= self.aged(other) for other in rest if other.length)

    def needed(self, plan: Plan) -> int:
        """New pages that the plan may take, all of the admitted's prompts included."""
        ends = {name: self.sequences[name].length + 1 + count for name, count in plan.decodes.items()}
        ends |= {name: self.sequences[name].length + count for name, count in plan.prefills.items()}
        ends |= {name: self.sequences[name].known for name in plan.admitted}
        needed = sum(whole(end) - whole(self.sequences[name].length) for name, end in ends.items())
        admitted = list(plan.admitted)
        return needed - sum(self.not_counted(name, admitted[:place]) for place, name in enumerate(admitted))

    def not_counted(self, name: str, earlier: Iterable[str]) -> int:
        """Pages that somebody holds, or that are counted for somebody who is admitted before it."""
        keys = self.sequences[name].usable
        counted = [self.sequences[other].request.keys for other in earlier]
        return max([self.found(name)[0], *(common(keys, theirs) for theirs in counted)])

    def found(self, name: str) -> tuple[int, str]:
        """How many of the pages that it could adopt others hold, and who."""
        keys = self.sequences[name].usable
        others = {n: s.request.keys[: s.published] for n, s in self.sequences.items() if n != name}
        return max(((common(keys, theirs), n) for n, theirs in others.items()), default=(0, ""))

    def execute(self, plan: Plan, free: int) -> None:
        """Runs the plan with the pages that were free when it was made, not those that come free meanwhile."""
        assert self.needed(plan) <= free
        back: list[int] = []
        for name in plan.preempted:
            back += self.cache.cut(name, 0)
            sequence = self.sequences[name]
            sequence.running, sequence.length, sequence.published = False, 0, 0
            self.preemptions += 1
        for name in plan.admitted:
            self.sequences[name].running = True
            self.service[self.sequences[name].request.tenant] += self.charge(self.sequences[name])
            self.adopt(name)
        self.peak = max(self.peak, self.scheduler.running)
        taken = [self.cache.grow(n, self.sequences[n].length + 1 + count) for n, count in plan.decodes.items()]
        chunks = {n: min(c, self.sequences[n].missing) for n, c in plan.prefills.items() if not self.sequences[n].held}
        taken += [self.cache.grow(name, self.sequences[name].length + count) for name, count in chunks.items()]
        assert sum(taken) <= free
        for name, count in plan.decodes.items():
            sequence = self.sequences[name]
            accepted = min(self.rng.randint(0, count), sequence.most - sequence.known - 1)
            back += self.sampled(name, sequence.length + 1 + accepted, accepted + 1)
        for name, count in chunks.items():
            done = self.sequences[name].length + count
            back += self.sampled(name, done, int(done == self.sequences[name].known))
        for name in plan.joining:
            if not self.sequences[name].held:
                back += self.join(name)
        self.cache.free += back
        self.finish()

    def charge(self, sequence: Sequence) -> int:
        """The prompt's tokens, once."""
        sequence.served += 1
        return sequence.request.prompt_tokens if sequence.served == 1 else 0

    def adopt(self, name: str) -> None:
        """A cached prefix, shared with a running request of its tenant or brought in; or hold it as if one came."""
        sequence = self.sequences[name]
        pages = (sequence.known - 1) // PAGE
        if sequence.request.keys:
            assert not self.join(name)
            pages = self.rng.randint(sequence.length // PAGE, max(len(sequence.usable), sequence.length // PAGE))
            if self.lively and pages * PAGE > sequence.length:
                # Pages that nobody held, but that were still there.
                self.cache.grow(name, pages * PAGE)
                self.take(name, pages)
            if self.lively and self.rng.random() < 0.2:
                self.hold(name)
            return
        if not self.lively or not pages or self.rng.random() < 0.5:
            return
        donors = [
            n
            for n, s in self.sequences.items()
            if n != name and s.length >= PAGE and s.request.tenant == sequence.request.tenant and not s.request.keys
        ]
        if self.rng.random() < 0.3:
            self.hold(name)
            return
        if donors and self.rng.random() < 0.7:
            donor = self.rng.choice(donors)
            pages = self.rng.randint(1, min(pages, self.sequences[donor].length // PAGE))
            self.cache.share(name, donor, pages)
        else:
            pages = self.rng.randint(1, pages)
            self.cache.grow(name, pages * PAGE)
        sequence.length = pages * PAGE
        self.call("adopted", name, sequence.length)

    def join(self, name: str) -> list[int]:
        """Takes over what others have of its blocks, if that is more; the pages that came free by it."""
        sequence = self.sequences[name]
        pages, donor = self.found(name)
        # Pages of its own that are not in the index have none behind them there.
        if pages * PAGE <= sequence.length or sequence.published * PAGE < sequence.length:
            return []
        self.joins += 1
        free = self.cache.share(name, donor, pages)
        self.take(name, pages)
        return free

    def take(self, name: str, pages: int) -> None:
        """It has adopted so many pages, which others find by it."""
        sequence = self.sequences[name]
        sequence.length, sequence.published = pages * PAGE, pages
        self.call("adopted", name, sequence.length)
        self.call("published", name, pages)

    def load(self, name: str) -> None:
        """A prefix that was waited for has come, as far as there is room."""
        sequence = self.sequences[name]
        pages = min((sequence.known - 1) // PAGE, len(self.cache.free))
        if sequence.running and not sequence.length and pages:
            self.cache.grow(name, pages * PAGE)
            sequence.length = pages * PAGE
            self.call("adopted", name, sequence.length)

    def sampled(self, name: str, length: int, tokens: int) -> list[int]:
        sequence = self.sequences[name]
        sequence.length = length
        sequence.known += tokens
        assert sequence.length <= sequence.known <= sequence.most
        self.call("computed", name, sequence.length, sequence.known)
        pages = min(length // PAGE, len(sequence.request.keys))
        if pages > sequence.published and not sequence.bad:
            sequence.published = pages
            self.call("published", name, pages)
        self.service[sequence.request.tenant] += 2 * tokens
        return self.cache.cut(name, length)

    def finish(self) -> None:
        for name, sequence in list(self.sequences.items()):
            stopped = self.lively and sequence.running and sequence.known > sequence.request.prompt_tokens
            if sequence.known == sequence.most or (stopped and self.rng.random() < 0.02):
                self.end(name, "finished", later=self.lively and self.rng.random() < 0.3)

    # What must hold at any time

    def check_state(self) -> None:
        self.scheduler.check()
        assert len(self.scheduler) == len(self.sequences)
        assert all(name in self.scheduler for name in self.sequences)
        assert self.scheduler.running == sum(s.running for s in self.sequences.values())
        held = [page for page, count in self.cache.holders.items() if count]
        assert sorted(held + self.cache.free) == list(range(self.pages))
        for name, sequence in self.sequences.items():
            assert len(self.cache.tables.get(name, ())) == whole(sequence.length)

    def replay(self) -> None:
        """The same events under other names give the same plans."""
        names = {request.id: f"{index % 7}-{index}" for index, request in enumerate(self.requests())}
        other = self.new()
        plans = iter(self.made)
        for method, arguments in self.calls:
            first, *rest = arguments
            if isinstance(first, Request):
                copy = Request(names[first.id], first.tenant, *(getattr(first, slot) for slot in Request.__slots__[2:]))
                other.submit(copy)
            elif method == "plan":
                now, free, wants = arguments
                assert isinstance(wants, dict)
                made = other.plan(now, free, {names[name]: count for name, count in wants.items()})  # type: ignore[arg-type]
                assert made == renamed(next(plans), names)
            else:
                getattr(other, method)(names[str(first)], *rest)

    def requests(self) -> list[Request]:
        return [first for _, (first, *_) in self.calls if isinstance(first, Request)]


def renamed(plan: Plan, names: dict[str, str]) -> Plan:
    return Plan(
        {names[name]: count for name, count in plan.decodes.items()},
        {names[name]: count for name, count in plan.prefills.items()},
        [names[name] for name in plan.admitted],
        [names[name] for name in plan.preempted],
        [names[name] for name in plan.expired],
        [names[name] for name in plan.joining],
    )


def common(keys: tuple[bytes, ...], theirs: Collection[bytes]) -> int:
    """How many of these blocks another has, from the first."""
    return next((i for i, (a, b) in enumerate(zip(keys, theirs, strict=False)) if a != b), min(len(keys), len(theirs)))


class SchedulerMachine(RuleBasedStateMachine):
    """Anything may happen; in the end nothing new comes and everybody is done."""

    @initialize(
        pages=st.integers(4, 24),
        budget=st.integers(4, 64),
        chunk=st.integers(1, 40),
        room=st.integers(0, 40),
        seed=st.integers(0, 2**32),
    )
    def start(self, pages: int, budget: int, chunk: int, room: int, seed: int) -> None:
        self.engine = Engine(pages, budget, chunk, room, rng=Random(seed))
        self.submitted = 0

    @rule(
        tenant=st.sampled_from("xyz"),
        priority=st.integers(-1, 2),
        prompt=st.integers(1, 120),
        most=st.integers(1, 60),
        due=st.none() | st.integers(1, 60),
        forks=st.none() | st.integers(0, 8),
    )
    def submit(
        self, tenant: str, priority: int, prompt: int, most: int, due: int | None, forks: int | None = None
    ) -> None:
        """``forks``: from which block on its prompt is its own; before that it is as all others of its tenant's are."""
        self.submitted += 1
        deadline = None if due is None else self.engine.now + due
        keys = () if forks is None else blocks(tenant, prompt // PAGE, forks, self.submitted)
        self.engine.submit(Request(f"r{self.submitted}", tenant, priority, prompt, most, deadline, keys))

    @rule(
        tenant=st.sampled_from("xyz"),
        count=st.integers(2, 12),
        prompt=st.integers(1, 20) | st.integers(20, 120),
        most=st.integers(1, 60),
        forks=st.none() | st.integers(0, 8),
    )
    def crowd(self, tenant: str, count: int, prompt: int, most: int, forks: int | None) -> None:
        for _ in range(count):
            self.submit(tenant, 0, prompt, most, None, forks)

    @rule(
        count=st.integers(1, 4) | st.just(20),
        elapsed=st.integers(0, 3),
        lent=st.just(0) | st.integers(1, 20),
        greedy=st.booleans(),
    )
    def step(self, count: int, elapsed: int, lent: int, greedy: bool) -> None:
        for _ in range(count):
            self.engine.step(elapsed, lent=lent, greedy=greedy)

    @rule(pick=st.integers(0, 1000))
    def hold(self, pick: int) -> None:
        for name in self.any(pick):
            self.engine.hold(name)

    @rule(pick=st.integers(0, 1000), loads=st.booleans())
    def release(self, pick: int, loads: bool) -> None:
        for name in self.any(pick):
            if loads:
                self.engine.load(name)
            self.engine.release(name)

    @rule(pick=st.integers(0, 1000), later=st.booleans())
    def cancel(self, pick: int, later: bool) -> None:
        for name in self.any(pick):
            self.engine.end(name, "cancelled", later=later)

    @rule()
    def leave(self) -> None:
        self.engine.leave()

    @invariant()
    def state(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check_state()

    def any(self, pick: int) -> list[str]:
        """One request, if there is any."""
        names = list(self.engine.sequences)
        return [names[pick % len(names)]] if names else []

    def teardown(self) -> None:
        """Nobody starves.

        Of those running and ready the most senior runs in every plan, but for one plan for each of the others when it
        needs a page and they are preempted for it, or when all decodes take turns. It is done then, unless somebody
        more senior is admitted, which happens fewer times than there are requests.
        """
        if not hasattr(self, "engine"):
            return
        engine = self.engine
        engine.lively = False
        engine.leave()
        for name, sequence in engine.sequences.items():
            if sequence.held:
                engine.release(name)
        count = len(engine.sequences)
        longest = max((s.most for s in engine.sequences.values()), default=0)
        turns = 1 + count // max(1, engine.budget - engine.share)
        bound = count * count * (longest * turns + count * whole(longest))
        began = engine.plans
        while engine.sequences:
            engine.step()
            engine.leave()
            engine.check_state()
            assert engine.plans - began <= bound, f"{len(engine.sequences)} of {count} starve"
        assert len(engine.cache.free) == engine.pages
        assert engine.ends.keys() == {request.id for request in engine.requests()}
        engine.replay()
        event(f"preempted: {engine.preemptions > 0}")
        event(f"joined: {engine.joins > 0}")


def blocks(tenant: str, count: int, forks: int, number: int) -> tuple[bytes, ...]:
    """Chained keys: the first ``forks`` are the tenant's, the others this request's."""
    return tuple(f"{tenant}{index}{'' if index < forks else number}".encode() for index in range(count))


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=150, stateful_step_count=40, phases=PHASES)


@settings(max_examples=25, phases=PHASES)
@given(
    pages=st.integers(6, 9),
    gap=st.integers(1, 3),
    low=st.integers(1, 3),
    most=st.integers(1, 40),
    seed=st.integers(0, 2**32),
)
def test_nobody_starves_beside_an_endless_stream_of_higher_priority(
    pages: int, gap: int, low: int, most: int, seed: int
) -> None:
    """The low ones are done within a bound although another tenant's requests never end and are always waiting.

    Once ``gap * aging`` plans have gone by since the low priority was served, only it is admitted from; those running,
    at most one a page, are then over within the time of the most senior, one after another. From ``(gap + 1) * aging``
    plans after its arrival on, newcomers outrank nobody of them, so that each is preempted no more.
    """
    engine = Engine(pages, aging=8, lively=False, rng=Random(seed))
    longest = 20 + most
    drain = pages * (longest + pages * whole(longest))
    bound = (gap + 1) * engine.aging + low * (gap * engine.aging + 1 + 2 * drain)

    def pass_with_stream() -> None:
        while sum(s.request.tenant == "heavy" and not s.running for s in engine.sequences.values()) < 3:
            shape = engine.rng.randint(1, 20), engine.rng.randint(1, most)
            engine.submit(Request(f"high{len(engine.calls)}", "heavy", gap, *shape))
        engine.step()

    for _ in range(40):
        pass_with_stream()
    for number in range(low):
        engine.submit(Request(f"low{number}", "light", 0, longest - most, most))
    began = engine.plans
    while any(name.startswith("low") for name in engine.sequences):
        pass_with_stream()
        assert engine.plans - began <= bound
    event(f"preempted: {engine.preemptions > 0}")


@settings(max_examples=25, phases=PHASES)
@given(
    pages=st.integers(12, 40),
    prompts=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    outputs=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    alone=st.integers(0, 200),
    seed=st.integers(0, 2**32),
)
def test_two_tenants_that_always_wait_get_the_same_within_a_bound(
    pages: int, prompts: tuple[int, int], outputs: tuple[int, int], alone: int, seed: int
) -> None:
    """Whatever the shapes of their requests, and however long one was alone before the other came.

    A tenant that is admitted has the lower counter; from then on it gets a prompt and what its running requests may
    still put out, before it must have the lower counter again. So neither is ahead by more, and two such leads are the
    most by which the difference may change.
    """
    engine = Engine(pages, lively=False, rng=Random(seed))
    number = 0
    leads: list[int] = []
    for step in range(alone + 400):
        for tenant, prompt, most in (("x", prompts[0], outputs[0]), ("y", prompts[1], outputs[1]))[
            : 1 + (step >= alone)
        ]:
            while sum(s.request.tenant == tenant and not s.running for s in engine.sequences.values()) < pages + 1:
                number += 1
                engine.submit(Request(f"r{number}", tenant, 0, prompt, most))
        if step >= alone:
            leads.append(engine.service["x"] - engine.service["y"])
        engine.step()
    assert engine.service["y"] > 0
    bound = 2 * (max(prompts) + 2 * engine.peak * max(outputs))
    assert max(leads) - min(leads) <= bound


@pytest.mark.parametrize("seed", range(3))
def test_under_memory_pressure_requests_are_preempted_and_all_are_done(seed: int) -> None:
    engine = Engine(12, rng=Random(seed))
    for number in range(60):
        engine.submit(Request(f"r{number}", "xyz"[number % 3], number % 2, 20 + number % 30, 60))
    while engine.sequences:
        engine.step()
        for name, sequence in list(engine.sequences.items()):
            if sequence.held:
                engine.load(name)
                engine.release(name)
        engine.leave()
        engine.check_state()
        assert engine.plans < 10_000
    assert engine.preemptions > 3
    assert set(engine.ends.values()) == {"finished"}
