"""Requests in, tokens out: the scheduler, the paged cache, the model and sampling, joined.

A step is :meth:`Engine.plan`, :meth:`Engine.run`, :meth:`Engine.settle`. ``run`` alone touches the model and the cache
and may take place in a thread of its own, in which whatever else touches the cache then runs as well; all other
methods belong to the caller's thread. What ends an answer is the caller's business: it keeps of the new tokens those
that belong to it, and removes the request.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from countersign.services.engine.errors import ContextExceeded, EngineError
from countersign.services.engine.filling import Filling, filling_of
from countersign.services.engine.generation import Generation, usable_keys, work_of
from countersign.services.engine.kv import CachedSequence, PagedCache
from countersign.services.engine.model import Model
from countersign.services.engine.pages import PAGE_TOKENS
from countersign.services.engine.runner import Outcome, Runner, Work
from countersign.services.engine.scheduler import Plan, Request, Scheduler
from countersign.services.engine.speculation import Draft

_NO_DRAFT = Draft()
_NO_DRAFTS: Mapping[str, Draft] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Step:
    """A plan, the requests it speaks of, and the draft of each of its decodes."""

    plan: Plan
    generations: Mapping[str, Generation]
    drafts: Mapping[str, Draft]

    @property
    def idle(self) -> bool:
        """Nothing is computed."""
        return not (self.plan.decodes or self.plan.prefills)


@dataclass(frozen=True, slots=True)
class Result:
    """What a pass gave a request that samples: new tokens, how many proposals were offered and accepted, an error."""

    generation: Generation
    outcome: Outcome
    drafted: int


@dataclass(frozen=True, slots=True)
class Ran:
    """A finished pass: what was computed and adopted of each request, how many of its pages others find, and what those
    that sampled got.
    """

    computed: Mapping[str, int]
    adopted: Mapping[str, int]
    published: Mapping[str, int]
    results: Sequence[Result]


@dataclass(slots=True)
class Sharing:
    """How prompts were computed since the start: ``computed`` tokens, ``adopted`` tokens whose pages were there, and
    ``joined`` of these for which a request left a pass out, since another computed them; ``waits``: how often.
    """

    computed: int = 0
    adopted: int = 0
    joined: int = 0
    waits: int = 0


class Engine:
    """All requests of one model and cache. Prompts that begin alike are computed once: ``sharing`` counts it."""

    @staticmethod
    def of(
        model: Model,
        cache: PagedCache,
        budget: int = 512,
        chunk: int = 256,
        most: int = 1024,
        runner: Runner | None = None,
    ) -> Engine:
        """An engine whose scheduler knows the cache; see :class:`Scheduler` for the numbers."""
        scheduler = Scheduler(cache.free_tokens // PAGE_TOKENS, budget=budget, chunk=chunk, most=most)
        return Engine(model, cache, scheduler, runner)

    def __init__(self, model: Model, cache: PagedCache, scheduler: Scheduler, runner: Runner | None = None) -> None:
        self.scheduler = scheduler
        self.cache = cache
        self._runner = runner or Runner(model, cache)
        self._generations: dict[str, Generation] = {}
        self._over: deque[Generation] = deque()
        self.sharing = Sharing()

    def __len__(self) -> int:
        return len(self._generations)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._generations

    def submit(self, generation: Generation) -> None:
        """Lets a request wait for its turn.

        Raises:
            ContextExceeded, RequestTooLarge: it could never fit the model's context, or the cache; says what would.
            EngineError: see :meth:`Scheduler.submit`.
        """
        wanted, limit = generation, self._runner.model.config.context_length
        if len(wanted.tokens) + wanted.max_tokens > limit:
            raise ContextExceeded(len(wanted.tokens) + wanted.max_tokens, limit)
        length, keys = len(wanted.tokens), tuple(wanted.keys)
        self.scheduler.submit(
            Request(wanted.id, wanted.tenant, wanted.priority, length, wanted.max_tokens, wanted.deadline, keys)
        )
        self._generations[generation.id] = generation

    def remove(self, request_id: str) -> None:
        """Forgets a request; its pages come back with the next ``run`` or ``sweep``. Unknown ones are fine."""
        self.scheduler.remove(request_id)
        generation = self._generations.pop(request_id, None)
        if generation is not None:
            generation.removed = True
            self._over.append(generation)

    def decodes(self) -> list[Generation]:
        """Those for which a draft is of use in the next pass."""
        return [self._generations[name] for name in self.scheduler.decodes()]

    def plan(self, now: int = 0, drafts: Mapping[str, Draft] = _NO_DRAFTS) -> Step:
        """The next pass; ``now`` in the same milliseconds as the deadlines. What has expired is removed."""
        drafts = {
            name: draft.shallow(self._generations[name].left - 1)
            for name, draft in drafts.items()
            if name in self._generations
        }
        lengths = {name: len(draft) for name, draft in drafts.items()}
        plan = self.scheduler.plan(now, self.cache.free_tokens // PAGE_TOKENS, lengths)
        named = (*plan.decodes, *plan.prefills, *plan.admitted, *plan.preempted, *plan.joining)
        generations = {name: self._generations[name] for name in named}
        for name in plan.expired:
            self.remove(name)
        granted = {name: drafts[name].cut(count) for name, count in plan.decodes.items() if count}
        return Step(plan, generations, granted)

    def run(self, step: Step, skip: Collection[str] = ()) -> Ran:
        """Computes a pass; what it computes of prompts is shared at once. Those of ``skip`` that are admitted get no
        prefill: their KV comes from elsewhere.

        Raises:
            RankLost: nothing was computed; ``requeue``, ``forget``, and go on.
        """
        self.sweep(step.generations[name] for name in step.plan.preempted)
        live = {name: generation for name, generation in step.generations.items() if not generation.removed}
        adopted = {name: self._adopt(live[name]) for name in step.plan.admitted if name in live}
        works = {
            name: work_of(live[name], 1, step.drafts.get(name, _NO_DRAFT)) for name in step.plan.decodes if name in live
        }
        for name, count in step.plan.prefills.items():
            if name in live and name not in skip:
                left = count if name in adopted else self._instead(live[name], count, adopted)
                if left:
                    works[name] = work_of(live[name], left, _NO_DRAFT)
        outcomes = self._compute(works, live) if works else []
        results = [
            Result(live[name], outcome, len(work.draft))
            for (name, work), outcome in zip(works.items(), outcomes, strict=True)
            if work.samples or outcome.error
        ]
        sound = []
        for (name, work), outcome in zip(works.items(), outcomes, strict=True):
            if name in step.plan.prefills:
                self.sharing.computed += len(work.token_ids)
                if outcome.sound:
                    sound.append(name)
                    self._publish(live[name])
        for name in step.plan.joining:
            if name in live and name not in skip:
                self._join(live[name], adopted)
        published = {name: tokens // PAGE_TOKENS for name, tokens in adopted.items()}
        published |= {name: self._publishable(live[name]) for name in sound}
        computed = {name: work.sequence.length for name, work in works.items()}
        adopted = {name: tokens for name, tokens in adopted.items() if name not in skip}
        return Ran(computed, adopted, published, results)

    def _compute(self, works: Mapping[str, Work], live: Mapping[str, Generation]) -> list[Outcome]:
        """A pass, which tells of the blocks that it fills to whoever wants to know. Their last layer is told once all
        numbers are known to be finite.
        """
        fillings = {name: filling for name, work in works.items() if (filling := filling_of(live[name].filled, work))}
        last = self._runner.model.config.layers - 1

        def tell(layer: int) -> None:
            for filling in fillings.values():
                if layer < last:
                    filling.layer(layer)

        layered = fillings and self._runner.model.executor.layered
        outcomes = self._runner.run(list(works.values()), tell if layered else None)
        for (name, work), outcome in zip(works.items(), outcomes, strict=True):
            if name not in fillings or outcome.error or (work.proves and not outcome.sound):
                continue
            if layered:
                fillings[name].layer(last)
            else:
                fillings[name].whole(last + 1)
        return outcomes

    def load(self, generation: Generation, blocks: Sequence[bytes]) -> None:
        """Appends exported blocks that follow what a request has, and shares them; those that others have by now are
        adopted. Belongs where ``run`` does.

        Raises:
            InvalidBlock, OutOfPages: see :meth:`CachedSequence.import_block`; what came before stays.
        """
        sequence = generation.sequence
        if sequence is None:
            return  # a deadline may have taken it while the blocks were on their way
        first = sequence.length // PAGE_TOKENS
        if generation.filled is None:
            self._extend(generation, sequence, len(generation.keys))
        try:
            for block in blocks[sequence.length // PAGE_TOKENS - first :]:
                sequence.import_block(block)
        finally:
            self._publish(generation)

    def settle(self, ran: Ran, kept: Mapping[str, Sequence[int]]) -> None:
        """Tells the scheduler what was computed, and adds to each request those of its new tokens that it keeps."""
        for result in ran.results:
            if result.outcome.error:
                result.generation.keys = ()  # its KV may be what is wrong
        for name, tokens in ran.adopted.items():
            if tokens and self._running(name) is not None:
                self.scheduler.adopted(name, tokens)
        for name, pages in ran.published.items():
            if self._running(name) is not None:
                self.scheduler.published(name, pages)
        for name, computed in ran.computed.items():
            generation = self._running(name)
            if generation is None:
                continue
            new = kept.get(name, ())
            generation.tokens.extend(new)
            if generation.constraint is not None:
                generation.constraint.accept(new)
            self.scheduler.computed(name, min(computed, len(generation.tokens)), len(generation.tokens))

    def sweep(self, others: Iterable[Generation] = ()) -> None:
        """Gives back the pages of requests that were removed, and of these."""
        over = [self._over.popleft() for _ in range(len(self._over))]
        for generation in (*over, *others):
            if generation.sequence is not None:
                self._publish(generation)
                generation.sequence.close()
                generation.sequence = None

    def close(self) -> None:
        """Ends what the model has started; nothing runs any more."""
        self._runner.model.executor.close()

    def requeue(self) -> None:
        """After :class:`RankLost`: requests keep their tokens, wait, and are computed anew. Then call ``forget``."""
        self.scheduler.forget()

    def forget(self) -> None:
        """All KV is lost. Belongs where ``run`` does."""
        self.cache.forget()
        for generation in (*self._generations.values(), *self._over):
            generation.sequence = None

    def check(self) -> None:
        """Raises:
        EngineError: the books of the cache or of the scheduler are wrong. For idle moments.
        """
        self.cache.check_integrity()
        self.scheduler.check()

    def _running(self, name: str) -> Generation | None:
        """Who took part in the last pass; not who was submitted under the id of one removed since."""
        generation = self._generations.get(name)
        return generation if generation is not None and generation.sequence is not None else None

    def _adopt(self, generation: Generation) -> int:
        """Opens a request's sequence with the pages that others computed; at least one token is left to feed."""
        generation.sequence = self.cache.sequence()
        adopted = self.cache.adopt(generation.sequence, usable_keys(generation))
        generation.cached = max(generation.cached, min(adopted, generation.prompt_tokens))
        self.sharing.adopted += adopted
        return adopted

    def _instead(self, generation: Generation, count: int, adopted: dict[str, int]) -> int:
        """Adopts those pages of a chunk that exist by now, as when others computed them while it was held; how many of
        the chunk's ``count`` tokens are left to compute. Pages behind the chunk wait: the plan has not counted them.
        """
        sequence = generation.sequence
        if sequence is None or not generation.keys or sequence.length % PAGE_TOKENS:
            return count
        before = sequence.length
        after = self._extend(generation, sequence, (before + count) // PAGE_TOKENS)
        if after > before:
            adopted[generation.id] = after
        return count - (after - before)

    def _join(self, generation: Generation, adopted: dict[str, int]) -> None:
        """Adopts what the pass has computed for others."""
        sequence = generation.sequence
        if sequence is None:
            return
        before = sequence.length
        after = self._extend(generation, sequence, len(generation.keys))
        if after > before:
            adopted[generation.id] = after
        self.sharing.waits += 1
        self.sharing.joined += after - before

    def _extend(self, generation: Generation, sequence: CachedSequence, pages: int) -> int:
        """Adopts what there is behind its own pages, up to so many in all; how much it then has."""
        before = sequence.length
        after = self.cache.adopt(sequence, usable_keys(generation)[:pages])
        generation.cached = min(generation.cached + after - before, generation.prompt_tokens)
        if generation.filled is not None and after > before:
            blocks = range(before // PAGE_TOKENS, after // PAGE_TOKENS)
            Filling(generation.filled, sequence, blocks).whole(self._runner.model.config.layers)
        self.sharing.adopted += after - before
        return after

    def _publish(self, generation: Generation) -> None:
        """Lets others have the pages whose keys are known."""
        if generation.keys and generation.sequence is not None:
            self.cache.publish(generation.sequence, generation.keys[: self._publishable(generation)])

    @staticmethod
    def _publishable(generation: Generation) -> int:
        """How many of its pages have keys and are full of known tokens."""
        length = 0 if generation.sequence is None else generation.sequence.length
        return min(min(length, len(generation.tokens)) // PAGE_TOKENS, len(generation.keys))


Propose = Callable[[Sequence[Generation]], Mapping[str, Draft]]


def complete(engine: Engine, generations: Iterable[Generation], propose: Propose | None = None) -> None:
    """Runs requests to their last token, with proposals or without: for programs that want answers and nothing else.

    Raises:
        EngineError: a request cannot be computed, and is removed; the others are as they are.
    """
    for generation in generations:
        engine.submit(generation)
    while len(engine):
        drafts = _NO_DRAFTS if propose is None else propose(engine.decodes())
        ran = engine.run(engine.plan(drafts=drafts))
        engine.settle(ran, {result.generation.id: kept_of(result) for result in ran.results})
        for result in ran.results:
            if result.outcome.error or not result.generation.left:
                engine.remove(result.generation.id)
        for result in ran.results:
            if result.outcome.error:
                raise EngineError(f"request {result.generation.id}: {result.outcome.error}")
    engine.sweep()


def kept_of(result: Result) -> tuple[int, ...]:
    """The new tokens that ``max_tokens`` leaves."""
    return result.outcome.token_ids[: result.generation.left]
