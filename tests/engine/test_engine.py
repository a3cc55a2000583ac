"""Requests over one cache: each gets the tokens that it gets alone, and every page comes back."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from safetensors.torch import load_file, save_file

from countersign.services.engine.engine import Engine, Ran, Step, complete, kept_of
from countersign.services.engine.errors import ContextExceeded, EngineError, RequestTooLarge
from countersign.services.engine.generation import Generation
from countersign.services.engine.kv import PagedCache
from countersign.services.engine.model import Backend, Model, load_model
from countersign.services.engine.sampling import Allowed, Sampling, allow
from countersign.services.engine.scheduler import Plan
from countersign.services.engine.speculation import Draft

SAMPLINGS = (Sampling(), Sampling(0.8, seed=5), Sampling(0.8, 12, 0.9, 6))
SHARED = torch.randint(0, 96, (40,), generator=torch.Generator().manual_seed(9)).tolist()


def prompt_of(number: int) -> list[int]:
    """Of many lengths; every second one begins as the others do."""
    own = torch.randint(0, 96, (1 + number * 13 % 47,), generator=torch.Generator().manual_seed(number)).tolist()
    return [*SHARED, *own] if number % 2 else own


def keys_of(tokens: Sequence[int]) -> list[bytes]:
    """One for each full page, chained."""
    keys, digest = [], b""
    for end in range(16, len(tokens) + 1, 16):
        digest = hashlib.sha256(digest + bytes(tokens[end - 16 : end])).digest()
        keys.append(digest)
    return keys


@dataclass
class ByRule:
    """Lets a token follow another by a rule that looks at both; keeps what it was told."""

    seen: list[int]

    def masks(self, draft: Draft) -> list[Allowed | None]:
        return [self.after(last) for last in (self.seen[-1], *draft.token_ids)]

    def accept(self, token_ids: Sequence[int]) -> None:
        for token in token_ids:
            assert obeys(self.seen[-1], token)
            self.seen.append(token)

    @staticmethod
    def after(last: int) -> Allowed | None:
        return None if last % 7 == 0 else allow([token for token in range(96) if obeys(last, token)], 96)


def obeys(last: int, token: int) -> bool:
    return last % 7 == 0 or token % 2 == last % 2 or token % 5 == 0


def generation(number: int, max_tokens: int = 20, *, keys: bool = False, constrained: bool = False) -> Generation:
    prompt = prompt_of(number)
    return Generation(
        f"r{number}",
        prompt,
        max_tokens,
        SAMPLINGS[number % len(SAMPLINGS)],
        tenant=f"t{number % 3}",
        keys=keys_of(prompt) if keys else (),
        constraint=ByRule(list(prompt)) if constrained else None,
    )


@dataclass
class Alone:
    """What each request gets from an engine of its own."""

    model: Model
    known: dict[tuple[int, bool], list[int]] = field(default_factory=dict)

    def output(self, number: int, constrained: bool = False) -> list[int]:
        if (number, constrained) not in self.known:
            wanted = generation(number, 40, constrained=constrained)
            complete(engine_of(self.model, 512), [wanted])
            self.known[number, constrained] = wanted.generated
        return self.known[number, constrained]


def engine_of(model: Model, tokens: int, budget: int = 512, chunk: int = 256) -> Engine:
    return Engine.of(model, PagedCache(model.config, model.dtype, tokens), budget, chunk)


@pytest.fixture(scope="module")
def alone(model: Model) -> Alone:
    return Alone(model)


Drafting = Callable[[Generation, int], Draft]


def serve(engine: Engine, drafting: Drafting) -> tuple[list[Plan], int]:
    """Runs all to their ends, with drafts; the plans, and how many proposals were accepted."""
    plans: list[Plan] = []
    accepted = 0
    while len(engine):
        drafts = {each.id: drafting(each, len(plans)) for each in engine.decodes()}
        step = engine.plan(drafts=drafts)
        ran = engine.run(step)
        assert not [result.outcome.error for result in ran.results if result.outcome.error]
        engine.settle(ran, {result.generation.id: kept_of(result) for result in ran.results})
        for result in ran.results:
            assert result.outcome.accepted <= result.drafted
            accepted += result.outcome.accepted
            if not result.generation.left:
                engine.remove(result.generation.id)
        engine.check()
        plans.append(step.plan)
        assert len(plans) < 2000, "some request never ends"
    engine.sweep()
    engine.check()
    return plans, accepted


def half_right(alone: Alone) -> Drafting:
    """Chains and trees in turn, with a wrong branch or end."""

    def drafting(each: Generation, turn: int) -> Draft:
        future = alone.output(int(each.id[1:]), each.constraint is not None)[len(each.generated) :]
        right = future[: turn % 5]
        if turn % 3 == 0 or not right:
            return Draft((*right, (each.tokens[-1] + turn) % 96))
        wrong = (right[0] + 1) % 96
        return Draft((wrong, *right, wrong), (-1, -1, *range(1, len(right)), 0))

    return drafting


@pytest.mark.parametrize("drafted", [False, True])
@pytest.mark.parametrize("constrained", [False, True])
def test_many_requests_over_a_small_cache_get_the_tokens_that_each_gets_alone(
    model: Model, alone: Alone, constrained: bool, drafted: bool
) -> None:
    engine = engine_of(model, 224, budget=96, chunk=24)
    generations = [generation(number, 39, constrained=constrained, keys=number > 5) for number in range(12)]
    for each in generations:
        engine.submit(each)
    plans, accepted = serve(engine, half_right(alone) if drafted else lambda *_: Draft())
    for number, each in enumerate(generations):
        assert each.generated == alone.output(number, constrained)[:39]
        assert not isinstance(each.constraint, ByRule) or each.constraint.seen == each.tokens
    assert engine.cache.free_tokens == 224
    assert any(plan.preempted for plan in plans)
    assert any(plan.decodes and plan.prefills for plan in plans)
    assert (accepted > 50) == drafted


def test_complete_serves_all_and_says_nothing_of_how(model: Model, alone: Alone) -> None:
    engine = engine_of(model, 288, budget=64, chunk=16)
    generations = [generation(number, 5 + number) for number in range(8)]
    complete(engine, generations)
    for number, each in enumerate(generations):
        assert each.generated == alone.output(number)[: 5 + number]
    assert (len(engine), engine.cache.free_tokens) == (0, 288)
    engine.check()


def test_a_shared_prefix_is_computed_once(model: Model, alone: Alone) -> None:
    engine = engine_of(model, 512)
    first, again, other = generation(1, keys=True), generation(1, keys=True), generation(3, keys=True)
    complete(engine, [first])
    other.id, again.id = "other", "again"
    complete(engine, [other, again])
    assert first.cached == 0
    assert other.cached == 32
    assert again.cached == (len(prompt_of(1)) - 1) // 16 * 16
    assert first.generated == again.generated == alone.output(1)[:20]
    assert other.generated == alone.output(3)[:20]
    engine.check()


def test_a_prompt_that_is_cached_whole_still_feeds_a_token(model: Model) -> None:
    engine, prompt = engine_of(model, 512), [*SHARED, *range(8)]
    first, second = (Generation(name, list(prompt), 5, keys=keys_of(prompt)) for name in "ab")
    complete(engine, [first])
    complete(engine, [second])
    assert (len(prompt), second.cached) == (48, 32)
    assert first.generated == second.generated


def test_a_prefix_is_shared_as_soon_as_its_request_has_sampled(model: Model, alone: Alone) -> None:
    engine = engine_of(model, 512, chunk=16)
    engine.submit(generation(1, keys=True))
    for _ in range(5):
        ran = engine.run(engine.plan())
        engine.settle(ran, {result.generation.id: kept_of(result) for result in ran.results})
    late = generation(3, keys=True)
    engine.submit(late)
    serve(engine, lambda *_: Draft())
    assert late.cached == 32
    assert late.generated == alone.output(3)[:20]


def step(engine: Engine) -> Plan:
    """One pass, with all that it brings."""
    planned = engine.plan()
    ran = engine.run(planned)
    engine.settle(ran, {result.generation.id: kept_of(result) for result in ran.results})
    return planned.plan


@pytest.mark.parametrize("chunk", [16, 20, 256])
def test_requests_that_come_together_compute_a_shared_prefix_once(model: Model, alone: Alone, chunk: int) -> None:
    engine = engine_of(model, 1024, chunk=chunk)
    generations = [generation(number, keys=True) for number in (1, 3, 5, 7)]
    for each in generations:
        engine.submit(each)
    assert step(engine).joining == ["r3", "r5", "r7"]
    serve(engine, lambda *_: Draft())
    for number, each in zip((1, 3, 5, 7), generations, strict=True):
        assert each.generated == alone.output(number)[:20]
    assert [each.cached for each in generations] == [0, 32, 32, 32]
    sharing = engine.sharing
    assert sharing.computed == sum(each.prompt_tokens for each in generations) - 3 * 32
    assert (sharing.joined, sharing.adopted) == (3 * 32, 3 * 32)
    assert sharing.waits >= 3


def test_who_waits_for_anothers_block_goes_on_alone_when_that_one_leaves(model: Model, alone: Alone) -> None:
    engine = engine_of(model, 512, chunk=16)
    for number in (1, 3):
        engine.submit(generation(number, keys=True))
    assert step(engine).joining == ["r3"]
    planned = engine.plan()
    assert planned.plan.joining == ["r3"]
    engine.remove("r1")
    left = planned.generations["r3"]
    engine.settle(engine.run(planned), {})
    serve(engine, lambda *_: Draft())
    assert left.cached == 16
    assert left.generated == alone.output(3)[:20]


@pytest.mark.parametrize("together", [True, False])
def test_pages_that_requests_share_are_counted_once(model: Model, together: bool) -> None:
    """Twenty of 32 pages are everybody's: two requests that each had their own would not fit."""
    engine, head = engine_of(model, 512), [number % 96 for number in range(320)]
    for number in range(6):
        prompt = [*head, number, number]
        engine.submit(Generation(f"r{number}", prompt, 9, keys=keys_of(prompt)))
        if not (together or number):
            for _ in range(3):
                step(engine)
    step(engine)
    assert engine.scheduler.running == 6
    serve(engine, lambda *_: Draft())
    assert engine.sharing.computed == 320 + 6 * 2


