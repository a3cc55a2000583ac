"""Where prefill apart from decode pays: whole fleets in simulated time, by the router's own placement policy.

Machines run passes as the scheduler plans them (decodes first, then prompt chunks, under a token budget; SARATHI,
arXiv 2308.16369). A pass takes what ``benchmarks/passes.py`` measured. ``benchmarks/split.py`` asks more of it.
Three fleets of equal size: *unsplit*, where each machine does all; *split*, where some only prefill and hand the KV
over (Splitwise, ISCA 2024); *pools*, the same with machines lent under load, by `services/router/placement.py` itself.
Goodput is the rate at which 90 % of requests keep both limits, on the first token and on the mean gap (DistServe).
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import random
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import numpy as np
import simpy

from countersign.cli.bench import Row, load
from countersign.services.router.placement import DECODE, PREFILL, Limits, Pools
from countersign.v1.registry_pb2 import TargetRole

Process = Generator[simpy.Event, Any, None]
Policy = Literal["unsplit", "split", "pools"]
POLICIES: tuple[Policy, ...] = ("unsplit", "split", "pools")
MIXED = TargetRole.TARGET_ROLE_MIXED
ATTAINMENT = 0.9
# Limits, as multiples of an unloaded machine's time for the mean prompt, and of its decode step.
TTFT_SLACK, GAP_SLACK = 10.0, 3.0


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds: of a pass ``base + decode n + prefill p + key k``, for n decodes, p prompt tokens, and k pairs of a
    token and a key that it sees; ``handover + token t``: from the end of a prefill of t tokens until another goes on.
    """

    base: float
    decode: float
    prefill: float
    key: float
    handover: float = 0.003
    token: float = 2e-6

    def seconds(self, decodes: int, tokens: int, keys: float) -> float:
        return self.base + self.decode * decodes + self.prefill * tokens + self.key * keys

    def prompt(self, tokens: float, chunk: int) -> float:
        """A prompt alone on a machine."""
        return self.base * max(1.0, tokens / chunk) + self.prefill * tokens + self.key * tokens * tokens / 2


@dataclass(frozen=True, slots=True)
class Load:
    """What comes: medians and spreads (of the logarithm) of prompt and output tokens; ``burst``: the coefficient of
    variation of the time between arrivals, 1 for Poisson.
    """

    name: str
    prompt: float
    output: float
    spread: float = 0.8
    burst: float = 1.0

    def requests(self, rate: float, count: int, seed: int) -> list[Request]:
        rng = random.Random(seed)
        shape = 1 / self.burst**2
        now, made = 0.0, []
        for _ in range(count):
            now += rng.gammavariate(shape, 1 / (rate * shape))
            made.append(Request(now, self._draw(rng, self.prompt), self._draw(rng, self.output)))
        return made

    def _draw(self, rng: random.Random, median: float) -> int:
        return max(1, min(round(median * math.exp(rng.gauss(0, self.spread))), 8192))

    def mean(self, median: float) -> float:
        """Of what is drawn around a median."""
        return median * math.exp(self.spread**2 / 2)


# Medians of the Azure traces that Splitwise published (section 3).
CODE, CONVERSATION = Load("code", 1500, 13), Load("conversation", 1020, 129)


@dataclass(slots=True, eq=False)
class Request:
    """One request, and when its first and last token came."""

    arrival: float
    prompt: int
    output: int
    computed: int = 0
    first: float = -1.0
    last: float = -1.0
    ended: bool = False

    @property
    def ttft(self) -> float:
        return self.first - self.arrival

    @property
    def gap(self) -> float:
        """Mean seconds between its tokens."""
        return (self.last - self.first) / max(self.output - 1, 1)


