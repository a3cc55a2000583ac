"""Many readers and writers on one block cache: what can never happen, and that a naive model would answer the same.

The machine (tests/support/cache_rules.py) then runs with one deliberate bug at a time, and the property that must fall
is named.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cache_rules import CacheRules, Violated, reach, run
from tiered_rules import TieredRules

from countersign.services.protocol import keys
from countersign.services.protocol.cache import Block, BlockCache, Copy, Tier
from countersign.services.protocol.cache.blocks import Writing
from countersign.services.protocol.cache.books import Books


def test_no_schedule_of_readers_writers_and_lapses_breaks_a_property() -> None:
    wanted = {"found", "read", "evicted", "a lease lapsed", "a lease is renewed", "a child was first"}
    reach(CacheRules, wanted, examples=250)


def test_no_schedule_of_two_tiers_damage_and_restarts_breaks_a_property() -> None:
    reach(TieredRules, {"spilled", "promoted", "condemned", "restored", "found", "read"}, examples=250)


# Deliberate bugs.


def find_what_is_being_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        BlockCache, "_sealed_prefix", lambda cache, chain: [cache._blocks[key] for key in chain if key in cache._blocks]
    )


def evict_what_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Block, "pinned", lambda *_: False)


def evict_parents_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def oldest(cache: BlockCache, tier: Tier, missing: int, parent: bytes, now: float) -> list[Block]:
        return [block for block in cache.sealed() if block.key != parent][: 1 if missing > 0 else 0]

    monkeypatch.setattr(Books, "_victims", oldest)


def seal_with_bytes_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def generous(writing: Writing, start: int, stop: int) -> None:
        writing.filled = [(0, 10 * -(-stop // 10))]

    monkeypatch.setattr(Writing, "fill", generous)


def seal_over_an_unsealed_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Block, "sealed", property(lambda _: True))


def write_with_a_lapsed_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    writing = BlockCache.writing
    monkeypatch.setattr(BlockCache, "writing", lambda cache, key, lease, now: writing(cache, key, lease, now=-1))


def lease_to_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    again = BlockCache._again

    def generous(cache: BlockCache, block: Block, parent: bytes, size: int, holder: str, expires: float) -> object:
        if block.writing is not None:
            block.writing.holder = holder
        return again(cache, block, parent, size, holder, expires)

    monkeypatch.setattr(BlockCache, "_again", generous)


def forget_the_room_of_what_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    give_up = Books._give_up

    def forgetful(cache: Books, block: Block, tier: Tier) -> None:
        give_up(cache, block, tier)
        cache._room[tier] += cache._rounded(block.size)

    monkeypatch.setattr(Books, "_give_up", forgetful)


def leave_the_tenant_out(monkeypatch: pytest.MonkeyPatch) -> None:
    root_key = keys.root_key
    monkeypatch.setattr(keys, "root_key", lambda weights, cache_format, _: root_key(weights, cache_format, "all"))


def condemn_without_those_below(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockCache, "_and_below", lambda _, block: [block])


def condemn_what_a_pin_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    condemn = BlockCache.condemn

    def hasty(cache: BlockCache, key: bytes, generation: int) -> int:
        for block in cache._blocks.values():
            block.pins = 0
        return condemn(cache, key, generation)

    monkeypatch.setattr(BlockCache, "condemn", hasty)


def take_a_copy_of_an_older_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    spilled = BlockCache.spilled

    def trusting(cache: BlockCache, key: bytes, generation: int, ok: bool) -> bool:
        block = cache._blocks.get(key)
        return spilled(cache, key, block.generation if block is not None else generation, ok=ok)

    monkeypatch.setattr(BlockCache, "spilled", trusting)


def take_a_copy_below_one_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    spilled = BlockCache.spilled

    def trusting(cache: BlockCache, key: bytes, generation: int, ok: bool) -> bool:
        block = cache._blocks.get(key)
        if block is not None and block.above is not None and block.generation == generation:
            block.above.copies[Tier.DISK], held = Copy.WHOLE, block.above.copies[Tier.DISK]
            try:
                return spilled(cache, key, generation, ok=ok)
            finally:
                block.above.copies[Tier.DISK] = held
        return spilled(cache, key, generation, ok=ok)

    monkeypatch.setattr(BlockCache, "spilled", trusting)


def promote_into_the_old_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Books, "_next", lambda _: 1)


ONE_TIER: list[tuple[Callable[[pytest.MonkeyPatch], None], str]] = [
    (find_what_is_being_written, "NoTornRead"),
    (seal_with_bytes_missing, "NoTornRead"),
    (evict_what_is_pinned, "PinnedStays"),
    (evict_parents_first, "PrefixClosed"),
    (seal_over_an_unsealed_parent, "PrefixClosed"),
    (write_with_a_lapsed_lease, "OneWriter"),
    (lease_to_everybody, "OneWriter"),
    (forget_the_room_of_what_goes, "BytesConserved"),
    (leave_the_tenant_out, "TenantsApart"),
]
TWO_TIERS: list[tuple[Callable[[pytest.MonkeyPatch], None], str]] = [
    (condemn_without_those_below, "PrefixClosed"),
    (condemn_what_a_pin_keeps, "PinnedStays"),
    (take_a_copy_of_an_older_generation, "GenMonotone"),
    (take_a_copy_below_one_that_failed, "PrefixClosed"),
    (promote_into_the_old_slot, "GenMonotone"),
]
MUTANTS = [(CacheRules, *row) for row in ONE_TIER] + [(TieredRules, *row) for row in TWO_TIERS]


@pytest.mark.parametrize(("rules", "mutant", "killer"), MUTANTS, ids=lambda value: getattr(value, "__name__", value))
def test_each_deliberate_bug_is_killed_by_the_property_it_should_violate(
    monkeypatch: pytest.MonkeyPatch,
    rules: type[CacheRules],
    mutant: Callable[[pytest.MonkeyPatch], None],
    killer: str,
) -> None:
    mutant(monkeypatch)
    machine = type("Broken", (rules,), {"seen": set(), "properties": (killer,)})
    with pytest.raises(Violated, match=killer):
        run(machine, examples=1000, seeds=range(8))