def test_exported_blocks_are_loaded_once_and_shared_at_once(model: Model, alone: Alone) -> None:
    donor = engine_of(model, 512)
    first = generation(1, 1, keys=True)
    donor.submit(first)
    donor.run(donor.plan())
    assert first.sequence is not None
    blocks = [first.sequence.export_block(index) for index in range(3)]
    engine = engine_of(model, 512)
    for number in (1, 3):
        engine.submit(generation(number, keys=True))
    planned = engine.plan()
    engine.settle(engine.run(planned, skip=["r1", "r3"]), {})
    one, other = (planned.generations[name] for name in ("r1", "r3"))
    free = engine.cache.free_tokens
    engine.load(one, blocks)
    assert engine.cache.free_tokens == free - 48
    engine.load(other, blocks[:2])
    assert engine.cache.free_tokens == free - 48
    for each, length in ((one, 48), (other, 32)):
        assert each.sequence is not None
        assert each.sequence.length == length
        engine.scheduler.adopted(each.id, length)
    serve(engine, lambda *_: Draft())
    assert one.generated == alone.output(1)[:20]
    assert other.generated == alone.output(3)[:20]


def test_who_was_held_adopts_what_others_have_computed_meanwhile(model: Model, alone: Alone) -> None:
    """As when its prefix was looked for in a store: it was admitted before the others' pages were there."""
    engine = engine_of(model, 512, chunk=16)
    for number in (1, 3):
        engine.submit(generation(number, keys=True))
    planned = engine.plan()
    engine.settle(engine.run(planned, skip=["r3"]), {})
    late = planned.generations["r3"]
    engine.scheduler.hold("r3")
    for _ in range(4):
        step(engine)
    assert late.sequence is not None
    assert late.sequence.length == 0
    engine.scheduler.release("r3")
    serve(engine, lambda *_: Draft())
    assert late.cached == 32
    assert late.generated == alone.output(3)[:20]
    assert engine.sharing.computed == sum(len(prompt_of(number)) for number in (1, 3)) - 32


