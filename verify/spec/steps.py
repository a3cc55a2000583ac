"""A recorded run of one block store: each transition of its cache protocol, in order, with the time of its clock.

The file has a JSON object a line: a head, one for each step, and a foot that counts and digests them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from countersign.services.protocol.cache import BlockCache, Tier, Transition

_DEFAULTS = {one.name: one.default for one in fields(Transition) if one.name != "action"}


@dataclass(frozen=True, slots=True)
class Kept:
    """A block that a new process found on disk."""

    key: bytes
    parent: bytes
    size: int
    generation: int


@dataclass(frozen=True, slots=True)
class Step:
    """One transition; ``kept`` are the blocks of a Restore."""

    now: float
    told: Transition
    kept: tuple[Kept, ...] = ()


@dataclass(frozen=True, slots=True)
class CacheRun:
    """The steps of a store of ``capacity`` bytes in RAM and on disk, given out in multiples of ``grain``."""

    capacity: tuple[int, int]
    grain: int
    steps: tuple[Step, ...]

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(slots=True)
class StepRecorder:
    """An observer of a BlockCache, which it is told of when there is one. ``clock`` gives the store's seconds."""

    clock: Callable[[], float]
    cache: BlockCache | None = None
    steps: list[Step] = field(default_factory=list)

    def __call__(self, told: Transition) -> None:
        self.steps.append(Step(self.clock(), told, tuple(self._kept(told.keys)) if told.action == "Restore" else ()))

    def _kept(self, keys: Sequence[bytes]) -> Iterable[Kept]:
        blocks = [self.cache.get(key) for key in keys] if self.cache is not None else []
        return (Kept(block.key, block.parent, block.size, block.generation) for block in blocks if block is not None)


def head_of(run: CacheRun) -> dict[str, Any]:
    """The first line of its file."""
    return {"spec": "cache", "capacity": list(run.capacity), "grain": run.grain}


def step_to_json(step: Step) -> dict[str, Any]:
    """One line; what a transition does not speak of is left out."""
    values = {name: getattr(step.told, name) for name in _DEFAULTS}
    line = {"now": step.now, "action": step.told.action}
    line |= {name: _plain(value) for name, value in values.items() if value != _DEFAULTS[name]}
    if step.kept:
        line["kept"] = [[one.key.hex(), one.parent.hex(), one.size, one.generation] for one in step.kept]
    return line


def step_from_json(line: dict[str, Any]) -> Step:
    """Raises KeyError, TypeError or ValueError where it is no step."""
    values = {name: _typed(name, line[name]) for name in _DEFAULTS if name in line}
    kept = tuple(Kept(bytes.fromhex(key), bytes.fromhex(parent), *more) for key, parent, *more in line.get("kept", ()))
    return Step(float(line["now"]), Transition(line["action"], **values), kept)


def run_from(head: dict[str, Any], steps: Iterable[Step]) -> CacheRun:
    """Raises KeyError, TypeError or ValueError where the head is none."""
    ram, disk = head["capacity"]
    return CacheRun((int(ram), int(disk)), int(head["grain"]), tuple(steps))


def _plain(value: object) -> object:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return value


def _typed(name: str, value: Any) -> Any:
    default = _DEFAULTS[name]
    if name == "tier":
        return Tier(value)
    if name == "keys":
        return tuple(bytes.fromhex(one) for one in value)
    if isinstance(default, bytes):
        return bytes.fromhex(value)
    return tuple(value) if isinstance(default, tuple) else value
