"""Which requests run in the next forward pass: continuous batching as a pure state machine. No clock, tensor or I/O.

A pass holds decodes (one token each, and proposals to verify) and prefill chunks, under a token budget (SARATHI,
arXiv 2308.16369). Requests are admitted by KV memory, kept fair between tenants by virtual token counters (VTC, Sheng
et al., "Fairness in Serving Large Language Models", OSDI 2024), and preempted by recompute when pages run out. Order:

1. Priority to admit from: highest ``priority * aging - s``, s the plan that last admitted from it, or it began to wait.
2. Its tenant: least virtual counter. Its request: earliest deadline, at most ``patience`` ms away; earliest arrival.
3. Seniority of who runs: priority, one more for each ``aging`` plans of age; plain priority; earliest arrival.
4. A pass: decodes, all or least recently run first; prefills by seniority; then whoever is admitted; then proposals.
5. Who needs next what the pass computes for somebody before it joins: it waits, and adopts that. Admission counts pages
   that requests share once.
6. Short of pages: proposals are cut, then least priority (as in 3), most used tenant, latest arrival is preempted, for
   whoever comes before it in that order, but never the most senior.

Nobody starves: who comes next waits for room and is not passed by smaller requests; a priority that nobody is admitted
from gains on the others; who waits for a block gains it in that very pass, or computes it; and the most senior always
runs, whom only those outrank that arrived early enough, a finite number. The services (prompt tokens + 2 * output
tokens) of two tenants that both wait at one priority differ by at most twice (the longest prompt + 2 * what the
requests that run at once may put out).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from types import MappingProxyType

from countersign.services.engine.errors import EngineError, RequestTooLarge
from countersign.services.engine.grants import Left, grant, joins, leading
from countersign.services.engine.pages import PAGE_TOKENS, pages_for
from countersign.services.engine.queues import Entry, Key, Level, Request, Share

__all__ = ["Plan", "Request", "Scheduler"]

# What a token costs its tenant; an output token takes a pass of its own (Sheng et al., section 5).
PROMPT_WEIGHT = 1
OUTPUT_WEIGHT = 2

NO_PROPOSALS: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Plan:
    """One forward pass.

    ``decodes``: the last known token of each is fed, and up to so many proposals. ``prefills``: up to so many of the
    tokens that have no KV yet, in order. ``admitted`` run from now on; some are among the prefills already.
    ``preempted`` give all pages back before the next plan, and wait again. ``expired`` are forgotten: their deadline
    is past. This pass needs no page of those preempted or expired: a page that is shared would not come free.
    ``joining`` compute nothing, since this pass computes what they need next for another: they adopt it afterwards.
    """

    decodes: Mapping[str, int]
    prefills: Mapping[str, int]
    admitted: Sequence[str]
    preempted: Sequence[str]
    expired: Sequence[str]
    joining: Sequence[str]


class Scheduler:
    """All requests of an engine whose KV cache has ``pages`` pages of 16 tokens.

    A step: ask the draft for :meth:`decodes`; :meth:`plan`; take back the pages of those preempted; let those admitted
    adopt a cached prefix (:meth:`adopted`), or :meth:`hold` them while it loads; run the pass, of an adopted prefix
    less; let those joining adopt what it computed (:meth:`adopted`); :meth:`computed` for each that ran, and
    :meth:`published` for pages that others find now; :meth:`remove` what is over. A plan without work that preempted or
    admitted somebody is followed by another at once.

    ``budget``: tokens a pass; ``chunk``: prefill tokens of one request a pass, of which the most senior gets up
    to a quarter of the budget whatever the decodes take; ``most``: requests that run at once, however much KV is
    free; ``room``: proposals of one decode; ``aging``: plans that
    outweigh one priority; ``patience``: ms after which a request counts as due, deadline or not.
    """

    def __init__(
        self,
        pages: int,
        *,
        budget: int = 512,
        chunk: int = 256,
        most: int = 1024,
        room: int = 64,
        aging: int = 256,
        patience: int = 60_000,
    ) -> None:
        self.fits = (pages - pages_for(room)) * PAGE_TOKENS
        self._budget = budget
        self._chunk = chunk
        self._most = most
        self._share = max(1, min(chunk, budget // 4))
        self._room = room
        self._aging = aging
        self._patience = patience
        self._tick = self._now = self._arrivals = 0
        self._entries: dict[str, Entry] = {}
        # In order of admission, but that decodes which did not all fit a pass take turns.
        self._running: dict[str, Entry] = {}
        # Blocks whose pages running requests hold and others can adopt, and how many hold them.
        self._shared: Counter[bytes] = Counter()
        self._levels: dict[int, Level] = {}
        self._deadlines: list[Key] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    @property
    def running(self) -> int:
        """Requests admitted, held ones included."""
        return len(self._running)

    @property
    def next_deadline(self) -> int | None:
        """The earliest deadline of all, in ms."""
        return self._deadlines[0][0] if self._deadlines else None

    def submit(self, request: Request) -> None:
        """Let a request wait for admission.

        Raises:
            RequestTooLarge: its KV, with room for proposals, could never fit the cache.
            EngineError: the id is taken, or a count is below 1.
        """
        tokens = request.prompt_tokens + request.max_tokens
        if request.prompt_tokens < 1 or request.max_tokens < 1:
            raise EngineError(f"request {request.id} must have a prompt token and ask for at least one more")
        if tokens > self.fits:
            raise RequestTooLarge(tokens, self.fits)
        if request.id in self._entries:
            raise EngineError(f"request {request.id} is scheduled already; submit it under another id or remove it")
        level = self._levels.setdefault(request.priority, Level(request.priority, self._tick))
        share = level.shares.setdefault(request.tenant, Share(request.tenant))
        self._arrivals += 1
        urgency = self._now + self._patience
        due = None
        if request.deadline is not None:
            due = (request.deadline, self._arrivals, request.id)
            insort(self._deadlines, due)
            urgency = min(urgency, request.deadline)
        key = (urgency, self._arrivals, request.id)
        senior = (self._tick // self._aging - request.priority, -request.priority, self._arrivals)
        entry = Entry(request, request.id, level, share, key, due, senior, known=request.prompt_tokens)
        self._entries[request.id] = entry
        level.members += 1
        share.members += 1
        level.push(entry, self._tick)

    def hold(self, request_id: str) -> None:
        """Leave it out of plans, and as it is, until :meth:`release`. A deadline still ends it."""
        entry = self._entry(request_id)
        if not (entry.held or entry.running):
            entry.level.pull(entry)
        entry.held = True

    def release(self, request_id: str) -> None:
        """It takes part again."""
        entry = self._entry(request_id)
        if entry.held and not entry.running:
            entry.level.push(entry, self._tick)
        entry.held = False

    def remove(self, request_id: str) -> None:
        """Forget a request, whatever its state; one that is not here is nothing to do."""
        entry = self._entries.pop(request_id, None)
        if entry is None:
            return
        if entry.running:
            self._stop(entry)
        elif not entry.held:
            entry.level.pull(entry)
        if entry.due is not None:
            del self._deadlines[bisect_left(self._deadlines, entry.due)]
        entry.share.members -= 1
        entry.level.members -= 1
        if not entry.level.members:
            del self._levels[entry.level.priority]

    def forget(self) -> None:
        """All KV is lost: whoever runs waits again, and is computed anew."""
        for entry in list(self._running.values()):
            if entry.held:
                self._stop(entry)
            else:
                self._preempt(entry)

    def adopted(self, request_id: str, tokens: int) -> None:
        """A running request has the KV of its first ``tokens`` tokens, whole pages, those it lacked from elsewhere.

        Raises:
            EngineError: it is not running or has more KV already, the pages are not whole, or no token is left to feed.
        """
        entry = self._entry(request_id)
        if not entry.running or tokens % PAGE_TOKENS or not entry.computed <= tokens < entry.known:
            raise EngineError(f"request {request_id} cannot adopt {tokens} tokens: {_state(entry)}")
        entry.computed = tokens

    def computed(self, request_id: str, tokens: int, known: int) -> None:
        """After a pass: its first ``tokens`` tokens have KV, and ``known`` are known, prompt and output.

        Raises:
            EngineError: it is not running, or the numbers are not possible.
        """
        entry = self._entry(request_id)
        most = entry.request.prompt_tokens + entry.request.max_tokens
        if not (entry.running and entry.computed <= tokens <= known and entry.known <= known <= most):
            raise EngineError(f"request {request_id} cannot have {tokens} of {known} tokens: {_state(entry)}")
        entry.share.counter += OUTPUT_WEIGHT * (known - entry.known)
        entry.computed, entry.known = tokens, known

    def published(self, request_id: str, pages: int) -> None:
        """While it runs it holds its first ``pages`` pages where others find them; who shares them needs none for them.

        Raises:
            EngineError: it is not running, or so many pages have no keys.
        """
        entry = self._entry(request_id)
        if not entry.running or pages > len(entry.request.keys):
            raise EngineError(f"request {request_id} cannot share {pages} pages: {_state(entry)}")
        self._shared.update(entry.request.keys[entry.published : pages])
        entry.published = max(entry.published, pages)

    def decodes(self) -> list[str]:
        """Who decodes in the next pass, but for deadlines and lack of pages: whom to get proposals for."""
        return [entry.id for entry in self._ready()[0]]

    def plan(self, now: int, free_pages: int, proposals: Mapping[str, int] = NO_PROPOSALS) -> Plan:
        """The next pass. It needs at most ``free_pages`` pages: those that nobody holds, cached prefixes among them.

        ``now`` in ms; ``proposals``: how many tokens the draft proposes for each of :meth:`decodes`.
        """
        self._tick += 1
        self._now = now
        expired = self._expire(now)
        decodes, prefills, promised = self._ready()
        prefills.sort(key=_seniority)
        needy = [entry for entry in (*decodes, *prefills[:1]) if not entry.computed % PAGE_TOKENS]
        stalled, victims = self._short(needy, free_pages) if len(needy) > free_pages else ([], [])
        if stalled:
            out = {entry.id for entry in (*stalled, *victims)}
            decodes = [entry for entry in decodes if entry.id not in out]
            prefills = [entry for entry in prefills if entry.id not in out]
        pages = free_pages - sum(not entry.computed % PAGE_TOKENS for entry in decodes)
        if len(decodes) >= self._budget - self._share:
            for entry in decodes:
                self._running[entry.id] = self._running.pop(entry.id)
        wanted = [min(proposals.get(entry.id, 0), self._room) for entry in decodes] if proposals else []
        left = Left(self._budget - len(decodes) - sum(wanted), pages)
        for entry in prefills:
            if joins(entry, left):
                left.joining.append(entry.id)
            elif left.tokens > 0 or not left.chunks:
                count = self._feed(entry, left)
                left.pages -= pages_for(entry.computed + count) - pages_for(entry.computed)
        admitted = [] if stalled else self._admit(left, pages - promised)
        left.tokens = self._budget - len(decodes) - sum(left.chunks.values())
        granted = grant(decodes, wanted, left) if any(wanted) else dict.fromkeys([e.id for e in decodes], 0)
        for entry in victims:
            self._preempt(entry)
        return Plan(granted, left.chunks, admitted, [entry.id for entry in victims], expired, left.joining)

    def _expire(self, now: int) -> list[str]:
        expired = []
        while self._deadlines and self._deadlines[0][0] <= now:
            expired.append(self._deadlines[0][2])
            self.remove(expired[-1])
        return expired

    def _ready(self) -> tuple[list[Entry], list[Entry], int]:
        """Decodes that fit a pass, prefills, and the pages that all prefills, held ones too, need until their end."""
        decodes: list[Entry] = []
        prefills: list[Entry] = []
        promised, counted = 0, set[bytes]()
        for entry in self._running.values():
            missing = entry.known - entry.computed
            if missing > 1:
                promised += pages_for(entry.known) - max(pages_for(entry.computed), leading(entry, counted))
                counted.update(entry.request.keys)
                if not entry.held:
                    prefills.append(entry)
            elif missing and not entry.held:
                decodes.append(entry)
        most = self._budget
        if prefills or any(level.waiting for level in self._levels.values()):
            most -= self._share
        return decodes[:most], prefills, promised

    def _short(self, needy: list[Entry], free: int) -> tuple[list[Entry], list[Entry]]:
        """Who of those that need a page stalls in this pass, and who is preempted so that the next has enough."""
        ready = [entry for entry in self._running.values() if not entry.held]
        first = min(ready, key=_seniority)

        def standing(entry: Entry) -> tuple[bool, int, int, int, int]:
            priority, plain, arrival = entry.senior
            return (entry is not first, priority, plain, entry.share.counter, arrival)

        stalled = sorted(needy, key=standing)[free:]
        short = len(stalled)
        victims: list[Entry] = []
        for entry in sorted(ready, key=standing, reverse=True):
            if short <= 0 or entry is stalled[0]:
                break
            if entry.computed:
                victims.append(entry)
                short -= pages_for(entry.computed) + (entry in stalled)
        return stalled, victims

    def _feed(self, entry: Entry, left: Left) -> int:
        """Gives a prefill its chunk, as far as tokens and pages go."""
        tokens = left.tokens if left.chunks else max(left.tokens, self._share)
        slots = -entry.computed % PAGE_TOKENS + left.pages * PAGE_TOKENS
        count = min(self._chunk, entry.known - entry.computed, tokens, slots)
        whole = (entry.computed + count) // PAGE_TOKENS * PAGE_TOKENS - entry.computed
        if entry.request.keys and 0 < whole < entry.known - entry.computed:
            count = whole  # behind half a page it could not adopt what others compute
        if count:
            left.chunks[entry.id] = count
            left.tokens -= count
            keys, first = entry.request.keys, entry.computed // PAGE_TOKENS
            left.blocks |= {keys[i]: i for i in range(first, min(pages_for(entry.computed + count), len(keys)))}
        return count

    def _admit(self, left: Left, room: int) -> list[str]:
        """Admits who comes next while ``room`` pages hold all that it knows and one page more for each that runs."""
        admitted: list[str] = []
        while (left.tokens > 0 or not left.chunks) and len(self._running) < self._most:
            spare = len(self._running) + 1 if self._running else 0
            levels = [level for level in self._levels.values() if level.waiting]
            if not levels or room <= spare:
                break
            level = max(levels, key=lambda level: (level.priority * self._aging - level.served, level.priority))
            entry = self._entries[level.head()]
            pages = pages_for(entry.known) - max(leading(entry, self._shared), leading(entry, left.counted))
            if pages + spare > room:
                break
            level.pull(entry)
            level.served = self._tick
            self._running[entry.id] = entry
            entry.running = True
            if not entry.charged:
                entry.share.counter += PROMPT_WEIGHT * entry.request.prompt_tokens
                entry.charged = True
            if joins(entry, left):
                left.joining.append(entry.id)
            else:
                self._feed(entry, left)
            # All that nobody holds yet, since it may adopt pages before it computes any.
            left.counted.update(entry.request.keys)
            left.pages -= pages
            room -= pages
            admitted.append(entry.id)
        return admitted

    def _preempt(self, entry: Entry) -> None:
        self._stop(entry)
        entry.level.push(entry, self._tick)

    def _stop(self, entry: Entry) -> None:
        """It gives its pages back."""
        del self._running[entry.id]
        for key in entry.request.keys[: entry.published]:
            self._shared[key] -= 1
            if not self._shared[key]:
                del self._shared[key]
        entry.running, entry.computed, entry.published = False, 0, 0

    def _entry(self, request_id: str) -> Entry:
        entry = self._entries.get(request_id)
        if entry is None:
            raise EngineError(
                f"request {request_id} is not scheduled: it was never submitted, or is removed or expired"
            )
        return entry

    def check(self) -> None:
        """Raises:
        EngineError: the state contradicts itself. For tests and idle moments.
        """
        entries = self._entries.values()
        shares = [share for level in self._levels.values() for share in level.shares.values()]
        waiting: dict[Share, list[Key]] = {share: [] for share in shares}
        for entry in entries:
            if not (entry.running or entry.held):
                waiting[entry.share].append(entry.key)
        members = Counter(entry.share for entry in entries)
        levels = Counter(entry.level for entry in entries)
        due = sorted(entry.due for entry in entries if entry.due is not None)
        claims = {
            "tokens with KV": all(entry.running * entry.known >= entry.computed for entry in entries),
            "running requests": self._running == {entry.id: entry for entry in entries if entry.running},
            "deadlines": self._deadlines == due,
            "queues": all(share.queue == sorted(waiting[share]) for share in shares),
            "waiting tenants": all(
                level.waiting == {share.tenant: share for share in level.shares.values() if share.queue}
                for level in self._levels.values()
            ),
            "tenants": all(share.members == members[share] for share in shares),
            "priorities": {level: level.members for level in self._levels.values()} == levels,
            "shared pages": self._shared
            == Counter(key for entry in entries for key in entry.request.keys[: entry.published]),
        }
        for what, holds in claims.items():
            if not holds:
                raise EngineError(f"the scheduler's {what} are not what its requests say")


_seniority = attrgetter("senior")


def _state(entry: Entry) -> str:
    state = "running" if entry.running else "waiting"
    return f"it is {state}, with KV for {entry.computed} of {entry.known} tokens"
