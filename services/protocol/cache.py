"""Who may read, write and drop which KV block: the books of a block store, without the bytes.

A block is absent, then ``Writing`` (one writer holds a lease on its room), then ``Sealed`` (its bytes are there, whole,
with their checksum), then absent again. A pin keeps a sealed block for one holder until a time. DESIGN.md section 7.

    NoTornRead       only sealed blocks are found and read
    PrefixClosed     a sealed block's ancestors are all sealed; a block being written has a parent that is there
    PinnedStays      a pinned block is not dropped before the pin is released or lapses
    OneWriter        one lease at a time on a block, none on a sealed one; a lapsed lease seals nothing
    BytesConserved   room taken = bytes of all blocks that are there, never more than the capacity
    TenantsApart     by the keys (keys.py): another tenant's root gives other keys

NoSpeculativeSealed, that only committed tokens are put, is the writer's part: a store cannot tell.

Times are seconds on any one clock that does not go back, and come in as arguments. A lease or pin taken at ``now`` for
``ttl`` holds while the time is before ``now + ttl``. Methods that drop blocks return their keys: drop their bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from countersign.services.protocol.errors import CacheCorrupt, CacheError, NotPinned


@dataclass(frozen=True, slots=True)
class Writing:
    """One writer may fill the block until ``expires``."""

    lease: int
    holder: str
    expires: float


@dataclass(frozen=True, slots=True)
class Sealed:
    """The block's bytes are there; SHA-256 ``checksum``."""

    checksum: bytes


@dataclass(slots=True)
class Block:
    """A block that is there. ``parent`` is empty for the first of a prompt; ``pins`` maps holders to expiry."""

    key: bytes
    parent: bytes
    size: int
    state: Writing | Sealed
    used: int = 0
    children: set[bytes] = field(default_factory=set)
    pins: dict[str, float] = field(default_factory=dict)

    def pinned(self, now: float) -> bool:
        """Some pin has not lapsed."""
        return any(expires > now for expires in self.pins.values())


@dataclass(frozen=True, slots=True)
class Reserved:
    """``lease`` 0: the block exists, is being written by another, has no parent here, or finds no room."""

    lease: int
    dropped: tuple[bytes, ...] = ()


