"""``CacheRules`` for a store of two tiers."""

from __future__ import annotations

from cache_rules import CacheRules, Path, chain_of, digest_of, which
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from countersign.services.protocol.cache import Stored, Tier


class TieredRules(CacheRules):
    """Two tiers, copies on their way, damage, and restarts."""

    disk = 50

    def __init__(self) -> None:
        super().__init__()
        self.spilling: list[tuple[bytes, int]] = []
        self.promoting: list[tuple[bytes, int]] = []
        self.on_disk: dict[bytes, Stored] = {}
        self.paths: dict[bytes, Path] = {}

    @precondition(lambda self: self.blocks)
    @rule(number=which)
    def spill(self, number: int) -> None:
        key = self.one_of(number)
        block = self.cache.spill(key, now=self.now)
        self.settle()
        if block is not None:
            self.hold("NoTornRead", key in self.blocks and self.blocks[key].sealed)
            self.spilling.append((key, block.generation))
            self.paths[key] = self.blocks[key].path

    @rule(first=st.booleans())
    def spill_all(self, first: bool) -> None:
        """All that can be on disk is there then; unless the first copy fails."""
        for number in range(len(self.blocks)):
            if self.blocks:
                self.spill(number)
        for number in range(len(self.spilling)):
            self.spilled(0, first or number > 0)

    @precondition(lambda self: self.spilling)
    @rule(number=which)
    def overtaken(self, number: int) -> None:
        """While a copy is on its way its block goes, is written anew, and begins another."""
        key, generation = self.spilling[number % len(self.spilling)]
        path = self.paths[key]
        if key in self.blocks and self.blocks[key].generation == generation:
            self.condemn(list(self.blocks).index(key), False)
        self.write(path, "h1", 1)
        for each in chain_of(path):
            if each in self.blocks:
                self.spill(list(self.blocks).index(each))

    def teardown(self) -> None:
        while self.spilling:
            self.spilled(0, False)
        while self.promoting:
            self.promoted(0, False)
        super().teardown()

    def one_of(self, number: int) -> bytes:
        """Parents before children."""
        return list(self.blocks)[number % len(self.blocks)]

    @precondition(lambda self: self.spilling)
    @rule(number=which, ok=st.booleans())
    def spilled(self, number: int, ok: bool) -> None:
        """Begun copies may end in any order; the block may be another by then."""
        key, generation = self.spilling.pop(number % len(self.spilling))
        seen = self.blocks.get(key)
        counts = self.cache.spilled(key, generation, ok=ok)
        self.hold("GenMonotone", not counts or (seen is not None and seen.generation == generation))
        if counts and seen is not None:
            seen.copies.add(Tier.DISK)
            parent = self.blocks[seen.parent] if seen.parent else None
            self.hold("PrefixClosed", parent is None or Tier.DISK in parent.copies)
            self.on_disk[key] = Stored(key, seen.parent, seen.size, b"k" * 32, digest_of(key), generation)
            self.saw("spilled")
        self.settle()

    @rule(number=which, well=st.booleans())
    def promote(self, number: int, well: bool) -> None:
        """Of those that lie on disk only, or any; perhaps it ends well at once."""
        away = [key for key, block in self.blocks.items() if block.copies == {Tier.DISK}] or list(self.blocks)
        if away:
            self.promote_one(away[number % len(away)])
            while well and self.promoting:
                self.promoted(0, True)

    def promote_one(self, key: bytes) -> None:
        block = self.cache.promote(key, now=self.now)
        self.settle()
        if block is not None:
            self.hold("GenMonotone", block.slot > self.last_generation)
            self.last_generation = self.blocks[key].slot = block.slot
            self.promoting.append((block.key, block.slot))

    @precondition(lambda self: self.promoting)
    @rule(number=which, ok=st.booleans())
    def promoted(self, number: int, ok: bool) -> None:
        key, slot = self.promoting.pop(number % len(self.promoting))
        seen = self.blocks.get(key)
        if self.cache.promoted(key, slot, ok=ok):
            self.hold("GenMonotone", seen is not None and ok)
            if seen is not None:
                seen.copies.add(Tier.RAM)
                self.saw("promoted")
        self.settle()

    @precondition(lambda self: self.blocks)
    @rule(number=which, stale=st.booleans())
    def condemn(self, number: int, stale: bool) -> None:
        """All below go too; what is pinned keeps its room."""
        seen = self.blocks[self.one_of(number)]
        doomed = self.below({seen.key})
        count = self.cache.condemn(seen.key, seen.generation - stale)
        self.hold("GenMonotone", not (stale and count))
        if stale:
            return
        self.hold("SameAsModel", count == len(doomed))
        self.hold("PrefixClosed", all(self.cache.get(key) is None for key in doomed))
        self.condemned += [self.blocks[key] for key in doomed if self.blocks[key].pins]
        self.saw("condemned")
        self.settle()
        for key in doomed:
            self.blocks.pop(key, None)

    @rule()
    def restart(self) -> None:
        """RAM, pins and leases are gone; what the disk kept whole comes back."""
        self.cache = self.made()
        whole = {key: block for key, block in self.blocks.items() if Tier.DISK in block.copies}
        lost = self.cache.restore([self.on_disk[key] for key in whole])
        self.hold("PrefixClosed", not lost)
        self.blocks = whole
        self.on_disk = {key: entry for key, entry in self.on_disk.items() if key in whole}
        for block in whole.values():
            block.copies, block.pins = {Tier.DISK}, {}
        self.old_pins += list(self.pins)
        self.pins, self.condemned, self.spilling, self.promoting = {}, [], [], []
        self.last_generation = max((block.generation for block in whole.values()), default=0)
        self.saw("restored" if whole else "started empty")
