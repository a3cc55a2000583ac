"""What the books of a block store are made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, IntEnum


class Tier(IntEnum):
    """Where a copy of a block lies."""

    RAM = 0
    DISK = 1


class Copy(IntEnum):
    """How far a copy is. ``FILLING``: its room is taken, its bytes are on their way and nobody reads it."""

    ABSENT = 0
    FILLING = 1
    WHOLE = 2


class Outcome(Enum):
    """What became of a wish to write."""

    GRANTED = "granted"
    PRESENT = "present"  # the block is sealed
    BUSY = "busy"  # another writes it
    NO_PARENT = "no parent"  # the block before it is not here, or is being written by another
    FOREIGN = "foreign"  # the block before it is of another model, cache format or size
    NO_ROOM = "no room"


@dataclass(slots=True)
class Writing:
    """One writer may fill the block until ``expires``. ``filled``: the bytes that came, as disjoint [from, to)."""

    lease: int
    holder: str
    expires: float
    filled: list[tuple[int, int]] = field(default_factory=list)

    def fill(self, start: int, stop: int) -> None:
        """Bytes from ``start`` up to ``stop`` came; parts may come in any order, and again."""
        apart = [run for run in self.filled if run[1] < start or run[0] > stop]
        met = [run for run in self.filled if run[1] >= start and run[0] <= stop]
        whole = (min([start, *(run[0] for run in met)]), max([stop, *(run[1] for run in met)]))
        self.filled = sorted([*apart, whole])


@dataclass(eq=False, slots=True)
class Pin:
    """Keeps ``blocks`` for one look-up of ``holder`` while the time is before ``expires``. Who knows it may read."""

    number: int
    holder: str
    expires: float
    blocks: dict[bytes, Block]


@dataclass(eq=False, slots=True)
class Block:
    """A block that is there: being written while ``writing``, else sealed with ``checksum``.

    ``above`` is the block before it, None for the first of a prompt. ``kind`` names the model, format and size that its
    bytes are of. ``generation`` is of this use of the key, ``slot`` of this use of its room in RAM. ``copies`` and
    ``below``, the number of children with a copy, are by tier. ``pins`` counts the pins on it, none of which holds
    after ``pinned_until``. ``cost``, ``rank`` and ``uses`` are for eviction.
    """

    key: bytes
    above: Block | None
    size: int
    kind: bytes
    writing: Writing | None
    generation: int
    slot: int
    cost: float = 0.0
    checksum: bytes = b""
    rank: float = 0.0
    uses: int = 0
    pins: int = 0
    pinned_until: float = 0.0
    copies: list[Copy] = field(default_factory=lambda: [Copy.ABSENT, Copy.ABSENT])
    below: list[int] = field(default_factory=lambda: [0, 0])
    children: set[bytes] = field(default_factory=set)

    @property
    def parent(self) -> bytes:
        """Key of the block before it, empty for the first of a prompt."""
        return self.above.key if self.above is not None else b""

    @property
    def sealed(self) -> bool:
        return self.writing is None

    def pinned(self, now: float) -> bool:
        """A pin may still hold: one that is released early may count until its time was over."""
        return self.pins > 0 and self.pinned_until > now


@dataclass(frozen=True, slots=True)
class Found:
    """The first ``count`` keys of a chain are sealed and pinned; ``pin`` is 0 when none is."""

    count: int
    pin: int


@dataclass(frozen=True, slots=True)
class Reserved:
    """``lease`` is 0 unless the outcome is GRANTED."""

    outcome: Outcome
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Drop:
    """Bytes to be given up: the copy of ``key`` in ``tier``, of this generation (in RAM: of this slot)."""

    tier: Tier
    key: bytes
    generation: int


@dataclass(frozen=True, slots=True)
class Stored:
    """A block that a tier kept over a restart."""

    key: bytes
    parent: bytes
    size: int
    kind: bytes
    checksum: bytes
    generation: int


@dataclass(frozen=True, slots=True)
class Transition:
    """One step of the protocol, as it happened; what a step does not speak of is empty.

    ``action`` is a name of tla/cache: Lookup, Reserve, Write, Seal, Read, Release, Expire, Evict, Spill, Spilled,
    Promote, Promoted, Condemn, Restore. ``keys`` and ``generations``: the blocks that Lookup pinned, root side first,
    and that Restore sealed. Release and Expire end the ``pin``, or the lease on ``key``. ``gone``: with this copy, or
    lease, the block itself went. ``room``: bytes taken in RAM and on disk, afterwards.
    """

    action: str
    key: bytes = b""
    parent: bytes = b""
    generation: int = 0
    slot: int = 0
    size: int = 0
    holder: str = ""
    lease: int = 0
    pin: int = 0
    expires: float = 0.0
    checksum: bytes = b""
    tier: Tier | None = None
    ok: bool = True
    gone: bool = False
    keys: tuple[bytes, ...] = ()
    generations: tuple[int, ...] = ()
    room: tuple[int, int] = (0, 0)