def test_tenants_share_nothing_and_wait_for_nobody(model: Model) -> None:
    engine = engine_of(model, 512, chunk=16)
    for number, salt in ((1, b"x"), (3, b"y")):
        each = generation(number, keys=True)
        each.keys = [salt + key for key in each.keys]
        engine.submit(each)
    plans, _ = serve(engine, lambda *_: Draft())
    assert not any(plan.joining for plan in plans)
    assert engine.sharing.adopted == 0


def test_an_answer_that_goes_on_elsewhere_gets_the_tokens_it_would_have_got(model: Model, alone: Alone) -> None:
    prompt, output = prompt_of(1), alone.output(1)
    moved = Generation("r1", [*prompt, *output[:17]], 23, SAMPLINGS[1], keys=keys_of([*prompt, *output[:17]]))
    complete(engine_of(model, 512), [moved])
    assert moved.generated == output[17:]


def test_a_request_that_never_fits_is_refused_with_what_would(model: Model) -> None:
    engine = engine_of(model, 256)
    wanted = generation(1, 200)
    tokens = len(wanted.tokens) + 200
    with pytest.raises(RequestTooLarge, match=f"request of {tokens} tokens.*at most 192 tokens would") as refused:
        engine.submit(wanted)
    assert (refused.value.tokens, refused.value.fits) == (tokens, 192)
    large = engine_of(model, 4096)
    with pytest.raises(ContextExceeded, match="1025 tokens does not fit the model's context of 1024"):
        large.submit(Generation("r", [1] * 1000, 25))
    for each in (engine, large):
        assert (len(each), len(each.scheduler)) == (0, 0)
        each.check()
    whole = Generation("r", [1] * 1000, 24)
    complete(large, [whole])
    assert len(whole.tokens) == 1024


