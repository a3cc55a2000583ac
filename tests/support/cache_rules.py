"""Rules of a machine that drives a block store, a naive model of what the store must answer, and the properties.

The rules watch from outside: they keep what the answers said, and look into nothing. ``CacheRules`` drives
``BlockCache``; a subclass may put a real service in its place, which then need not say what it evicts (``exact`` is
false). With one deliberate bug at a time, the property that is named for it must fall.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, Phase, event, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from countersign.services.protocol import keys
from countersign.services.protocol.cache import Block, BlockCache, Outcome, Recency, Reserved, Tier
from countersign.services.protocol.errors import NotLeased, NotPinned, NotSealable

PROPERTIES = (
    "NoTornRead",
    "PrefixClosed",
    "PinnedStays",
    "OneWriter",
    "BytesConserved",
    "GenMonotone",
    "TenantsApart",
    "SameAsModel",
)
TENANTS = ("acme", "evil")
HOLDERS = ("h1", "h2", "h3")

Path = tuple[str, tuple[int, ...]]
"""A block as people think of it: the tenant, and the token that each block of the chain is full of."""


class Violated(AssertionError):
    """A property of DESIGN.md section 7 does not hold."""


@dataclass(eq=False)
class Seen:
    """A block that is there, as far as the answers tell. ``pins``: expiries by number; ``copies``: whole ones."""

    path: Path
    key: bytes
    parent: bytes
    size: int
    lease: int
    holder: str
    expires: float
    generation: int = 0
    slot: int = 0
    filled: set[int] = field(default_factory=set)
    sealed: bool = False
    used: int = 0
    pins: dict[int, float] = field(default_factory=dict)
    copies: set[Tier] = field(default_factory=set)

    def pinned(self, now: float) -> bool:
        return any(expires > now for expires in self.pins.values())


def chain_of(path: Path) -> list[bytes]:
    tenant, tokens = path
    root = keys.root_key(b"weights", "fp32", tenant)
    return keys.chain_keys(root, [token for token in tokens for _ in range(keys.BLOCK_TOKENS)])


def digest_of(key: bytes) -> bytes:
    """What the machine calls the checksum of the block's only right bytes."""
    return key[:16]


paths = st.tuples(st.sampled_from(TENANTS), st.lists(st.integers(0, 1), min_size=1, max_size=3).map(tuple))
holders = st.sampled_from(HOLDERS)
which = st.integers(0, 30)


