"""From a recorded run of a block store to the trace that TraceCache.tla explains, or does not.

TLC gets small numbers: keys, holders, places in RAM and generations are counted as they come. A generation of a new
process is another than the same of the old one, but for the blocks that the disk kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from countersign.services.protocol.cache import Tier, Transition
from countersign.verify.spec.explain import Illegal, Line, Trace
from countersign.verify.spec.steps import CacheRun, Step
from countersign.verify.spec.values import Value

PROPERTIES = ("NoTornRead", "PrefixClosed", "PinnedStays", "OneWriter", "BytesConserved", "IndexSound", "RefExact")
_REPLACED = {
    "Store": "Stores",
    "Key": "Keys",
    "Target": "Targets",
    "Peer": "Peers",
    "Token": "Tokens",
    "Slot": "Slots",
    "Part": "Parts",
    "Root": "Root",
    "Parent": "Parent",
    "Offers": "Offers",
    "Content": "Content",
    "Declared": "Declared",
    "Begins": "Begins",
    "Size": "Size",
    "NextGen": "Gen",
    "Places": "Places",
    "Fresh": "Fresh",
}
_MORE = {
    "Read": ("gen", "tok"),
    "Write": ("gen", "lease", "slot"),
    "Seal": ("gen", "lease"),
    "Spill": ("gen",),
    "Spilled": ("gen", "ok"),
    "Promote": ("gen", "slot"),
    "Promoted": ("slot", "ok"),
    "Condemn": ("gen",),
}
"""What a transition that is about one block tells of it."""


@dataclass(slots=True)
class _Pin:
    token: tuple[int, int]
    expires: float
    keys: frozenset[bytes]


def arrange(run: CacheRun) -> Trace:
    """The trace; it ends with the first step that speaks of what was never there, which no action explains.

    Raises:
        Illegal: the run is empty.
    """
    if not run.steps:
        raise Illegal("the run holds no step")
    arranger = _Arranger(run)
    lines: list[Line] = []
    for number, step in enumerate(run.steps, 1):
        told = _tell(number, step)
        try:
            lines.append(Line(arranger.said(step) | arranger.room(step.told), told))
        except Illegal as error:
            lines.append(Line({"ev": "Nothing"}, f"{told}: {error}"))
            break
    data: dict[str, Value] = {
        "ParentOf": tuple(arranger.parents),
        "OnDisk": tuple(arranger.kept),
        "Holders": max(len(arranger.holders), 1),
        "Lookups": max([1, *arranger.lookups.values()]),
        "Slots": max(len(arranger.slots), 1),
    }
    return Trace("cache", "TraceCache", tuple(lines), data, _configuration(run))


@dataclass(slots=True)
class _Arranger:
    run: CacheRun
    keys: dict[bytes, int] = field(default_factory=lambda: {b"": 0})
    parents: list[Value] = field(default_factory=list)
    kept: list[Value] = field(default_factory=list)
    holders: dict[str, int] = field(default_factory=dict)
    lookups: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    pins: dict[int, _Pin] = field(default_factory=dict)
    leases: dict[int, float] = field(default_factory=dict)
    numbers: dict[int, int] = field(default_factory=dict)
    slots: dict[tuple[int, int], int] = field(default_factory=dict)
    generations: dict[tuple[bytes, int], int] = field(default_factory=dict)
    counted: int = 0
    last: int = 0
    lives: int = 0

    def said(self, step: Step) -> dict[Value, Value]:
        """The line of TraceLog, without the room."""
        told, name = step.told, step.told.action
        whole: dict[str, Callable[[Step], dict[Value, Value]]] = {
            "Restore": self._restored,
            "Lookup": self._looked_up,
            "Reserve": self._reserved,
            "Release": self._ended,
            "Expire": self._ended,
            "Evict": self._evicted,
        }
        if name in whole:
            return whole[name](step)
        if name not in _MORE:
            raise Illegal(f"no store says {name!r}")
        more: dict[str, Callable[[Transition], Value]] = {
            "gen": lambda told: self._known(told.key, told.generation),
            "lease": self._lease,
            "slot": self._slot,
            "tok": lambda told: self._pin(told).token,
            "ok": lambda told: told.ok,
        }
        return {"ev": name, "key": self._key(told.key), **{field_: more[field_](told) for field_ in _MORE[name]}}

    def _ended(self, step: Step) -> dict[Value, Value]:
        """A pin or lease: given back, or over."""
        told, released = step.told, step.told.action == "Release"
        if told.pin:
            pin = self._pin(told)
            return {"ev": told.action, "tok": pin.token, "due": pin.expires <= step.now}
        lease, name = self._lease(told), "GiveUp" if released else "Lapse"
        return {"ev": name, **self._block(told), "lease": lease, "due": self.leases[told.lease] <= step.now}

    def _evicted(self, step: Step) -> dict[Value, Value]:
        told = step.told
        over = frozenset(pin.token for pin in self.pins.values() if told.key in pin.keys and pin.expires <= step.now)
        tier = "disk" if told.tier is Tier.DISK else "ram"
        return {"ev": "Evict", **self._block(told), "tier": tier, "gone": told.gone, "over": over}

    def room(self, told: Transition) -> dict[Value, Value]:
        """Bytes taken in each tier afterwards."""
        return {"ram": told.room[0], "disk": told.room[1]}

    def _restored(self, step: Step) -> dict[Value, Value]:
        first = not self.lives and not self.generations
        self.lives += 1
        self.pins.clear()
        self.leases.clear()
        self.numbers.clear()
        if [one.key for one in step.kept] != list(step.told.keys):
            raise Illegal(f"{step.told.action} does not say what it has restored")
        at: list[Value] = []
        for one in step.kept:
            key = self._key(one.key, one.parent)
            generation = self._generation(one.key, one.generation)
            at.append({"key": key, "gen": generation})
            if first:
                self.kept.append({"key": key, "gen": generation, "size": self._rounded(one.size)})
        self.last = max([0, *step.told.generations])
        # Of what is not on disk the new process knows nothing: it may give the same numbers again.
        known = {(one.key, one.generation) for one in step.kept}
        self.generations = {name: number for name, number in self.generations.items() if name in known}
        return {"ev": "Restore", "at": tuple(at)}

    def _looked_up(self, step: Step) -> dict[Value, Value]:
        told = step.told
        holder = self._holder(told.holder)
        self.lookups[holder] += 1
        token = (holder, self.lookups[holder])
        if told.pin in self.pins or not told.keys:
            raise Illegal(f"pin {told.pin} was given before, or is on nothing")
        self.pins[told.pin] = _Pin(token, told.expires, frozenset(told.keys))
        at: tuple[Value, ...] = tuple(
            {"key": self._key(key), "gen": self._known(key, generation)}
            for key, generation in zip(told.keys, told.generations, strict=True)
        )
        return {"ev": "Lookup", "tok": token, "at": at}

    def _reserved(self, step: Step) -> dict[Value, Value]:
        told = step.told
        key = self._key(told.key, told.parent)
        if (told.key, told.generation) not in self.generations:
            if told.generation <= self.last:
                raise Illegal(f"generation {told.generation} is not a new one: {self.last} was given before")
            self.last = told.generation
        self.leases[told.lease] = told.expires
        self.numbers.setdefault(told.lease, len(self.numbers) + 1)
        return {
            "ev": "Reserve",
            "key": key,
            "gen": self._generation(told.key, told.generation),
            "who": self._holder(told.holder),
            "lease": self.numbers[told.lease],
            "slot": self._slot(told),
            "size": self._rounded(told.size),
        }

    def _lease(self, told: Transition) -> int:
        if told.lease not in self.numbers:
            raise Illegal(f"nobody was given lease {told.lease}")
        return self.numbers[told.lease]

    def _block(self, told: Transition) -> dict[Value, Value]:
        return {"key": self._key(told.key), "gen": self._known(told.key, told.generation)}

    def _pin(self, told: Transition) -> _Pin:
        if told.pin not in self.pins:
            raise Illegal(f"nobody was given pin {told.pin}")
        return self.pins[told.pin]

    def _key(self, key: bytes, parent: bytes | None = None) -> int:
        if key not in self.keys:
            if parent is None or parent not in self.keys:
                raise Illegal(f"block {key.hex()[:12]} was never reserved, or the one before it was not")
            self.keys[key] = len(self.keys)
            self.parents.append(self.keys[parent])
        elif parent is not None and self.parents[self.keys[key] - 1] != self.keys.get(parent):
            raise Illegal(f"block {key.hex()[:12]} stood behind another block before")
        return self.keys[key]

    def _known(self, key: bytes, generation: int) -> int:
        if (key, generation) not in self.generations:
            raise Illegal(f"block {key.hex()[:12]} never had generation {generation}")
        return self.generations[key, generation]

    def _generation(self, key: bytes, generation: int) -> int:
        if (key, generation) not in self.generations:
            self.counted += 1
            self.generations[key, generation] = self.counted
        return self.generations[key, generation]

    def _slot(self, told: Transition) -> int:
        return self.slots.setdefault((self.lives, told.slot), len(self.slots) + 1)

    def _holder(self, name: str) -> int:
        return self.holders.setdefault(name, len(self.holders) + 1)

    def _rounded(self, size: int) -> int:
        return -(-size // self.run.grain) * self.run.grain


def _tell(number: int, step: Step) -> str:
    told = step.told
    what = [f"{told.action} of block {told.key.hex()[:12]}" if told.key else told.action]
    what += [
        f"{name} {getattr(told, name)}" for name in ("generation", "lease", "pin", "holder") if getattr(told, name)
    ]
    return f"step {number} ({', '.join(what)})"


def _configuration(run: CacheRun) -> str:
    lines = [
        "SPECIFICATION TraceSpec",
        "CONSTANTS",
        f"  RamRoom = {run.capacity[0]}",
        f"  DiskRoom = {run.capacity[1]}",
    ]
    lines += [f"  {name} = 1000000000" for name in ("MaxGen", "MaxFlips", "MaxCrashes")]
    lines += [f"  {name} <- Trace{other}" for name, other in _REPLACED.items()]
    lines += ["CONSTRAINT Progress", *(f"INVARIANT {name}" for name in PROPERTIES)]
    return "\n".join(lines) + "\n"
