"""Which target computes a prompt, and which one answers. Pure.

Pools as in Splitwise (Patel et al., ISCA 2024): targets for prefill, for decode, and mixed ones. A prompt joins the
shortest queue of its pool; where that is full, the mixed pool's; where that is full too, nobody computes it ahead. A
pool that is overloaded borrows machines of the other, which serve both until the load has drained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from countersign.services.protocol.commit import LogState
from countersign.services.protocol.matching import same_arithmetic, same_weights
from countersign.v1.registry_pb2 import Instance, TargetRole

PREFILL = TargetRole.TARGET_ROLE_PREFILL
DECODE = TargetRole.TARGET_ROLE_DECODE

# A pool borrows when its mean load is this much of what fills a machine, and so many times the other pool's.
BORROW_AT = 1.0
BORROW_FACTOR = 2.0
# It gives back at this. One machine less at most doubles a pool's mean load, so that who gives back at less than half
# of BORROW_AT does not borrow again for the same load.
RETURN_AT = 0.25

Load = Callable[[Instance], float]
_NOTHING: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Limits:
    """What fills a machine: prompt tokens that wait for it, requests that it answers."""

    prompt_tokens: int = 8192
    requests: int = 64


@dataclass(slots=True)
class Pools:
    """The targets of one model as one router sees them. ``lent``: whom a pool has given to the other for a while."""

    limits: Limits = field(default_factory=Limits)
    lent: set[str] = field(default_factory=set)

    def rebalance(self, targets: Iterable[Instance], own: Mapping[str, int] = _NOTHING) -> None:
        """Lends or takes back one machine at most; to be called with each request.

        ``own``: prompt tokens that this router has under way by instance, which the registry may not tell yet.
        """
        able = [target for target in targets if not target.draining]
        self.lent &= {target.instance for target in able if target.role in {PREFILL, DECODE}}
        self._turn(able, PREFILL, DECODE, self._prompts(own), self._requests)
        self._turn(able, DECODE, PREFILL, self._requests, self._prompts(own))

    def prefiller(self, targets: Iterable[Instance], own: Mapping[str, int] = _NOTHING) -> Instance | None:
        """Who computes a prompt ahead; None when no target is there for that, or all are full."""
        able, load = list(targets), self._prompts(own)
        if not any(target.role == PREFILL for target in able):
            return None
        for serves in (self._at_home(PREFILL), self._shared):
            queue = [target for target in able if serves(target)]
            shortest = min(queue, key=lambda target: (load(target), target.instance), default=None)
            if shortest is not None and load(shortest) < 1:
                return shortest
        return None

    def answerers(self, targets: Iterable[Instance]) -> Sequence[Instance]:
        """All of them, whom to ask first first."""
        return sorted(targets, key=self.standing)

    def standing(self, target: Instance) -> tuple[int, int, int, str]:
        """Its place among those who may answer."""
        return self._turn_of(target), target.active_requests, target.pending_prompt_tokens, target.instance

    def _turn_of(self, target: Instance) -> int:
        if target.role == PREFILL and target.instance not in self.lent:
            return 3
        if self._requests(target) >= 1:
            return 2
        return 1 if self._shared(target) else 0

    def _turn(self, able: Sequence[Instance], kind: int, other: int, load: Load, load_of_other: Load) -> None:
        """What the pool of a kind borrows or gives back."""
        borrowed = [target for target in able if target.role == other and target.instance in self.lent]
        lends = any(target.role == kind and target.instance in self.lent for target in able)
        need = _mean(load, [target for target in able if self._serves(target, kind)])
        if borrowed and need <= RETURN_AT:
            self.lent.discard(min(borrowed, key=lambda target: (load(target), target.instance)).instance)
        elif need >= BORROW_AT and not lends:
            spare = [target for target in able if target.role == other and target.instance not in self.lent]
            if spare and need >= BORROW_FACTOR * _mean(load_of_other, [t for t in able if self._serves(t, other)]):
                self.lent.add(min(spare, key=lambda target: (load_of_other(target), target.instance)).instance)

    def _serves(self, target: Instance, kind: int) -> bool:
        return target.role == kind or self._shared(target)

    def _at_home(self, kind: int) -> Callable[[Instance], bool]:
        return lambda target: target.role == kind and target.instance not in self.lent

    def _shared(self, target: Instance) -> bool:
        return target.role not in {PREFILL, DECODE} or target.instance in self.lent

    def _prompts(self, own: Mapping[str, int]) -> Load:
        def load(target: Instance) -> float:
            return max(target.pending_prompt_tokens, own.get(target.instance, 0)) / self.limits.prompt_tokens

        return load

    def _requests(self, target: Instance) -> float:
        return target.active_requests / self.limits.requests


def candidates(targets: Iterable[Instance], log: LogState) -> Sequence[Instance]:
    """Those that take new requests, serve the weights, and compute as the tokens were computed that are there."""
    able = (target for target in targets if not target.draining)
    return [target for target in able if same_weights(target.model, log) and same_arithmetic(target.model, log)]


def _mean(load: Load, targets: Sequence[Instance]) -> float:
    """0 for nobody: who is not there needs nothing."""
    return sum(map(load, targets)) / len(targets) if targets else 0.0