class CacheRules(RuleBasedStateMachine):
    """One tier, whose evictions the model foretells."""

    properties: tuple[str, ...] = PROPERTIES
    seen: set[str] = set()  # noqa: RUF012  shared by all runs of one machine on purpose: what was reached at all
    ram, disk, unit = 60, 0, 10
    exact = True

    def __init__(self) -> None:
        super().__init__()
        self.numbers = itertools.count(1)
        self.cache: Any = self.made()
        self.blocks: dict[bytes, Seen] = {}
        self.condemned: list[Seen] = []
        self.leases: list[tuple[bytes, int]] = []
        self.pins: dict[int, list[Seen]] = {}
        self.old_pins: list[int] = []
        self.now = 0
        self.uses = 0
        self.last_generation = 0

    def made(self) -> Any:
        """The store."""
        return BlockCache(self.ram, self.disk, draw=self.numbers.__next__, policy=Recency)

    def saw(self, what: str) -> None:
        event(what)
        self.seen.add(what)

    def hold(self, name: str, condition: object) -> None:
        if name in self.properties and not condition:
            raise Violated(name)

    # Rules

    @rule(seconds=st.integers(1, 4))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds

    @rule(path=paths, holder=holders, ttl=st.integers(1, 8), known=st.integers(0, 30))
    def lookup(self, path: Path, holder: str, ttl: int, known: int) -> None:
        """Any chain, or that of a block that is there."""
        if known % 3 and self.blocks:
            path = list(self.blocks.values())[known % len(self.blocks)].path
        chain = chain_of(path)
        expected = [self.blocks[key] for key in chain if key in self.blocks]
        expected = list(itertools.takewhile(lambda block: block.sealed, expected))
        expected = [block for block, key in zip(expected, chain, strict=False) if block.key == key]
        found = self.cache.lookup(chain, holder, now=self.now, ttl=ttl)
        self.hold("NoTornRead", found.count <= len(expected))
        self.hold("SameAsModel", found.count == len(expected) or not self.exact)
        self.hold("PinnedStays", all(not block.pinned(self.now) for block in expected[found.count :]))
        self.hold("OneWriter", found.count == 0 or found.pin not in self.pins)
        self.forget(expected[found.count :])
        if found.count:
            self.saw("found")
            self.pinned(path, expected[: found.count], found.pin, self.now + ttl)

    def pinned(self, path: Path, chain: list[Seen], pin: int, expires: float) -> None:
        self.pins[pin] = chain
        for depth, block in reversed(list(enumerate(chain, 1))):
            self.hold("TenantsApart", block.path == (path[0], path[1][:depth]))
            block.pins[pin] = expires
            self.use(block)

    @rule(path=paths, number=which)
    def read(self, path: Path, number: int) -> None:
        """By any pin ever given, and by one that never was; a block that it was given for, or any."""
        known = [987_654_321, *self.old_pins, *self.pins]
        pin = known[-1 - number % len(known)]
        mine = [block.key for block in self.pins.get(pin, [])]
        key = mine[number % len(mine)] if mine and number % 4 else chain_of(path)[-1]
        block = self.blocks.get(key)
        allowed = block is not None and block.pins.get(pin, 0) > self.now
        try:
            read = self.cache.read(key, pin, now=self.now)
        except NotPinned:
            self.hold("PinnedStays", not allowed)
            return
        self.hold("SameAsModel", allowed)
        self.hold("NoTornRead", read.checksum == digest_of(key))
        self.saw("read")

    @rule(path=paths, holder=holders, size=st.integers(1, 3), ttl=st.integers(1, 8), whole=st.booleans())
    def reserve(self, path: Path, holder: str, size: int, ttl: int, whole: bool) -> None:
        """One block, or the chain down to it as a target does."""
        self.reserve_chain(path, holder, size, ttl, whole)

    def reserve_chain(self, path: Path, holder: str, size: int, ttl: int, whole: bool) -> None:
        chain = chain_of(path)
        for depth in range(1 if whole else len(chain), len(chain) + 1):
            parent = chain[depth - 2] if depth > 1 else b""
            new = Seen(
                (path[0], path[1][:depth]), chain[depth - 1], parent, size * self.unit, 0, holder, self.now + ttl
            )
            self.reserve_one(new, ttl)

    def reserve_one(self, new: Seen, ttl: int) -> None:
        lapsed = self.lapsed()
        outcomes, victims = self.model_reserve(new, lapsed)
        reserved: Reserved = self.cache.reserve(
            new.key, new.parent, new.size, new.holder, now=self.now, ttl=ttl, kind=b"k" * 32
        )
        dropped = self.settle()
        self.hold("SameAsModel", not self.exact or reserved.outcome in outcomes)
        if self.exact and not self.disk:
            self.hold("SameAsModel", dropped == lapsed | set(victims))
        if victims:
            self.saw("evicted")
        if lapsed:
            self.saw("a lease lapsed")
        self.forget([self.blocks[key] for key in lapsed if key in self.blocks])
        self.hold("OneWriter", (reserved.outcome is Outcome.GRANTED) == (reserved.lease != 0))
        if reserved.lease:
            self.given(new, reserved.lease)

    def given(self, new: Seen, lease: int) -> None:
        old, new.lease = self.blocks.get(new.key), lease
        if old is not None and old.sealed and not self.exact:
            self.hold("PinnedStays", not old.pinned(self.now))
            self.forget([old])
            old = None
        if old is None:
            above = self.blocks.get(new.parent)
            self.hold("PrefixClosed", not new.parent or above is not None)
            self.hold("OneWriter", lease not in {each for _, each in self.leases})
            self.leases.append((new.key, lease))
            self.blocks[new.key] = new
            self.new_generation(new)
            return
        self.hold("OneWriter", not old.sealed and (old.lease, old.holder) == (lease, new.holder))
        old.expires = max(old.expires, new.expires)
        self.saw("a lease is renewed")

    def new_generation(self, new: Seen) -> None:
        block = self.cache.get(new.key)
        if block is not None:
            new.generation = new.slot = block.generation
            self.hold("GenMonotone", new.generation > self.last_generation)
            self.last_generation = max(self.last_generation, new.generation)

    @rule(path=paths, holder=holders, size=st.integers(1, 2))
    def write(self, path: Path, holder: str, size: int) -> None:
        """The good case: a chain is reserved, written and sealed, as far as there is room."""
        before = len(self.leases)
        self.reserve_chain(path, holder, size, 8, True)
        for key, lease in self.leases[before:]:
            block = self.blocks.get(key)
            self.fill(key, lease, 0, block.size if block else self.unit)
            self.seal_one(key, lease)

    @rule(number=which, half=st.sampled_from([0, 1, 2]))
    def fill_some(self, number: int, half: int) -> None:
        """One half of a block, or both, by any lease ever given."""
        if self.leases:
            key, lease = self.leases[-1 - number % len(self.leases)]
            block = self.blocks.get(key)
            size = block.size if block else self.unit
            self.fill(key, lease, *((0, size // 2), (size // 2, size - size // 2), (0, size))[half])

    def fill(self, key: bytes, lease: int, start: int, length: int) -> None:
        block = self.holding(key, lease)
        try:
            self.cache.write(key, lease, start, length, now=self.now)
        except NotLeased:
            self.hold("SameAsModel", block is None)
            return
        self.hold("OneWriter", block is not None)
        if block is not None:
            block.filled |= set(range(start, start + length))

    @rule(number=which)
    def seal(self, number: int) -> None:
        """Any lease ever given: some have lapsed, some blocks have gone, some are sealed already."""
        if self.leases:
            self.seal_one(*self.leases[-1 - number % len(self.leases)])

    def seal_one(self, key: bytes, lease: int) -> None:
        block = self.holding(key, lease)
        above = self.blocks.get(block.parent) if block is not None else None
        closed = block is not None and (not block.parent or (above is not None and above.sealed))
        whole = block is not None and len(block.filled) == block.size
        try:
            self.cache.seal(key, lease, digest_of(key), now=self.now)
        except (NotLeased, NotSealable):
            self.hold("SameAsModel", not (closed and whole))
            if block is not None and not closed:
                self.saw("a child was first")
            return
        self.hold("OneWriter", block is not None)
        self.hold("NoTornRead", whole or block is None)
        self.hold("PrefixClosed", closed or block is None)
        if block is not None:
            block.sealed = True
            block.copies.add(Tier.RAM)
            self.use(block)

    @rule(number=which, pin=st.booleans())
    def release(self, number: int, pin: bool) -> None:
        """Any pin or lease ever given, again too."""
        known = [*self.old_pins, *self.pins] if pin else [lease for _, lease in self.leases]
        if known:
            self.release_one(known[-1 - number % len(known)])

    def release_one(self, number: int) -> None:
        mine = {block.key for block in self.blocks.values() if not block.sealed and block.lease == number}
        unpinned = self.pins.pop(number, [])
        for block in unpinned:
            block.pins.pop(number, None)
        self.old_pins += [number] if unpinned else []
        self.cache.release(number)
        dropped = self.settle()
        expected = self.below(mine)
        self.hold("SameAsModel", not self.exact or expected <= dropped)
        self.forget([self.blocks[key] for key in expected if key in self.blocks])

    @rule()
    def expire(self) -> None:
        lapsed = self.lapsed()
        for number in list(self.pins):
            self.end_pin(number)
        self.cache.expire(self.now)
        dropped = self.settle()
        self.hold("SameAsModel", not self.exact or lapsed <= dropped)
        self.forget([self.blocks[key] for key in lapsed if key in self.blocks])

    def end_pin(self, number: int) -> None:
        if any(block.pins.get(number, 0) <= self.now for block in self.pins[number]):
            for block in self.pins.pop(number):
                block.pins.pop(number, None)
            self.old_pins.append(number)

    # The model

    def use(self, block: Seen) -> None:
        self.uses += 1
        block.used = self.uses

    def bequeath(self, block: Seen) -> None:
        """Whoever used it used the block before it."""
        above = self.blocks.get(block.parent)
        if above is not None:
            above.used = max(above.used, block.used)

    def holding(self, key: bytes, lease: int) -> Seen | None:
        """The block that this lease may fill now."""
        block = self.blocks.get(key)
        fits = block is not None and not block.sealed and block.lease == lease and block.expires > self.now
        return block if fits else None

    def lapsed(self) -> set[bytes]:
        over = {key for key, block in self.blocks.items() if not block.sealed and block.expires <= self.now}
        return self.below(over)

    def below(self, found: set[bytes]) -> set[bytes]:
        while more := {key for key, block in self.blocks.items() if block.parent in found} - found:
            found = found | more
        return found

    def model_reserve(self, new: Seen, lapsed: set[bytes]) -> tuple[set[Outcome], list[bytes]]:
        """What may be answered, and what goes for it."""
        left = {name: block for name, block in self.blocks.items() if name not in lapsed}
        old, above = left.get(new.key), left.get(new.parent)
        if old is not None and old.sealed:
            return {Outcome.PRESENT}, []
        if old is not None:
            return {Outcome.GRANTED if (old.holder, old.size) == (new.holder, new.size) else Outcome.BUSY}, []
        if new.parent and (above is None or not (above.sealed or above.holder == new.holder)):
            return {Outcome.NO_PARENT}, []
        if self.disk:
            return {Outcome.GRANTED, Outcome.NO_ROOM}, []
        victims: list[bytes] = []
        room = self.ram - sum(block.size for block in self.condemned)
        while sum(block.size for block in left.values()) + new.size > room:
            parents = {block.parent for block in left.values()} | {new.parent}
            free = [key for key, block in left.items() if block.sealed and key not in parents]
            free = [key for key in free if not self.counts_as_pinned(left[key])]
            if not free:
                return {Outcome.NO_ROOM}, []
            victims.append(min(free, key=lambda key: left[key].used))
            self.bequeath(left.pop(victims[-1]))
        return {Outcome.GRANTED}, victims

    def counts_as_pinned(self, block: Seen) -> bool:
        """As the store counts: while any pin is left of it, the longest that there was since it had none."""
        held: Block | None = self.cache.get(block.key) if self.exact else None
        return held.pinned(self.now) if held is not None else block.pinned(self.now)

    def settle(self) -> set[bytes]:
        """Takes what the store dropped out of the model; the keys of the blocks that went."""
        gone: set[bytes] = set()
        for drop in self.cache.drops():
            kept = next((each for each in self.condemned if self.is_of(each, drop)), None)
            if kept is not None:
                self.hold("PinnedStays", not kept.pinned(self.now) or drop.tier not in kept.copies)
                kept.copies.discard(drop.tier)
                self.condemned = [each for each in self.condemned if each.copies]
                continue
            block = self.blocks.get(drop.key)
            if block is None:
                continue
            self.hold("PinnedStays", not block.pinned(self.now) or drop.tier not in block.copies)
            block.copies.discard(drop.tier)
            held = self.cache.get(drop.key)
            if held is None or held.generation != block.generation:
                gone.add(drop.key)
                self.bequeath(self.blocks.pop(drop.key))
        self.hold("PrefixClosed", all(block.parent not in gone for block in self.blocks.values()))
        return gone

    @staticmethod
    def is_of(block: Seen, drop: Any) -> bool:
        number = block.slot if drop.tier is Tier.RAM else block.generation
        return bool(drop.key == block.key and drop.generation == number)

    def forget(self, blocks: list[Seen]) -> None:
        """They have gone, with all below them."""
        for key in self.below({block.key for block in blocks}):
            self.blocks.pop(key, None)

    # Properties

    @invariant()
    def books_agree(self) -> None:
        if not self.exact:
            return
        sealed = {block.key: block for block in self.cache.sealed()}
        for block in sealed.values():
            self.hold("PrefixClosed", block.above is None or sealed.get(block.above.key) is block.above)
        if not self.disk:
            sizes = sum(block.size for block in (*self.blocks.values(), *self.condemned))
            self.hold("BytesConserved", self.cache.room(Tier.RAM) == sizes <= self.ram)
        for tier, capacity in ((Tier.RAM, self.ram), (Tier.DISK, self.disk)):
            self.hold("BytesConserved", 0 <= self.cache.room(tier) <= capacity)
        if self.properties == PROPERTIES:
            assert set(sealed) == {key for key, block in self.blocks.items() if block.sealed}
            self.cache.check_integrity()

    def teardown(self) -> None:
        """Everybody dies: once their time is over, all that nobody sealed is gone and all that is sealed can go."""
        if self.properties != PROPERTIES or not self.exact:
            return
        self.now += 100
        self.expire()
        assert all(block.sealed for block in self.blocks.values())
        reserved = self.cache.reserve(b"x" * 32, b"", self.ram, "last", now=self.now, ttl=1)
        assert reserved.lease
        self.settle()
        assert all(block.copies == {Tier.DISK} for block in self.blocks.values())


def run(machine: type[CacheRules], *, examples: int, steps: int = 50, seeds: Iterable[int] | None = None) -> None:
    """Runs a machine ``examples`` times, with each of the seeds, else with one that its rules fix.

    More seeds find what one that is out of luck does not. None fixes what is drawn: Hypothesis also draws constants of
    the modules that are loaded.
    """
    factories = [machine] if seeds is None else (seed(number)(machine) for number in seeds)
    for factory in factories:
        run_state_machine_as_test(
            factory,
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                derandomize=True,
                database=None,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            ),
        )


def reach(
    rules: type[CacheRules], wanted: set[str], *, examples: int, steps: int = 50, most: int = 10, **fields: object
) -> None:
    """Runs sound rules, with one seed after the other, until all that is ``wanted`` was seen."""
    seen: set[str] = set()
    for number in range(most):
        run(type("Sound", (rules,), {"seen": seen, **fields}), examples=examples, steps=steps, seeds=[number])
        if wanted <= seen:
            return
    raise AssertionError(f"never reached: {wanted - seen}")