@dataclass(eq=False)
class Machine:
    """One engine. What `placement.Pools` asks of an instance it has under the same names."""

    env: simpy.Environment
    instance: str
    role: TargetRole.ValueType
    cost: Cost
    budget: int
    gaps: list[tuple[float, int]]
    # Called with a request whose prompt is computed; true: it goes elsewhere.
    leaves: Callable[[Request], bool]
    draining: bool = False
    pending_prompt_tokens: int = 0
    active_requests: int = 0
    prompts: deque[Request] = field(default_factory=deque)
    passes: int = 0
    running: int = 0
    keys: float = 0.0
    # Those that decode, by the pass that gives them their last token.
    ends: list[tuple[int, int, Request]] = field(default_factory=list)
    _count: Iterator[int] = field(default_factory=itertools.count)
    _wake: simpy.Event | None = None

    def submit(self, request: Request) -> None:
        self.prompts.append(request)
        self.pending_prompt_tokens += request.prompt - request.computed
        if self._wake is not None and not self._wake.triggered:
            self._wake.succeed()

    def run(self) -> Process:
        while True:
            if self.prompts:
                chunks, tokens, keys = self._plan()
                seconds = self.cost.seconds(self.running, tokens, self.keys + keys)
                yield self.env.timeout(seconds)
                self._advance(seconds, 1)
                for request, count in chunks:
                    self._computed(request, count)
            elif self.running:
                yield from self._decode()
            else:
                self._wake = self.env.event()
                yield self._wake
                self._wake = None

    def _decode(self) -> Process:
        """Passes without prompts, up to the next that ends an answer, or with which a prompt comes."""
        passes, began = self.ends[0][0] - self.passes, self.env.now
        self._wake = self.env.event()
        yield self.env.timeout(self._seconds(passes)) | self._wake
        spent, self._wake = self.env.now - began, None
        if self.prompts:
            passes = bisect_left(range(passes), spent, lo=1, key=self._seconds)
            yield self.env.timeout(max(0.0, self._seconds(passes) - spent))
        self._advance(self._seconds(passes), passes)

    def _seconds(self, passes: int) -> float:
        """So many decodes of all that run, each over one key more than the last."""
        one = self.cost.seconds(self.running, 0, self.keys)
        return passes * one + self.cost.key * self.running * passes * (passes - 1) / 2

    def _plan(self) -> tuple[list[tuple[Request, int]], int, float]:
        """Prompt chunks of the next pass: (request, tokens), tokens in all, keys that they see in all."""
        left, chunks, keys = max(self.budget - self.running, self.budget // 4), [], 0.0
        for request in self.prompts:
            count = min(left, request.prompt - request.computed)
            if count <= 0:
                break
            chunks.append((request, count))
            keys += count * (request.computed + count / 2)
            left -= count
        return chunks, sum(count for _, count in chunks), keys

    def _advance(self, seconds: float, passes: int) -> None:
        """Every decode has so many tokens more."""
        self.passes += passes
        if self.running:
            self.gaps.append((seconds / passes, self.running * passes))
            self.keys += self.running * passes
        while self.ends and self.ends[0][0] <= self.passes:
            _, _, request = heapq.heappop(self.ends)
            request.last, request.ended = self.env.now, True
            self.running -= 1
            self.active_requests -= 1
            self.keys -= request.prompt + request.output

    def _computed(self, request: Request, count: int) -> None:
        request.computed += count
        self.pending_prompt_tokens -= count
        if request.computed < request.prompt:
            return
        self.prompts.remove(request)  # among the first
        if self.leaves(request):
            return
        request.first = request.last = self.env.now
        if request.output == 1:
            request.ended = True
            self.active_requests -= 1
            return
        self.running += 1
        self.keys += request.prompt + 1
        heapq.heappush(self.ends, (self.passes + request.output - 1, next(self._count), request))


class Fleet:
    """Some machines behind a router of a policy. ``prefill``: how many of them are for prompts."""

    # What a target that answers computes of a prompt whose KV comes from the store.
    REST = 16

    def __init__(self, cost: Cost, machines: int, policy: Policy, *, prefill: int = 0, budget: int = 512) -> None:
        self._env, self._cost, self._policy = simpy.Environment(), cost, policy
        self.gaps: list[tuple[float, int]] = []
        roles = [MIXED] * machines if policy == "unsplit" else [PREFILL] * prefill + [DECODE] * (machines - prefill)
        self.machines = [
            Machine(self._env, f"m{number:04}", role, cost, budget, self.gaps, self._leaves)
            for number, role in enumerate(roles)
        ]
        self._pools = Pools(Limits(prompt_tokens=8192, requests=64))
        self._away: set[Request] = set()

    def serve(self, requests: Sequence[Request]) -> Result:
        """Until the last has ended."""
        for machine in self.machines:
            self._env.process(machine.run())
        self._env.process(self._arrive(requests))
        step = max(requests[-1].arrival / 10, 0.1)
        while not all(request.ended for request in requests):
            self._env.run(until=self._env.now + step)
        return Result(requests, self.gaps, max(request.last for request in requests))

    def _arrive(self, requests: Iterable[Request]) -> Process:
        for request in requests:
            yield self._env.timeout(max(0.0, request.arrival - self._env.now))
            self._place(request)

    def _place(self, request: Request) -> None:
        machines = cast("Any", self.machines)
        if self._policy == "pools":
            self._pools.rebalance(machines)
        ahead = None if self._policy == "unsplit" else cast("Machine | None", self._pools.prefiller(machines))
        if self._policy == "split" and ahead is None:  # no way out of a full pool
            ahead = min(self._prefillers(), key=lambda machine: machine.pending_prompt_tokens)
        if ahead is not None and request.prompt > self.REST:
            self._away.add(request)
            request.prompt -= self.REST
            ahead.submit(request)
        else:
            self._answer(request)

    def _prefillers(self) -> Iterator[Machine]:
        return (machine for machine in self.machines if machine.role == PREFILL)

    def _leaves(self, request: Request) -> bool:
        if request not in self._away:
            return False
        self._away.discard(request)
        self._env.process(self._hand_over(request))
        return True

    def _hand_over(self, request: Request) -> Process:
        yield self._env.timeout(self._cost.handover + self._cost.token * request.prompt)
        request.prompt += self.REST
        self._answer(request)

    def _answer(self, request: Request) -> None:
        # All are told at once whom the others chose, as if the registry had no delay.
        target = min(self.machines, key=lambda machine: self._pools.standing(cast("Any", machine)))
        target.active_requests += 1
        target.submit(request)


@dataclass(frozen=True, slots=True)
class Result:
    """What a run of a fleet gave. ``gaps``: (seconds, how many tokens waited so long)."""

    requests: Sequence[Request]
    gaps: Sequence[tuple[float, int]]
    seconds: float

    def ttft(self, share: float) -> float:
        return float(np.quantile([request.ttft for request in self.requests], share))

    def gap(self, share: float) -> float:
        """Of all gaps between two tokens."""
        if not self.gaps:
            return 0.0
        seconds, weights = (np.array(part) for part in zip(*sorted(self.gaps), strict=True))
        return float(seconds[np.searchsorted(np.cumsum(weights), share * weights.sum())])

    def mean_gap(self, share: float) -> float:
        """Of the answers' mean gaps."""
        return float(np.quantile([request.gap for request in self.requests if request.output > 1] or [0.0], share))

    @property
    def tokens_per_second(self) -> float:
        return sum(request.output for request in self.requests) / self.seconds

    def attainment(self, ttft: float, gap: float) -> float:
        """Share of requests within both limits."""
        return float(np.mean([request.ttft <= ttft and request.gap <= gap for request in self.requests]))


@dataclass(frozen=True, slots=True)
class Trial:
    """A fleet of a policy under a load; as many requests a machine as are enough to tell. ``gap_slack``: how many times
    an unloaded machine's gap between tokens a request's mean gap may be.
    """

    cost: Cost
    load: Load
    machines: int
    policy: Policy
    prefill: int = 0
    each: int = 60
    gap_slack: float = GAP_SLACK

    def at(self, rate: float, seed: int = 1) -> Result:
        """``rate`` in requests a second and machine."""
        requests = self.load.requests(rate * self.machines, self.each * self.machines, seed)
        return Fleet(self.cost, self.machines, self.policy, prefill=self.prefill).serve(requests)

    def scaled(self, machines: int) -> Trial:
        """The same with more or fewer machines, those for prompts in proportion."""
        share = self.prefill / self.machines
        prefill = max(1, min(machines - 1, round(share * machines))) if self.prefill else 0
        return replace(self, machines=machines, prefill=prefill)

    def goodput(self, steps: int = 7) -> float:
        """The highest rate, in requests a second and machine, at which ATTAINMENT of them keep both limits."""
        prompt = self.cost.prompt(self.load.mean(self.load.prompt), 512)
        step = self.cost.seconds(1, 0, self.load.mean(self.load.prompt))
        limits = TTFT_SLACK * prompt, self.gap_slack * step
        low, high = 0.0, 1.5 / (prompt + self.cost.decode * self.load.mean(self.load.output))
        for _ in range(steps):
            middle = (low + high) / 2
            if self.at(middle).attainment(*limits) >= ATTAINMENT:
                low = middle
            else:
                high = middle
        return low

    def best(self, steps: int = 6) -> tuple[Trial, float]:
        """The best number of machines for prompts, and its goodput (DistServe searches placements so)."""
        if self.policy == "unsplit":
            return self, self.goodput(steps)
        counts = sorted({max(1, min(self.machines - 1, round(self.machines * share / 8))) for share in range(1, 8)})
        found = [(replace(self, prefill=count), replace(self, prefill=count).goodput(steps)) for count in counts]
        return max(found, key=lambda each: each[1])


@dataclass(frozen=True, slots=True)
class Size:
    """How much is simulated: machines of a search, requests a machine, steps of it."""

    machines: int
    each: int
    steps: int


QUICK, WHOLE = Size(4, 25, 5), Size(16, 60, 7)


async def run(quick: bool) -> list[Row]:
    """Goodput of each policy at the cost that passes have here."""
    size = QUICK if quick else WHOLE
    cost = await asyncio.to_thread(lambda: Cost(*load("passes").fitted(quick)))
    return await asyncio.to_thread(goodputs, cost, size)


def goodputs(cost: Cost, size: Size) -> list[Row]:
    """Goodput of each policy beside unsplit machines, with the best number of machines for prompts."""
    rows = []
    for mix, burst in itertools.product((CODE, CONVERSATION), (1.0, 3.0)):
        case = f"{mix.name}, {'Poisson' if burst == 1 else 'bursty'}, {size.machines} machines"
        plain = 0.0
        for policy in POLICIES:
            trial = Trial(cost, replace(mix, burst=burst), size.machines, policy, each=size.each)
            best, goodput = trial.best(size.steps)
            plain = goodput if policy == "unsplit" else plain
            name = f"goodput, {policy}" + (f", {best.prefill} for prompts" if best.prefill else "")
            other: dict[str, Any] = (
                {"peer": "unsplit", "ratio": goodput / plain} if policy != "unsplit" and plain else {}
            )
            n = size.each * size.machines
            rows.append(Row("fleet", case, name, goodput, "requests/s/machine", n, **other))
    return rows
