"""Many readers and writers on one block cache: what can never happen, and that a naive model would answer the same.

The machine watches the cache from outside: it keeps what the answers said, and looks into nothing. It then runs with
one deliberate bug at a time, and the property that must fall is named.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, Phase, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from countersign.services.protocol import keys
from countersign.services.protocol.cache import Block, BlockCache
from countersign.services.protocol.errors import NotPinned

PROPERTIES = ("NoTornRead", "PrefixClosed", "PinnedStays", "OneWriter", "BytesConserved", "TenantsApart", "SameAsModel")
CAPACITY = 60
TENANTS = ("acme", "evil")
HOLDERS = ("h1", "h2", "h3")

Path = tuple[str, tuple[int, ...]]
"""A block as people think of it: the tenant, and the token that each block of the chain is full of."""


class Violated(AssertionError):
    """A property of DESIGN.md section 7 does not hold."""


@dataclass
class Seen:
    """A block that is there, as far as the answers tell."""

    path: Path
    parent: bytes
    size: int
    lease: int
    holder: str
    expires: int
    sealed: bool = False
    used: int = 0
    pins: dict[str, int] = field(default_factory=dict)

    def pinned(self, now: int) -> bool:
        return any(expires > now for expires in self.pins.values())


def chain_of(path: Path) -> list[bytes]:
    tenant, tokens = path
    root = keys.root_key(b"weights", "fp32", tenant)
    return keys.chain_keys(root, [token for token in tokens for _ in range(keys.BLOCK_TOKENS)])


paths = st.tuples(st.sampled_from(TENANTS), st.lists(st.integers(0, 1), min_size=1, max_size=3).map(tuple))
holders = st.sampled_from(HOLDERS)


class CacheMachine(RuleBasedStateMachine):
    properties: tuple[str, ...] = PROPERTIES
    seen: set[str] = set()  # noqa: RUF012  shared by all runs of one machine on purpose: what was reached at all

    def __init__(self) -> None:
        super().__init__()
        self.cache = BlockCache(CAPACITY)
        self.blocks: dict[bytes, Seen] = {}
        self.leases: list[tuple[bytes, int]] = []
        self.now = 0
        self.uses = 0

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

    @rule(path=paths, holder=holders, ttl=st.integers(1, 8))
    def lookup(self, path: Path, holder: str, ttl: int) -> None:
        chain = chain_of(path)
        expected = 0
        while expected < len(chain) and chain[expected] in self.blocks and self.blocks[chain[expected]].sealed:
            expected += 1
        found = self.cache.lookup(chain, holder, now=self.now, ttl=ttl)
        self.hold("SameAsModel", found == expected)
        for depth, key in reversed(list(enumerate(chain[:found], 1))):
            block = self.blocks.get(key)
            self.hold("NoTornRead", block is not None and block.sealed)
            if block is not None:
                self.hold("TenantsApart", block.path == (path[0], path[1][:depth]))
                block.pins[holder] = max(self.now + ttl, block.pins.get(holder, 0))
                self.use(block)
            self.saw("found")

    @rule(path=paths, holder=holders)
    def read(self, path: Path, holder: str) -> None:
        key = chain_of(path)[-1]
        block = self.blocks.get(key)
        allowed = block is not None and block.sealed and block.pins.get(holder, 0) > self.now
        try:
            checksum = self.cache.checksum(key, holder, now=self.now)
        except NotPinned:
            self.hold("PinnedStays", not allowed)
            return
        self.hold("SameAsModel", allowed)
        self.hold("NoTornRead", checksum == key)

    @rule(path=paths, holder=holders, size=st.integers(1, 3), ttl=st.integers(1, 8), whole=st.booleans())
    def reserve(self, path: Path, holder: str, size: int, ttl: int, whole: bool) -> None:
        """One block, or the chain down to it as a target does."""
        self.reserve_chain(path, holder, size, ttl, whole)

    def reserve_chain(self, path: Path, holder: str, size: int, ttl: int, whole: bool) -> None:
        chain = chain_of(path)
        for depth in range(1 if whole else len(chain), len(chain) + 1):
            self.reserve_one((path[0], path[1][:depth]), chain[:depth], holder, size * 10, ttl)

    def reserve_one(self, path: Path, chain: list[bytes], holder: str, size: int, ttl: int) -> None:
        key, parent = chain[-1], chain[-2] if len(chain) > 1 else b""
        lapsed = self.lapsed()
        may, victims = self.model_reserve(key, parent, holder, size, lapsed)
        answer = self.cache.reserve(key, parent, size, holder, now=self.now, ttl=ttl)
        self.hold("SameAsModel", (answer.lease > 0, set(answer.dropped)) == (may, lapsed | set(victims)))
        if victims:
            self.saw("evicted")
        if lapsed:
            self.saw("a lease lapsed")
        self.drop(answer.dropped)
        if answer.lease:
            self.given(key, Seen(path, parent, size, answer.lease, holder, self.now + ttl))

    def given(self, key: bytes, new: Seen) -> None:
        old = self.blocks.get(key)
        if old is None:
            self.hold("PrefixClosed", not new.parent or new.parent in self.blocks)
            self.hold("OneWriter", (key, new.lease) not in self.leases)
            self.leases.append((key, new.lease))
            self.blocks[key] = new
            return
        self.hold("OneWriter", not old.sealed and (old.lease, old.holder) == (new.lease, new.holder))
        old.lease, old.holder, old.expires = new.lease, new.holder, max(old.expires, new.expires)
        self.saw("a lease is renewed")

    @rule(path=paths, holder=holders, size=st.integers(1, 2))
    def write(self, path: Path, holder: str, size: int) -> None:
        """The good case: a chain is reserved and sealed, as far as there is room."""
        before = len(self.leases)
        self.reserve_chain(path, holder, size, 8, True)
        for key, lease in self.leases[before:]:
            self.seal_one(key, lease)

    @rule(which=st.integers(0, 30))
    def seal(self, which: int) -> None:
        """Any lease ever given: some have lapsed, some blocks have gone, some are sealed already."""
        if self.leases:
            self.seal_one(*self.leases[-1 - which % len(self.leases)])

    def seal_one(self, key: bytes, lease: int) -> None:
        block = self.blocks.get(key)
        holds = block is not None and not block.sealed and block.lease == lease and block.expires > self.now
        parent = self.blocks.get(block.parent) if block is not None else None
        closed = block is not None and (not block.parent or (parent is not None and parent.sealed))
        sealed = self.cache.seal(key, lease, key, now=self.now)
        self.hold("SameAsModel", sealed == (holds and closed))
        self.hold("OneWriter", holds or not sealed)
        self.hold("PrefixClosed", closed or not sealed)
        if sealed and block is not None:
            block.sealed = True
            self.use(block)
        elif holds:
            self.saw("a child was first")

    @rule(holder=holders, path=paths, everything=st.booleans())
    def release(self, holder: str, path: Path, everything: bool) -> None:
        chosen = set(self.blocks) if everything else {chain_of(path)[-1]}
        mine = {key for key in chosen if key in self.blocks and self.writes(key, holder)}
        dropped = self.cache.release(holder, () if everything else chosen)
        self.hold("SameAsModel", set(dropped) == self.below(mine))
        for key in chosen & self.blocks.keys():
            self.blocks[key].pins.pop(holder, None)
        self.drop(dropped)

    @rule()
    def expire(self) -> None:
        dropped = self.cache.expire(self.now)
        self.hold("SameAsModel", set(dropped) == self.lapsed())
        self.drop(dropped)

    # The model

    def use(self, block: Seen) -> None:
        self.uses += 1
        block.used = self.uses

    def writes(self, key: bytes, holder: str) -> bool:
        return not self.blocks[key].sealed and self.blocks[key].holder == holder

    def lapsed(self) -> set[bytes]:
        over = {key for key, block in self.blocks.items() if not block.sealed and block.expires <= self.now}
        return self.below(over)

    def below(self, found: set[bytes]) -> set[bytes]:
        while more := {key for key, block in self.blocks.items() if block.parent in found} - found:
            found = found | more
        return found

    def model_reserve(
        self, key: bytes, parent: bytes, holder: str, size: int, lapsed: set[bytes]
    ) -> tuple[bool, list[bytes]]:
        left = {name: block for name, block in self.blocks.items() if name not in lapsed}
        if key in left:
            return not left[key].sealed and (left[key].holder, left[key].size) == (holder, size), []
        if parent and (parent not in left or not (left[parent].sealed or left[parent].holder == holder)):
            return False, []
        victims: list[bytes] = []
        while sum(block.size for block in left.values()) + size > CAPACITY:
            parents = {block.parent for block in left.values()} | {parent}
            leaves = [name for name, block in left.items() if block.sealed and name not in parents]
            free = [name for name in leaves if not left[name].pinned(self.now)]
            if not free:
                return False, []
            victims.append(min(free, key=lambda name: left[name].used))
            del left[victims[-1]]
        return True, victims

    def drop(self, dropped: tuple[bytes, ...]) -> None:
        for key in dropped:
            block = self.blocks.pop(key, None)
            self.hold("SameAsModel", block is not None)
            self.hold("PinnedStays", block is None or not block.pinned(self.now))
        gone = set(dropped)
        self.hold("PrefixClosed", all(block.parent not in gone for block in self.blocks.values()))

    # Properties

    @invariant()
    def books_agree(self) -> None:
        sizes = sum(block.size for block in self.blocks.values())
        self.hold("BytesConserved", self.cache.used_bytes == sizes <= CAPACITY)
        sealed = {block.key for block in self.cache.sealed()}
        for block in self.cache.sealed():
            self.hold("PrefixClosed", not block.parent or block.parent in sealed)
        if self.properties == PROPERTIES:
            assert sealed == {key for key, block in self.blocks.items() if block.sealed}
            self.cache.check_integrity()

    def teardown(self) -> None:
        """Everybody dies: once their time is over, all that nobody sealed is gone and all that is sealed can go."""
        if self.properties != PROPERTIES:
            return
        self.now += 100
        self.expire()
        assert all(block.sealed for block in self.blocks.values())
        answer = self.cache.reserve(b"x" * 32, b"", CAPACITY, "last", now=self.now, ttl=1)
        assert answer.lease
        assert set(answer.dropped) == set(self.blocks)


def run(machine: type[CacheMachine], *, examples: int) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=50,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_no_schedule_of_readers_writers_and_lapses_breaks_a_property() -> None:
    seen: set[str] = set()
    run(type("Sound", (CacheMachine,), {"seen": seen}), examples=250)
    reached = {"found", "evicted", "a lease lapsed", "a lease is renewed", "a child was first"}
    assert reached - seen == set(), "never reached"


# Deliberate bugs.


def find_what_is_being_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        BlockCache, "_sealed_prefix", lambda cache, chain: [cache._blocks[key] for key in chain if key in cache._blocks]
    )


def evict_what_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Block, "pinned", lambda *_: False)


def evict_parents_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def oldest(cache: BlockCache, missing: int, parent: bytes, now: float) -> list[Block]:
        return [block for block in cache.sealed() if block.key != parent][: 1 if missing > 0 else 0]

    monkeypatch.setattr(BlockCache, "_victims", oldest)


def seal_over_an_unsealed_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockCache, "_parent_sealed", lambda *_: True)


def seal_with_a_lapsed_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    leased = BlockCache._leased
    monkeypatch.setattr(BlockCache, "_leased", lambda cache, key, lease, _: leased(cache, key, lease, -1))


def lease_to_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    def generous(cache: BlockCache, block: Block, *_: object) -> int:
        return cache._last_lease + 1

    monkeypatch.setattr(BlockCache, "_renew", generous)


def forget_the_room_of_what_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    remove = BlockCache._remove

    def forgetful(cache: BlockCache, block: Block) -> None:
        remove(cache, block)
        cache._bytes += block.size

    monkeypatch.setattr(BlockCache, "_remove", forgetful)


def leave_the_tenant_out(monkeypatch: pytest.MonkeyPatch) -> None:
    root_key = keys.root_key
    monkeypatch.setattr(keys, "root_key", lambda weights, cache_format, _: root_key(weights, cache_format, ""))


MUTANTS = [
    (find_what_is_being_written, "NoTornRead"),
    (evict_what_is_pinned, "PinnedStays"),
    (evict_parents_first, "PrefixClosed"),
    (seal_over_an_unsealed_parent, "PrefixClosed"),
    (seal_with_a_lapsed_lease, "OneWriter"),
    (lease_to_everybody, "OneWriter"),
    (forget_the_room_of_what_goes, "BytesConserved"),
    (leave_the_tenant_out, "TenantsApart"),
]


@pytest.mark.parametrize(("mutant", "killer"), MUTANTS, ids=lambda value: getattr(value, "__name__", value))
def test_each_deliberate_bug_is_killed_by_the_property_it_should_violate(
    monkeypatch: pytest.MonkeyPatch, mutant: Callable[[pytest.MonkeyPatch], None], killer: str
) -> None:
    mutant(monkeypatch)
    machine = type("Broken", (CacheMachine,), {"seen": set(), "properties": (killer,)})
    with pytest.raises(Violated, match=killer):
        run(machine, examples=3000)