def test_proposals_beyond_the_last_token_are_not_computed(model: Model, alone: Alone) -> None:
    """At the context's end they could not be, and everyone's pass would fail."""
    engine = engine_of(model, 4096)
    engine.submit(Generation("r2", [1] * 1000, 24))
    engine.submit(generation(4))

    def drafting(each: Generation, turn: int) -> Draft:
        return Draft((1, 2, 3, 4, 5, 6), (-1, 0, 1, 2, 3, -1)) if turn % 2 else Draft((1, 2, 3, 4, 5, 6))

    serve(engine, drafting)
    engine.check()


@dataclass
class OnlyEven:
    """No state: every token is even."""

    def masks(self, draft: Draft) -> list[Allowed | None]:
        return [allow(range(0, 96, 2), 96)] * (len(draft) + 1)

    def accept(self, token_ids: Sequence[int]) -> None:
        assert all(token % 2 == 0 for token in token_ids)


def test_a_constraint_is_obeyed_and_only_by_its_own_request(model: Model, alone: Alone) -> None:
    engine = engine_of(model, 512)
    even, free = generation(4), generation(2)
    even.constraint = OnlyEven()
    for each in (even, free):
        engine.submit(each)
    serve(engine, lambda each, turn: Draft(tuple(alone.output(2)[len(each.generated) :][:3])))
    assert all(token % 2 == 0 for token in even.generated)
    assert any(token % 2 for token in alone.output(4)[:20])
    assert free.generated == alone.output(2)[:20]


@pytest.fixture
def poisoned(checkpoint: Path, backend: Backend, tmp_path: Path) -> Model:
    """The model with a token whose embedding is not finite: 77."""
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.embed_tokens.weight"][77] = math.nan
    save_file(tensors, tmp_path / "model.safetensors")
    return load_model(tmp_path, backend=backend)


