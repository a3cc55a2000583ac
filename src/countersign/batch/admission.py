"""How much of a batch is in flight: as many jobs as the KV cache holds, whatever their number. Pure."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from countersign.batch.plan import BatchPlan, Job
from countersign.services.protocol.keys import BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class _Need:
    """Pages of a job: its own, prompt and whole answer; and by node of the tree those that others share."""

    own: int
    shared: Sequence[tuple[int, int]]


class Admission:
    """Jobs in the plan's order, while the pages of all in flight fit ``tokens`` of cache and they are at most ``most``.

    A page that several jobs in flight share is counted once. A job that alone does not fit goes alone.
    """

    def __init__(self, plan: BatchPlan, jobs: Sequence[Job], tokens: int, most: int) -> None:
        self._needs = _needs(plan, jobs)
        self._waiting = deque(plan.order)
        self._free = tokens // BLOCK_TOKENS
        self._most = most
        self._flying: set[int] = set()
        self._holders: Counter[int] = Counter()

    @property
    def over(self) -> bool:
        """Nothing waits and nothing is in flight."""
        return not (self._waiting or self._flying)

    @property
    def flying(self) -> int:
        """Jobs in flight."""
        return len(self._flying)

    def skip(self, jobs: set[int]) -> None:
        """These need not run."""
        self._waiting = deque(job for job in self._waiting if job not in jobs)

    def admit(self) -> list[int]:
        """The jobs that start now."""
        admitted = []
        while self._waiting and len(self._flying) < self._most:
            need = self._needs[self._waiting[0]]
            pages = need.own + sum(pages for node, pages in need.shared if not self._holders[node])
            if pages > self._free and self._flying:
                break
            job = self._waiting.popleft()
            self._flying.add(job)
            self._free -= pages
            self._holders.update(node for node, _ in need.shared)
            admitted.append(job)
        return admitted

    def done(self, job: int) -> None:
        """It is no longer in flight."""
        self._flying.remove(job)
        need = self._needs[job]
        self._holders.subtract(node for node, _ in need.shared)
        self._free += need.own + sum(pages for node, pages in need.shared if not self._holders[node])


def _needs(plan: BatchPlan, jobs: Sequence[Job]) -> dict[int, _Need]:
    tree = plan.tree
    needs = {}
    for place, deepest in enumerate(tree.deepest()):
        job = jobs[tree.order[place]]
        shared: list[tuple[int, int]] = []
        index: int | None = deepest
        while index is not None:
            node = tree.nodes[index]
            above = 0 if node.parent is None else tree.nodes[node.parent].depth
            pages = node.depth // BLOCK_TOKENS - above // BLOCK_TOKENS
            if pages:
                shared.append((index, pages))
            index = node.parent
        whole = -(-(len(job.token_ids) + job.max_tokens) // BLOCK_TOKENS)
        needs[tree.order[place]] = _Need(whole - tree.nodes[deepest].depth // BLOCK_TOKENS, shared)
    return needs