class BlockCache:
    """The books of one store of at most ``capacity`` bytes."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.evictions = 0
        self._blocks: dict[bytes, Block] = {}
        self._leases: dict[int, bytes] = {}
        self._holders: dict[str, set[bytes]] = {}
        self._bytes = 0
        self._last_lease = 0
        self._last_use = 0
        # (last use, key) of sealed blocks without a child, and of blocks that were that once: checked when popped.
        self._leaves: list[tuple[int, bytes]] = []
        # No lease lapses before this time.
        self._quiet_until = math.inf

    @property
    def used_bytes(self) -> int:
        """Room taken by all blocks that are there, sealed or being written."""
        return self._bytes

    def sealed(self) -> Iterator[Block]:
        """All sealed blocks."""
        return (block for block in self._blocks.values() if isinstance(block.state, Sealed))

    # Reading

    def lookup(self, keys: Sequence[bytes], holder: str, *, now: float, ttl: float) -> int:
        """Pins the longest sealed prefix of a chain of keys, root side first, for ``holder``; its length.

        A holder is one reader, not one process: its pins are not counted, so one release ends each. A pin is never cut
        short by a later look-up.
        """
        chain = self._sealed_prefix(keys)
        for block in reversed(chain):
            block.pins[holder] = max(now + ttl, block.pins.get(holder, now))
            self._holders.setdefault(holder, set()).add(block.key)
            self._touch(block)
        return len(chain)

    def checksum(self, key: bytes, holder: str, *, now: float) -> bytes:
        """The checksum of a sealed block that ``holder`` has pinned: it may be read.

        Raises:
            NotPinned: the holder never pinned it, gave the pin back or let it lapse.
        """
        block = self._blocks.get(key)
        if block is None or not isinstance(block.state, Sealed) or block.pins.get(holder, now) <= now:
            raise NotPinned("the holder has no pin on this block", key=key, holder=holder)
        return block.state.checksum

    def _sealed_prefix(self, keys: Sequence[bytes]) -> list[Block]:
        chain: list[Block] = []
        parent = b""
        for key in keys:
            block = self._blocks.get(key)
            if block is None or block.parent != parent or not isinstance(block.state, Sealed):
                break
            chain.append(block)
            parent = key
        return chain

    # Writing

    def reserve(self, key: bytes, parent: bytes, size: int, holder: str, *, now: float, ttl: float) -> Reserved:
        """A lease on an absent block, whose parent is sealed, is being written by the same holder, or is empty.

        Takes ``size`` bytes of room and evicts for it: sealed blocks without pin or child, the least recently used
        first; none when that would not be enough. A holder that asks again for what it is writing gets its lease again,
        renewed.

        Raises:
            CacheError: ``size`` is not positive.
        """
        if size <= 0:
            raise CacheError("a block has at least one byte", key=key, size=size)
        dropped = self._lapse_leases(now)
        block = self._blocks.get(key)
        if block is not None:
            return Reserved(self._renew(block, parent, size, holder, now + ttl), dropped)
        if not self._may_follow(parent, holder):
            return Reserved(0, dropped)
        victims = self._victims(self._bytes + size - self.capacity, parent, now)
        if victims is None:
            return Reserved(0, dropped)
        for victim in victims:
            self._remove(victim)
        self.evictions += len(victims)
        lease = self._lease(Block(key, parent, size, Writing(self._last_lease + 1, holder, now + ttl)))
        return Reserved(lease, dropped + tuple(victim.key for victim in victims))

    def reserved(self, key: bytes, lease: int, *, now: float) -> int | None:
        """The room in bytes that the lease gives for this block; None when it does not hold."""
        block = self._leased(key, lease, now)
        return None if block is None else block.size

    def seal(self, key: bytes, lease: int, checksum: bytes, *, now: float) -> bool:
        """The block's bytes are there. False, and nothing changes: the lease lapsed, or the parent is not sealed."""
        block = self._leased(key, lease, now)
        if block is None or not self._parent_sealed(block):
            return False
        del self._leases[lease]
        block.state = Sealed(checksum)
        self._touch(block)
        return True

    def _leased(self, key: bytes, lease: int, now: float) -> Block | None:
        block = self._blocks.get(key)
        if block is None or not isinstance(block.state, Writing):
            return None
        return block if block.state.lease == lease and block.state.expires > now else None

    def _renew(self, block: Block, parent: bytes, size: int, holder: str, expires: float) -> int:
        state = block.state
        if isinstance(state, Sealed) or (state.holder, block.parent, block.size) != (holder, parent, size):
            return 0
        block.state = Writing(state.lease, holder, max(expires, state.expires))
        return state.lease

    def _may_follow(self, parent: bytes, holder: str) -> bool:
        above = self._blocks.get(parent)
        if above is None:
            return not parent
        return isinstance(above.state, Sealed) or above.state.holder == holder

    def _parent_sealed(self, block: Block) -> bool:
        return not block.parent or isinstance(self._blocks[block.parent].state, Sealed)

    def _lease(self, block: Block) -> int:
        if not isinstance(block.state, Writing):
            raise CacheError("only a block that is being written has a lease", key=block.key)
        self._last_lease = block.state.lease
        self._leases[block.state.lease] = block.key
        self._quiet_until = min(self._quiet_until, block.state.expires)
        self._blocks[block.key] = block
        self._bytes += block.size
        if block.parent:
            self._blocks[block.parent].children.add(block.key)
        return block.state.lease

    # Giving back

    def release(self, holder: str, keys: Iterable[bytes] = ()) -> tuple[bytes, ...]:
        """Ends the holder's pins and leases on ``keys``, or all of them; the blocks dropped, all unsealed."""
        chosen = set(keys)
        for key in (chosen or self._holders.get(holder, set())) & self._holders.get(holder, set()):
            self._unpin(self._blocks[key], holder)
        dropped: tuple[bytes, ...] = ()
        for lease, key in list(self._leases.items()):
            if lease in self._leases and self._holder_of(key) == holder and (not chosen or key in chosen):
                dropped += self._abandon(key)
        return dropped

    def expire(self, now: float) -> tuple[bytes, ...]:
        """Ends all pins and leases whose time is over; the blocks dropped, all unsealed."""
        for holder, keys in list(self._holders.items()):
            for key in list(keys):
                if self._blocks[key].pins[holder] <= now:
                    self._unpin(self._blocks[key], holder)
        return self._lapse_leases(now)

    def _holder_of(self, key: bytes) -> str | None:
        state = self._blocks[key].state
        return state.holder if isinstance(state, Writing) else None

    def _unpin(self, block: Block, holder: str) -> None:
        del block.pins[holder]
        self._holders[holder].discard(block.key)
        if not self._holders[holder]:
            del self._holders[holder]

    def _lapse_leases(self, now: float) -> tuple[bytes, ...]:
        if now < self._quiet_until:
            return ()
        dropped: tuple[bytes, ...] = ()
        for key in [key for key in self._leases.values() if self._lapses(key) <= now]:
            if key in self._blocks:
                dropped += self._abandon(key)
        self._quiet_until = min((self._lapses(key) for key in self._leases.values()), default=math.inf)
        return dropped

    def _lapses(self, key: bytes) -> float:
        state = self._blocks[key].state
        return state.expires if isinstance(state, Writing) else math.inf

    def _abandon(self, key: bytes) -> tuple[bytes, ...]:
        """Drops a block that is being written and all below it, which cannot be sealed any more."""
        doomed = [self._blocks[key]]
        for block in doomed:
            doomed.extend(self._blocks[child] for child in block.children)
        for block in reversed(doomed):
            self._remove(block)
        return tuple(block.key for block in doomed)

    # Eviction

    def _touch(self, block: Block) -> None:
        self._last_use += 1
        block.used = self._last_use
        self._offer(block)

    def _offer(self, block: Block) -> None:
        """Notes a block as one to evict, if it is a leaf."""
        if block.children or not isinstance(block.state, Sealed):
            return
        heappush(self._leaves, (block.used, block.key))
        if len(self._leaves) > 4 * len(self._blocks) + 64:
            self._leaves = [(leaf.used, leaf.key) for leaf in self.sealed() if not leaf.children]
            heapify(self._leaves)

    def _victims(self, missing: int, parent: bytes, now: float) -> list[Block] | None:
        """Blocks of at least ``missing`` bytes, in the order to evict them; None when there are too few.

        ``parent`` stays: it is about to get a child. The blocks stay too, until the caller removes them.
        """
        victims: list[Block] = []
        gone: set[bytes] = set()
        popped: list[tuple[int, bytes]] = []
        while missing > 0 and self._leaves:
            entry = heappop(self._leaves)
            block = self._leaf(entry, gone)
            if block is None:
                continue
            popped.append(entry)
            if block.key == parent or block.pinned(now):
                continue
            victims.append(block)
            gone.add(block.key)
            missing -= block.size
            above = self._blocks.get(block.parent)
            if above is not None and above.children <= gone:
                heappush(self._leaves, (above.used, above.key))
        for entry in popped:
            heappush(self._leaves, entry)
        return victims if missing <= 0 else None

    def _leaf(self, entry: tuple[int, bytes], gone: set[bytes]) -> Block | None:
        """The block of an entry that still holds, taking those ``gone`` as gone."""
        used, key = entry
        block = self._blocks.get(key)
        if block is None or key in gone or block.used != used or not block.children <= gone:
            return None
        return block if isinstance(block.state, Sealed) else None

    def _remove(self, block: Block) -> None:
        del self._blocks[block.key]
        self._bytes -= block.size
        if isinstance(block.state, Writing):
            del self._leases[block.state.lease]
        for holder in list(block.pins):
            self._unpin(block, holder)
        above = self._blocks.get(block.parent)
        if above is not None:
            above.children.discard(block.key)
            self._offer(above)

    # Books

    def check_integrity(self) -> None:
        """Counts everything again.

        Raises:
            CacheCorrupt: the books do not agree, which is a bug here.
        """
        if self._bytes != sum(block.size for block in self._blocks.values()) or self._bytes > self.capacity:
            raise CacheCorrupt("bytes are not conserved", bytes=self._bytes, capacity=self.capacity)
        leaves = set(self._leaves)
        for block in self._blocks.values():
            self._check_block(block, leaves)
        for holder, keys in self._holders.items():
            if not keys or any(holder not in self._blocks[key].pins for key in keys):
                raise CacheCorrupt("the index of pins is wrong", holder=holder)
        if len(self._leases) != sum(isinstance(block.state, Writing) for block in self._blocks.values()):
            raise CacheCorrupt("the index of leases is wrong", leases=len(self._leases))

    def _check_block(self, block: Block, leaves: set[tuple[int, bytes]]) -> None:
        above = self._blocks.get(block.parent)
        if block.parent and (above is None or block.key not in above.children):
            raise CacheCorrupt("a block without its parent", key=block.key, parent=block.parent)
        if isinstance(block.state, Writing):
            if self._leases.get(block.state.lease) != block.key or block.pins:
                raise CacheCorrupt("a block being written has one lease and no pin", key=block.key)
            return
        if above is not None and not isinstance(above.state, Sealed):
            raise CacheCorrupt("a sealed block below one that is not", key=block.key, parent=block.parent)
        if any(self._blocks[child].parent != block.key for child in block.children):
            raise CacheCorrupt("a child that names another parent", key=block.key)
        if not block.children and (block.used, block.key) not in leaves:
            raise CacheCorrupt("a leaf that could never be evicted", key=block.key)
        if any(block.key not in self._holders.get(holder, ()) for holder in block.pins):
            raise CacheCorrupt("a pin that its holder could not give back", key=block.key)