def test_a_request_of_bad_numbers_fails_alone_and_shares_no_page(poisoned: Model, alone: Alone) -> None:
    engine = engine_of(poisoned, 512, chunk=16)
    prompt = [1, 77, *range(2, 60)]
    bad, good = Generation("bad", prompt, 9, keys=keys_of(prompt)), generation(0)
    good.constraint = NoBadToken()
    for each in (bad, good):
        engine.submit(each)
    errors = []
    while len(engine):
        ran = engine.run(engine.plan())
        errors += [(result.generation.id, result.outcome.error) for result in ran.results if result.outcome.error]
        engine.settle(ran, {result.generation.id: kept_of(result) for result in ran.results})
        for result in ran.results:
            if result.outcome.error or not result.generation.left:
                engine.remove(result.generation.id)
    engine.sweep()
    assert [name for name, _ in errors] == ["bad"]
    assert f"position {len(prompt)} are not finite" in errors[0][1]
    assert "layer 0 of 2" in errors[0][1]
    assert len(good.generated) == 20
    assert engine.cache.stats().cached == 0
    engine.check()
    together = [Generation(name, prompt, 9, keys=keys_of(prompt)) for name in ("one", "two")]
    for each in together:
        engine.submit(each)
    assert step(engine).joining == ["two"]
    while any(each.id in engine for each in together):
        ran = engine.run(engine.plan())
        engine.settle(ran, {})
        for result in ran.results:
            assert "not finite" in result.outcome.error
            engine.remove(result.generation.id)
    assert engine.sharing.joined == 0
    engine.sweep()
    with pytest.raises(EngineError, match=r"request bad: .*not finite"):
        complete(engine, [bad_again := Generation("bad", prompt, 9, keys=keys_of(prompt))])
    assert bad_again.cached == 0
    assert len(engine) == 0


class NoBadToken(OnlyEven):
    """77 is odd."""


def test_after_a_failure_the_others_can_go_on(poisoned: Model) -> None:
    engine = engine_of(poisoned, 512)
    generations = [generation(0), Generation("bad", [77], 9), generation(4)]
    for each in generations:
        each.constraint = OnlyEven()
    with pytest.raises(EngineError, match="request bad"):
        complete(engine, generations)
    assert len(engine) == 2
    serve(engine, lambda *_: Draft())
    assert [len(each.generated) for each in generations] == [20, 0, 20]


def test_a_removed_request_may_come_again_under_its_name_while_its_last_pass_runs(model: Model, alone: Alone) -> None:
    for settled_in_between in (False, True):
        engine = engine_of(model, 512)
        engine.submit(generation(1))
        step = engine.plan()
        ran = engine.run(step)
        engine.remove("r1")
        again = generation(1)
        engine.submit(again)
        if settled_in_between:
            engine.sweep()
        engine.settle(ran, {"r1": (95,)})
        assert again.tokens == prompt_of(1)
        serve(engine, lambda *_: Draft())
        assert again.generated == alone.output(1)[:20]
        assert engine.cache.free_tokens == 512


def test_a_request_removed_between_plan_and_run_is_not_computed(model: Model) -> None:
    engine = engine_of(model, 512)
    engine.submit(generation(1))
    engine.submit(generation(2))
    step = engine.plan(drafts={"unknown": Draft((1,))})
    engine.remove("r1")
    ran = engine.run(step)
    assert set(ran.computed) == {"r2"}
    engine.settle(ran, {})
    engine.remove("r2")
    engine.sweep()
    assert engine.cache.free_tokens == 512
    engine.check()


def test_an_expired_request_is_gone_and_gives_its_pages_back(model: Model) -> None:
    engine = engine_of(model, 512)
    late = generation(1)
    late.deadline = 100
    engine.submit(late)
    engine.settle(engine.run(engine.plan(now=99)), {"r1": (3,)})
    step = engine.plan(now=100)
    assert (step.plan.expired, step.idle, len(engine), late.removed) == (["r1"], True, 0, True)
    engine.run(step)
    assert engine.cache.free_tokens == 512
    engine.check()


