"""The block cache's rules, one by one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest

from countersign.services.protocol import errors
from countersign.services.protocol.cache import (
    BlockCache,
    Cost,
    Drop,
    Found,
    Outcome,
    Policy,
    Recency,
    Reserved,
    Stored,
    Tier,
    Transition,
)

A, B, C, D = (letter.encode() * 32 for letter in "abcd")
SUM = b"\1" * 16


def fresh(
    ram: int = 30,
    disk: int = 0,
    *,
    policy: Callable[[], Policy] = Recency,
    grain: int = 1,
    observer: Callable[[Transition], None] | None = None,
) -> BlockCache:
    return BlockCache(ram, disk, draw=itertools.count(1).__next__, policy=policy, grain=grain, observer=observer)


def put(cache: BlockCache, key: bytes, parent: bytes = b"", size: int = 10, now: float = 0, cost: float = 0) -> None:
    """Writes and seals one block."""
    lease = cache.reserve(key, parent, size, "writer", now=now, ttl=5, cost=cost).lease
    cache.write(key, lease, 0, size, now=now)
    cache.seal(key, lease, SUM, now=now)


def fill(cache: BlockCache, *chain: bytes, size: int = 10, now: float = 0) -> None:
    """Writes and seals a chain of blocks."""
    for key, parent in zip(chain, (b"", *chain[:-1]), strict=True):
        put(cache, key, parent, size, now)


def reserve(
    cache: BlockCache, key: bytes, parent: bytes = b"", size: int = 10, holder: str = "w", now: float = 0
) -> Reserved:
    return cache.reserve(key, parent, size, holder, now=now, ttl=5)


def lease(cache: BlockCache, key: bytes, parent: bytes = b"", size: int = 10, holder: str = "w", now: float = 0) -> int:
    reserved = reserve(cache, key, parent, size, holder, now)
    assert reserved.outcome is Outcome.GRANTED
    return reserved.lease


def look(cache: BlockCache, keys: Sequence[bytes], now: float = 0, ttl: float = 5) -> Found:
    return cache.lookup(keys, "r", now=now, ttl=ttl)


def gone(cache: BlockCache) -> list[bytes]:
    return [drop.key for drop in cache.drops()]


def on_disk(cache: BlockCache, *keys: bytes) -> None:
    for key in keys:
        block = cache.spill(key, now=0)
        assert block is not None
        assert cache.spilled(key, block.generation, ok=True)


@pytest.fixture
def cache() -> BlockCache:
    return fresh()


def test_a_block_is_found_only_once_it_is_sealed(cache: BlockCache) -> None:
    held = lease(cache, A)
    assert look(cache, [A]) == Found(0, 0)
    cache.write(A, held, 0, 10, now=1)
    assert look(cache, [A]) == Found(0, 0)
    cache.seal(A, held, SUM, now=1)
    found = look(cache, [A], now=1)
    assert found.count == 1
    assert cache.read(A, found.pin, now=5).key == A


def test_a_block_is_sealed_only_when_all_its_bytes_came(cache: BlockCache) -> None:
    held = lease(cache, A)
    cache.write(A, held, 6, 4, now=0)
    cache.write(A, held, 0, 5, now=0)
    with pytest.raises(errors.NotSealable, match="bytes"):
        cache.seal(A, held, SUM, now=0)
    cache.write(A, held, 4, 3, now=0)
    cache.seal(A, held, SUM, now=0)
    with pytest.raises(errors.NotLeased):
        cache.write(A, held, 0, 1, now=0)


@pytest.mark.parametrize(("start", "length"), [(-1, 2), (0, 0), (9, 2), (10, 1)])
def test_bytes_outside_the_block_are_refused(cache: BlockCache, start: int, length: int) -> None:
    with pytest.raises(errors.CacheError):
        cache.write(A, lease(cache, A), start, length, now=0)


def test_a_look_up_takes_the_longest_sealed_prefix_of_the_chain_only(cache: BlockCache) -> None:
    fill(cache, A, B)
    assert [look(cache, keys).count for keys in ([A, B, C], [C, A, B], [B], [A, A], [])] == [2, 0, 0, 1, 0]


def test_a_child_is_sealed_after_its_parent_and_not_before(cache: BlockCache) -> None:
    first, second = lease(cache, A), lease(cache, B, A)
    for key, held in ((A, first), (B, second)):
        cache.write(key, held, 0, 10, now=0)
    with pytest.raises(errors.NotSealable, match="before it"):
        cache.seal(B, second, SUM, now=0)
    cache.seal(A, first, SUM, now=0)
    cache.seal(B, second, SUM, now=0)


def test_a_parent_that_is_absent_or_written_by_another_takes_no_child(cache: BlockCache) -> None:
    assert reserve(cache, B, A) == Reserved(Outcome.NO_PARENT)
    lease(cache, A)
    assert reserve(cache, B, A, holder="other") == Reserved(Outcome.NO_PARENT)
    assert lease(cache, B, A)


def test_a_child_is_of_its_parents_kind(cache: BlockCache) -> None:
    cache.reserve(A, b"", 10, "w", now=0, ttl=5, kind=b"one")
    assert cache.reserve(B, A, 10, "w", now=0, ttl=5, kind=b"other") == Reserved(Outcome.FOREIGN)
    assert cache.reserve(B, A, 10, "w", now=0, ttl=5, kind=b"one").lease


def test_one_writer_holds_a_block_until_its_lease_lapses(cache: BlockCache) -> None:
    old = lease(cache, A, holder="dead")
    assert reserve(cache, A, now=4) == Reserved(Outcome.BUSY)
    with pytest.raises(errors.NotLeased):
        cache.write(A, old, 0, 10, now=5)
    with pytest.raises(errors.NotLeased):
        cache.seal(A, old, SUM, now=5)
    for key, forged in ((A, old + 1), (B, old)):
        with pytest.raises(errors.NotLeased):
            cache.writing(key, forged, now=4)
    new = lease(cache, A, now=5)
    assert gone(cache) == [A]
    assert new != old
    with pytest.raises(errors.NotLeased):
        cache.writing(A, old, now=6)
    cache.write(A, new, 0, 10, now=6)
    cache.seal(A, new, SUM, now=6)
    assert reserve(cache, A, now=6) == Reserved(Outcome.PRESENT)


def test_a_writer_that_asks_again_renews_its_lease(cache: BlockCache) -> None:
    held = lease(cache, A)
    assert lease(cache, A, now=4) == held
    cache.write(A, held, 0, 10, now=8)
    cache.seal(A, held, SUM, now=8)
    assert lease(cache, B, A, now=8)
    assert reserve(cache, B, A, size=11, now=8) == Reserved(Outcome.BUSY)


def test_room_is_made_from_the_least_recently_used_leaf_up(cache: BlockCache) -> None:
    fill(cache, A, B)
    fill(cache, C)
    look(cache, [A], ttl=1)
    held = lease(cache, D, now=2)
    assert gone(cache) == [B]
    cache.release(held)
    assert gone(cache) == [D]
    lease(cache, D, size=30, now=2)
    assert gone(cache) == [C, A]
    assert cache.evictions == [3, 0]


def test_nothing_is_evicted_for_a_block_that_would_not_fit_even_so(cache: BlockCache) -> None:
    fill(cache, A, B)
    fill(cache, C)
    look(cache, [A, B])
    assert reserve(cache, D, size=11, now=4) == Reserved(Outcome.NO_ROOM)
    assert reserve(cache, D, size=31, now=9) == Reserved(Outcome.NO_ROOM)
    assert (cache.room(Tier.RAM), cache.drops()) == (30, [])
    lease(cache, D, now=4)
    assert gone(cache) == [C]


def test_a_parent_is_not_evicted_for_its_own_child(cache: BlockCache) -> None:
    fill(cache, A, size=30)
    assert reserve(cache, B, A, now=9) == Reserved(Outcome.NO_ROOM)
    assert look(cache, [A], now=9).count == 1


def test_room_is_counted_in_grains() -> None:
    cache = fresh(32, grain=16)
    lease(cache, A, size=1)
    assert cache.room(Tier.RAM) == 16
    lease(cache, B, size=16)
    assert reserve(cache, C, size=1) == Reserved(Outcome.NO_ROOM)


def test_only_the_number_of_a_pin_opens_a_block_and_only_while_it_lasts(cache: BlockCache) -> None:
    fill(cache, A, B)
    long, short = look(cache, [A, B]).pin, look(cache, [A], ttl=1).pin
    assert cache.read(B, long, now=4).checksum == SUM
    for key, pin, now in (
        (A, short, 1),
        (B, short, 0),
        (B, long, 5),
        (C, long, 0),
        (A, long + short + 99, 0),
        (A, 0, 0),
    ):
        with pytest.raises(errors.NotPinned):
            cache.read(key, pin, now=now)
    cache.release(long)
    cache.release(long)
    with pytest.raises(errors.NotPinned):
        cache.read(A, long, now=0)


def test_a_write_that_is_given_up_goes_with_all_that_hangs_on_it(cache: BlockCache) -> None:
    fill(cache, A)
    lease(cache, B, A)
    cache.reserve(C, B, 10, "w", now=0, ttl=9)
    cache.expire(4)
    assert cache.drops() == []
    cache.expire(5)
    assert gone(cache) == [C, B]
    assert cache.room(Tier.RAM) == 10
    assert look(cache, [A], now=5).count == 1


def test_a_released_lease_leaves_the_holders_other_blocks(cache: BlockCache) -> None:
    first, second = lease(cache, A), lease(cache, B)
    cache.release(first)
    assert gone(cache) == [A]
    assert cache.writing(B, second, now=0).key == B
    cache.release(first)
    assert cache.drops() == []


def test_a_block_needs_a_size(cache: BlockCache) -> None:
    with pytest.raises(errors.CacheError):
        reserve(cache, A, size=0)


# Two tiers


def test_a_block_on_disk_outlives_its_copy_in_ram() -> None:
    cache = fresh(20, 30)
    fill(cache, A, B)
    on_disk(cache, A, B)
    lease(cache, C)
    assert cache.drops() == [Drop(Tier.RAM, B, 2)]
    assert look(cache, [A, B]).count == 2
    assert (cache.room(Tier.RAM), cache.room(Tier.DISK)) == (20, 20)


def test_what_is_on_disk_is_a_whole_prefix() -> None:
    cache = fresh(30, 30)
    fill(cache, A, B)
    assert cache.spill(B, now=0) is None
    assert cache.spill(A, now=0) is not None
    assert cache.spill(B, now=0) is not None
    assert cache.spill(B, now=0) is None, "it is on the way"
    assert not cache.spilled(A, 1, ok=False)
    assert not cache.spilled(B, 2, ok=True), "its parent is not there"
    assert cache.room(Tier.DISK) == 0
    on_disk(cache, A, B)


def test_a_chain_longer_than_ram_is_written_through_it() -> None:
    cache = fresh(20, 50)
    for key, parent in ((A, b""), (B, A), (C, B), (D, C)):
        put(cache, key, parent)
        on_disk(cache, key)
    assert look(cache, [A, B, C, D]).count == 4
    cache.check_integrity()


def test_a_copy_that_failed_gives_its_room_back_and_may_be_tried_again() -> None:
    cache = fresh(30, 30)
    fill(cache, A)
    cache.spill(A, now=0)
    assert not cache.spilled(A, 1, ok=False)
    assert (cache.drops(), cache.room(Tier.DISK)) == ([Drop(Tier.DISK, A, 1)], 0)
    on_disk(cache, A)


def test_a_block_that_went_while_it_was_being_spilled_does_not_come_back_by_that() -> None:
    cache = fresh(10, 10)
    fill(cache, A)
    assert cache.spill(A, now=0) is not None
    put(cache, B)
    assert cache.drops() == [Drop(Tier.RAM, A, 1), Drop(Tier.DISK, A, 1)]
    assert not cache.spilled(A, 1, ok=True)
    put(cache, A)
    assert not cache.spilled(A, 1, ok=True)
    assert cache.room(Tier.DISK) == 0


def test_a_promoted_block_has_a_new_slot_and_an_old_one_fits_nothing() -> None:
    cache = fresh(20, 20)
    fill(cache, A)
    on_disk(cache, A)
    put(cache, B, size=20)
    assert cache.drops() == [Drop(Tier.RAM, A, 1)]
    first = cache.promote(A, now=0)
    assert first is not None
    slot = first.slot
    assert cache.drops() == [Drop(Tier.RAM, B, 2)]
    assert not cache.promoted(A, slot, ok=False)
    assert cache.promote(A, now=0) is first
    assert first.slot > slot
    assert cache.promoting(A, slot) is None
    assert not cache.promoted(A, slot, ok=True)
    assert cache.promoted(A, first.slot, ok=True)
    assert cache.promote(A, now=0) is None, "it is there"


def test_the_disk_forgets_the_coldest_leaf_and_keeps_whole_prefixes() -> None:
    cache = fresh(40, 20)
    fill(cache, A, B)
    on_disk(cache, A, B)
    put(cache, C)
    on_disk(cache, C)
    assert cache.drops() == [Drop(Tier.DISK, B, 2)]
    assert look(cache, [A, B]).count == 2, "in RAM"
    assert cache.evictions == [0, 1]


def test_what_is_being_read_from_disk_is_not_evicted_there() -> None:
    cache = fresh(20, 10)
    fill(cache, A)
    on_disk(cache, A)
    put(cache, B, size=20)
    assert cache.promote(A, now=0) is not None
    put(cache, C)
    assert cache.spill(C, now=0) is None


def test_a_condemned_block_goes_with_all_below_and_may_be_written_anew() -> None:
    cache = fresh(40, 40)
    fill(cache, A, B, C)
    on_disk(cache, A, B)
    assert cache.condemn(B, 99) == 0, "another generation"
    assert cache.condemn(B, 2) == 2
    assert cache.drops() == [Drop(Tier.RAM, C, 3), Drop(Tier.RAM, B, 2), Drop(Tier.DISK, B, 2)]
    assert look(cache, [A, B]).count == 1
    put(cache, B, A)
    assert cache.condemn(B, 2) == 0


def test_a_condemned_block_stays_in_place_while_a_pin_keeps_it() -> None:
    cache = fresh(20, 0)
    fill(cache, A, B)
    pin = look(cache, [A, B]).pin
    cache.condemn(A, 1)
    assert cache.drops() == []
    assert cache.room(Tier.RAM) == 20
    with pytest.raises(errors.NotPinned):
        cache.read(A, pin, now=0)
    assert reserve(cache, A) == Reserved(Outcome.NO_ROOM)
    cache.expire(5)
    assert sorted(gone(cache)) == [A, B]
    lease(cache, A, now=5)
    cache.check_integrity()


def test_a_restart_restores_what_has_all_its_ancestors() -> None:
    cache = fresh(40, 40)
    entries = [
        Stored(key, parent, 10, b"", SUM, generation) for key, parent, generation in ((B, A, 7), (A, b"", 5), (D, C, 9))
    ]
    assert cache.restore(entries) == [D]
    assert look(cache, [A, B]).count == 2
    assert cache.room(Tier.DISK) == 20
    put(cache, C)
    block = cache.get(C)
    assert block is not None
    assert block.generation == 10, "generations go on"
    assert cache.promote(A, now=0) is not None


def test_a_restart_with_less_room_keeps_what_fits_and_what_names_itself_is_never_reached() -> None:
    cache = fresh(10, 20)
    chain = [Stored(key, parent, 10, b"", SUM, 1) for key, parent in ((A, b""), (B, A), (C, B), (D, D))]
    assert cache.restore(chain) == [C, D]
    cache.check_integrity()


def test_a_block_of_another_kind_than_its_parent_is_not_restored() -> None:
    cache = fresh(10, 20)
    assert cache.restore([Stored(A, b"", 10, b"one", SUM, 1), Stored(B, A, 10, b"other", SUM, 2)]) == [B]


# What goes first


def hot_and_scan(policy: Callable[[], Policy]) -> int:
    """Hits of four prompts that come again and again, between many that come once; room for six."""
    cache = fresh(60, policy=policy)
    hits = 0
    for turn in range(400):
        names = [(b"hot%d" % (turn % 4), 100.0), *((b"once%d" % (3 * turn + n), 10.0) for n in range(3))]
        for name, cost in names:
            key = name.ljust(32, b"_")
            found = look(cache, [key], now=turn, ttl=0.5)
            hits += found.count
            if not found.count:
                put(cache, key, now=turn, cost=cost)
    return hits


def test_eviction_by_cost_keeps_what_is_dear_and_used_through_a_scan_where_recency_does_not() -> None:
    assert hot_and_scan(Recency) == 0
    assert hot_and_scan(Cost) > 380


def test_what_was_dear_once_and_is_not_used_any_more_goes_in_the_end() -> None:
    cache = fresh(20, policy=Cost)
    put(cache, A, cost=1000)
    for number in range(300):
        put(cache, b"%032d" % number, cost=100)
    assert look(cache, [A]).count == 0


def test_a_block_of_unknown_cost_counts_as_much_as_others_whatever_the_unit() -> None:
    for unit in (1e-3, 1.0, 1e6):
        cache = fresh(30, policy=Cost)
        put(cache, A)  # as a restart leaves it
        put(cache, B, cost=unit)
        put(cache, C, cost=unit)
        put(cache, D, cost=unit)
        assert look(cache, [A]).count == 0, "the oldest of equals goes first"
        assert look(cache, [B]).count == 1


# The observer


def test_every_transition_is_told_in_order_with_the_room_after_it() -> None:
    told: list[Transition] = []
    cache = fresh(10, 10, observer=told.append)
    fill(cache, A)
    on_disk(cache, A)
    pin = look(cache, [A]).pin
    cache.read(A, pin, now=0)
    cache.release(pin)
    put(cache, B)
    lost = lease(cache, C)
    cache.release(lost)
    cache.promote(A, now=0)
    cache.condemn(A, 1)
    expected = [
        ("Reserve", A, (10, 0)),
        ("Write", A, (10, 0)),
        ("Seal", A, (10, 0)),
        ("Spill", A, (10, 10)),
        ("Spilled", A, (10, 10)),
        ("Lookup", b"", (10, 10)),
        ("Read", A, (10, 10)),
        ("Release", b"", (10, 10)),
        ("Evict", A, (0, 10)),
        ("Reserve", B, (10, 10)),
        ("Write", B, (10, 10)),
        ("Seal", B, (10, 10)),
        ("Evict", B, (0, 10)),
        ("Reserve", C, (10, 10)),
        ("Release", C, (0, 10)),
        ("Promote", A, (10, 10)),
        ("Condemn", A, (0, 0)),
    ]
    assert [(each.action, each.key, each.room) for each in told] == expected
    assert told[5].keys == (A,)
    assert [(each.gone, each.tier) for each in told if each.action == "Evict"] == [(False, Tier.RAM), (True, Tier.RAM)]
