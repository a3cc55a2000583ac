"""The bugs of tla/cache, put into the code: what TLC finds in the model, Hypothesis finds in the machine that runs.

Some stand in test_cache_machine.py already; of those that cannot be put into the books it says where they belong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
from cache_rules import PROPERTIES, CacheRules, Path, paths, reach, run, which
from hypothesis import event
from hypothesis.stateful import precondition, rule
from tests.protocol import test_cache_machine as known
from tiered_rules import TieredRules

from countersign.services.protocol import keys
from countersign.services.protocol.cache import Block, BlockCache, Copy, Stored, Tier
from countersign.services.protocol.cache.blocks import Pin
from countersign.services.protocol.cache.books import Books
from countersign.services.protocol.errors import CacheCorrupt
from countersign.verify.spec.manifest import load

Patch = pytest.MonkeyPatch
BOOKS = "the books' own check"
"""Killer of a bug in what the store counts: `check_integrity`, which runs behind each step."""


class LateRules(CacheRules):
    """A writer that stood still, and gives back a lease on what another writes by now."""

    @rule(path=paths)
    def late(self, path: Path) -> None:
        before = len(self.leases)
        self.reserve(path, "h1", 1, 1, True)
        old = [lease for _, lease in self.leases[before:]]
        self.time_passes(2)
        before = len(self.leases)
        self.reserve(path, "h2", 1, 8, True)
        for lease in old:
            self.release_one(lease)
        self.hold("OneWriter", all(key in self.blocks for key, _ in self.leases[before:]))


class OutlivedRules(TieredRules):
    """Bytes that come back from disk for a block that was dropped and written anew meanwhile."""

    @precondition(lambda self: any(block.copies == {Tier.DISK} for block in self.blocks.values()))
    @rule(number=which)
    def outlived(self, number: int) -> None:
        away = [block for block in self.blocks.values() if block.copies == {Tier.DISK}]
        block, begun = away[number % len(away)], len(self.promoting)
        self.promote_one(block.key)
        if len(self.promoting) > begun:
            self.condemn(list(self.blocks).index(block.key), False)
            self.write(block.path, "h1", 1)
            key, slot = self.promoting.pop()
            self.hold("GenMonotone", not self.cache.promoted(key, slot, ok=True))
            self.settle()


class LossyRules(TieredRules):
    """A disk that forgets a block which it had said to have, as one does that was not synced."""

    @precondition(lambda self: any(Tier.DISK in block.copies for block in self.blocks.values()))
    @rule(number=which)
    def lose(self, number: int) -> None:
        kept = {key: entry for key, entry in self.on_disk.items() if key in self.blocks}
        on_disk = [key for key in kept if Tier.DISK in self.blocks[key].copies]
        lost = on_disk[number % len(on_disk)]
        self.cache = self.made()
        left = [kept[key] for key in on_disk if key != lost]
        refused = self.cache.restore(left)
        sealed = {block.key: block for block in self.cache.sealed()}
        self.hold("PrefixClosed", all(block.above is None or block.parent in sealed for block in sealed.values()))
        self.hold("SameAsModel", set(refused) == self.below({lost}) & {entry.key for entry in left})
        event("a parent was lost" if refused else "a leaf was lost")
        self.seen.add("a parent was lost" if refused else "a leaf was lost")
        # What follows is about a store that is whole: it begins anew.
        self.__init__()  # type: ignore[misc]  # all of its state


# Deliberate bugs.


def pin_nothing(monkeypatch: Patch) -> None:
    lookup = BlockCache.lookup

    def careless(cache: BlockCache, *args: object, **kwargs: object) -> object:
        found = lookup(cache, *args, **kwargs)  # type: ignore[arg-type]  # as it came
        for block in cache._pins[found.pin].blocks.values() if found.pin else ():
            block.pins -= 1
        return found

    monkeypatch.setattr(BlockCache, "lookup", careless)


def release_again(monkeypatch: Patch) -> None:
    """What a release says is taken at its word, however often it comes."""
    release, known = BlockCache.release, dict[int, Pin]()

    def obedient(cache: BlockCache, number: int) -> None:
        if number in cache._pins:
            known[number] = cache._pins[number]
        for block in known[number].blocks.values() if number in known and number not in cache._pins else ():
            block.pins -= 1
        release(cache, number)

    monkeypatch.setattr(BlockCache, "release", obedient)


def release_by_name(monkeypatch: Patch) -> None:
    release = BlockCache.release

    def generous(cache: BlockCache, number: int) -> None:
        mine = cache._pins.get(number)
        others = [pin.number for pin in cache._pins.values() if mine is not None and pin.holder == mine.holder]
        for each in {number, *others}:
            release(cache, each)

    monkeypatch.setattr(BlockCache, "release", generous)


def expire_without_counting(monkeypatch: Patch) -> None:
    expire = BlockCache.expire

    def forgetful(cache: BlockCache, now: float) -> None:
        cache._pins = {number: pin for number, pin in cache._pins.items() if pin.expires > now}
        expire(cache, now)

    monkeypatch.setattr(BlockCache, "expire", forgetful)


def write_by_any_lease(monkeypatch: Patch) -> None:
    writing = BlockCache.writing

    def trusting(cache: BlockCache, key: bytes, lease: int, *, now: float) -> Block:
        block = cache._blocks.get(key)
        current = block.writing.lease if block is not None and block.writing is not None else lease
        return writing(cache, key, current, now=now)

    monkeypatch.setattr(BlockCache, "writing", trusting)


def give_up_anothers_lease(monkeypatch: Patch) -> None:
    release, reserve, known = BlockCache.release, BlockCache.reserve, dict[int, bytes]()

    def noting(cache: BlockCache, key: bytes, *args: object, **kwargs: object) -> object:
        reserved = reserve(cache, key, *args, **kwargs)  # type: ignore[arg-type]  # as it came
        known[reserved.lease] = key
        return reserved

    def by_key(cache: BlockCache, number: int) -> None:
        block = cache._blocks.get(known.get(number, b""))
        release(cache, block.writing.lease if block is not None and block.writing is not None else number)

    monkeypatch.setattr(BlockCache, "reserve", noting)
    monkeypatch.setattr(BlockCache, "release", by_key)


def leave_what_is_below(monkeypatch: Patch) -> None:
    monkeypatch.setattr(BlockCache, "_and_below", lambda _, block: [block])


def never_lapse(monkeypatch: Patch) -> None:
    monkeypatch.setattr(BlockCache, "_lapse_leases", lambda *_: None)


def leave_the_parent_out(monkeypatch: Patch) -> None:
    def flat(root: bytes, token_ids: Iterable[int]) -> list[bytes]:
        count = keys.BLOCK_TOKENS
        ids = list(token_ids)
        return [honest(root, ids[at : at + count])[0] for at in range(0, len(ids), count)]

    honest = keys.chain_keys
    monkeypatch.setattr(keys, "chain_keys", flat)


def evict_and_still_find(monkeypatch: Patch) -> None:
    def half(books: Books, block: Block, tier: Tier) -> None:
        books._give_up(block, tier)

    monkeypatch.setattr(Books, "_evict", half)


def count_on_a_copy_under_way(monkeypatch: Patch) -> None:
    may_go = Books._may_go

    def hopeful(block: Block, tier: Tier, copies_gone: int = 0, children_gone: int = 0) -> bool:
        under_way = tier is Tier.RAM and block.copies == [Copy.WHOLE, Copy.FILLING] and block.below[tier] <= copies_gone
        return (block.sealed and under_way) or may_go(block, tier, copies_gone, children_gone)

    monkeypatch.setattr(Books, "_may_go", staticmethod(hopeful))
    monkeypatch.setattr(Books, "_is_last", staticmethod(lambda block: block.copies.count(Copy.ABSENT) == 1))


def let_late_bytes_land(monkeypatch: Patch) -> None:
    def trusting(cache: BlockCache, key: bytes, _: int) -> Block | None:
        block = cache._blocks.get(key)
        return block if block is not None and block.sealed else None

    monkeypatch.setattr(BlockCache, "promoting", trusting)


def keep_the_room_of_what_failed(monkeypatch: Patch) -> None:
    give_up = BlockCache._arrived

    def forgetful(cache: BlockCache, block: Block, tier: Tier, *, ok: bool) -> None:
        give_up(cache, block, tier, ok=ok)
        cache._room[tier] += 0 if ok else cache._rounded(block.size)

    monkeypatch.setattr(BlockCache, "_arrived", forgetful)


def restore_orphans(monkeypatch: Patch) -> None:
    restore = BlockCache.restore

    def trusting(cache: BlockCache, entries: Iterable[Stored]) -> list[bytes]:
        known = list(entries)
        names = {entry.key for entry in known} | {b""}
        orphans = [entry for entry in known if entry.parent not in names]
        restore(cache, [entry for entry in known if entry not in orphans])
        for one in orphans:
            block = Block(one.key, None, one.size, one.kind, None, one.generation, 0, checksum=one.checksum)
            cache._add(block, Tier.DISK)
            block.copies[Tier.DISK] = Copy.WHOLE
        return []

    monkeypatch.setattr(BlockCache, "restore", trusting)


def count_anew(monkeypatch: Patch) -> None:
    restore = BlockCache.restore

    def forgetful(cache: BlockCache, entries: Iterable[Stored]) -> list[bytes]:
        lost = restore(cache, entries)
        cache._generation = 0
        return lost

    monkeypatch.setattr(BlockCache, "restore", forgetful)


def keep_the_condemned(monkeypatch: Patch) -> None:
    def forgetful(cache: BlockCache, pin: Pin, action: str) -> None:
        del cache._pins[pin.number]
        for block in pin.blocks.values():
            block.pins -= 1

    monkeypatch.setattr(BlockCache, "_unpin", forgetful)


Bug = tuple[type[CacheRules], Callable[[Patch], None], str]

CODE: dict[str, Bug] = {
    "pins_nothing": (CacheRules, pin_nothing, "PinnedStays"),
    "released_twice": (CacheRules, release_again, "PinnedStays"),
    "released_by_name": (CacheRules, release_by_name, "PinnedStays"),
    "expiry_forgets_the_count": (CacheRules, expire_without_counting, BOOKS),
    "old_lease_seals": (CacheRules, write_by_any_lease, "OneWriter"),
    "gives_up_anothers_lease": (LateRules, give_up_anothers_lease, "OneWriter"),
    "lapse_leaves_children": (CacheRules, leave_what_is_below, "SameAsModel"),
    "lapses_never": (CacheRules, never_lapse, "SameAsModel"),
    "key_without_parent": (CacheRules, leave_the_parent_out, "TenantsApart"),
    "evicted_and_still_found": (CacheRules, evict_and_still_find, "SameAsModel"),
    "evicts_on_the_way_to_disk": (TieredRules, count_on_a_copy_under_way, BOOKS),
    "late_promotion_lands": (OutlivedRules, let_late_bytes_land, "GenMonotone"),
    "failed_spill_keeps_its_room": (TieredRules, keep_the_room_of_what_failed, BOOKS),
    "restores_orphans": (LossyRules, restore_orphans, "SameAsModel"),
    "restart_counts_anew": (TieredRules, count_anew, "GenMonotone"),
    "condemned_for_ever": (TieredRules, keep_the_condemned, BOOKS),
}
ELSEWHERE: dict[str, Callable[[Patch], None]] = {
    "finds_what_is_written": known.find_what_is_being_written,
    "leases_to_all": known.lease_to_everybody,
    "seals_below_unsealed": known.seal_over_an_unsealed_parent,
    "seals_early": known.seal_with_bytes_missing,
    "key_without_tenant": known.leave_the_tenant_out,
    "evicts_what_is_pinned": known.evict_what_is_pinned,
    "evicts_parents_first": known.evict_parents_first,
    "room_never_comes_back": known.forget_the_room_of_what_goes,
    "old_spill_is_entered": known.take_a_copy_of_an_older_generation,
    "condemns_without_children": known.condemn_without_those_below,
    "condemned_under_a_pin": known.condemn_what_a_pin_keeps,
}
OUTSIDE = {
    "reader_trusts_its_pin": "a reader's: it has the bytes, the books have none",
    "seals_unchecked": "the store's: it compares the bytes before it seals",
    "late_writer_maps_the_arena": "no writer can map the arena",
    "stores_what_is_sampled": "the target's",
    "keeps_what_was_rejected": "the target's",
    "drops_the_deepest_only": "the target's",
    "promotes_unchecked": "the mover's: it compares the bytes that it reads",
    "late_spill_never_ends": "the mover's: it says how each copy ended",
    "transferred_unchecked": "the peers'",
    "transfer_sums_itself": "the peers'",
    "transfer_shown_early": "the peers'",
    "peer_waits_for_ever": "the peers'",
}


def test_each_bug_of_the_specification_is_here_or_it_is_said_why_not() -> None:
    assert {mutant.name for mutant in load("cache").mutants} == {*CODE, *ELSEWHERE, *OUTSIDE}
    tested = {mutant for _, mutant, _ in known.MUTANTS}
    assert set(ELSEWHERE.values()) <= tested


def test_a_disk_that_lost_a_block_brings_back_nothing_below_it() -> None:
    reach(LossyRules, {"a parent was lost"}, examples=100)


@pytest.mark.parametrize("name", CODE)
def test_each_bug_is_found_within_a_thousand_examples(monkeypatch: Patch, name: str) -> None:
    rules, bug, killer = CODE[name]
    bug(monkeypatch)
    machine = type("Broken", (rules,), {"seen": set(), "properties": PROPERTIES if killer == BOOKS else (killer,)})
    with pytest.raises(AssertionError if killer != BOOKS else (AssertionError, CacheCorrupt)) as found:
        run(machine, examples=1000, seeds=range(8))
    assert killer == BOOKS or str(found.value) == killer