class EngineMachine(RuleBasedStateMachine):
    """Requests come, wait, are held, go and come again at any moment of a step."""

    alone: Alone

    def __init__(self) -> None:
        super().__init__()
        self.engine = engine_of(self.alone.model, 288, budget=64, chunk=20)
        self.live: dict[str, Generation] = {}
        self.held: set[str] = set()
        self.step: Step | None = None
        self.ran: Ran | None = None

    def number(self, name: str) -> int:
        return int(name[1:])

    @rule(number=st.integers(0, 7), max_tokens=st.integers(1, 25), keys=st.booleans(), constrained=st.booleans())
    def submit(self, number: int, max_tokens: int, keys: bool, constrained: bool) -> None:
        if f"r{number}" in self.live:
            return
        each = generation(number, max_tokens, keys=keys, constrained=constrained)
        each.priority = number % 2
        self.engine.submit(each)
        self.live[each.id] = each

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.live)))
        self.engine.remove(name)
        del self.live[name]
        self.held.discard(name)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def hold_or_release(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.live)))
        if name in self.held:
            self.engine.scheduler.release(name)
        else:
            self.engine.scheduler.hold(name)
        self.held ^= {name}

    @precondition(lambda self: self.step is None and self.ran is None)
    @rule(lengths=st.lists(st.integers(-4, 4), min_size=1, max_size=4))
    def plan(self, lengths: list[int]) -> None:
        """Proposals: so many right ones, and a wrong one where the number is negative."""
        drafts: dict[str, Draft] = {}
        for each, length in zip(self.engine.decodes(), lengths, strict=False):
            future = self.alone.output(self.number(each.id), each.constraint is not None)[len(each.generated) :]
            right = future[: abs(length)]
            parents = tuple(range(-1, len(right) - 1))
            drafts[each.id] = Draft((*right, 0)) if length < 0 else Draft(tuple(right), parents)
        self.step = self.engine.plan(drafts=drafts)

    @precondition(lambda self: self.step is not None)
    @rule()
    def run(self) -> None:
        assert self.step is not None
        self.ran, self.step = self.engine.run(self.step), None

    @precondition(lambda self: self.ran is not None)
    @rule()
    def settle(self) -> None:
        assert self.ran is not None
        kept = {result.generation.id: kept_of(result) for result in self.ran.results}
        assert not any(result.outcome.error for result in self.ran.results)
        self.engine.settle(self.ran, kept)
        self.ran = None
        for name, each in list(self.live.items()):
            if not each.left:
                self.engine.remove(name)
                del self.live[name]
                self.held.discard(name)

    @rule(turns=st.integers(1, 6))
    def go_on(self, turns: int) -> None:
        """Whole steps."""
        for _ in range(turns):
            if self.step is None and self.ran is None:
                self.step = self.engine.plan()
            if self.step is not None:
                self.run()
            self.settle()

    @rule()
    def sweep(self) -> None:
        if self.step is None:
            self.engine.sweep()

    @invariant()
    def the_books_are_right_and_so_is_every_answer(self) -> None:
        self.engine.check()
        assert len(self.engine) == len(self.live)
        for name, each in self.live.items():
            right = self.alone.output(self.number(name), each.constraint is not None)
            assert each.generated == right[: len(each.generated)]

    def teardown(self) -> None:
        if self.step is not None:
            self.run()
        if self.ran is not None:
            self.settle()
        for name in self.held:
            self.engine.scheduler.release(name)
        wanted = dict(self.live)
        serve(self.engine, half_right(self.alone))
        for name, each in wanted.items():
            right = self.alone.output(self.number(name), each.constraint is not None)
            assert each.generated == right[: each.max_tokens]
        assert self.engine.cache.free_tokens == 288
        self.engine.check()


def test_whatever_happens_every_answer_is_right_and_every_page_comes_back(alone: Alone) -> None:
    machine = type("Machine", (EngineMachine,), {"alone": alone})
    examples = 60 if alone.model.executor.name == "native" else 15
    run_state_machine_as_test(machine, settings=settings(max_examples=examples, stateful_step_count=30, deadline=None))


ANSWERS = """
import sys
from pathlib import Path
import countersign.services.draft.__main__
import countersign.services.target.__main__
from countersign.services.engine.engine import Engine, complete
from countersign.services.engine.generation import Generation
from countersign.services.engine.kv import PagedCache
from countersign.services.engine.model import load_model
for numerics in ("fast", "invariant"):
    model = load_model(Path(sys.argv[1]), numerics=numerics)
    engine = Engine.of(model, PagedCache(model.config, model.dtype, 512), chunk=32)
    complete(engine, [Generation("a", [number % 90 + 5 for number in range(100)], 3)])
print(sorted({"torch._dynamo", "sympy"} & sys.modules.keys()))
"""


def test_answers_need_nothing_of_torchs_compiler(demo_models: dict[str, Path]) -> None:
    """Which would be two fifths of what a target takes to start."""
    command = [sys.executable, "-c", ANSWERS, str(demo_models["draft"])]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"
