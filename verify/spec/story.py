"""A counterexample as a story: step by step, who did what, and what changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from countersign.verify.spec.tlc import State
from countersign.verify.spec.values import Value, variables, write


def tell(trace: Sequence[State]) -> str:
    """One paragraph a step: its number, its action, and each change on a line."""
    lines: list[str] = []
    before: dict[str, Value] | None = None
    for number, state in enumerate(trace):
        if not state.text:
            lines.append(f"{number:>3}. {state.action}")
            continue
        after = variables(state.text)
        if before is None:
            lines.append("  0. in the beginning there is nothing")
        else:
            lines.append(f"{number:>3}. {state.action}")
            lines += [f"       {change}" for name in after for change in _changes(name, before[name], after[name])]
        before = after
    return "\n".join(lines)


def _changes(where: str, old: Value, new: Value) -> Iterator[str]:
    if old == new:
        return
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        for key in new:
            yield from _changes(f"{where}.{_shown(key)}", old[key], new[key])
    elif isinstance(old, tuple) and isinstance(new, tuple):
        yield from _grown(where, old, new)
    elif isinstance(old, frozenset) and isinstance(new, frozenset):
        yield from (f"{where} gets {_shown(item)}" for item in new - old)
        yield from (f"{where} loses {_shown(item)}" for item in old - new)
    else:
        yield f"{where}: {_shown(old)} -> {_shown(new)}"


def _grown(where: str, old: tuple[Value, ...], new: tuple[Value, ...]) -> Iterator[str]:
    if len(old) == len(new):
        for index, (one, other) in enumerate(zip(old, new, strict=True), 1):
            yield from _changes(f"{where}[{index}]", one, other)
    elif new[: len(old)] == old:
        yield from (f"{where}[{index}] = {_shown(new[index - 1])}" for index in range(len(old) + 1, len(new) + 1))
    else:
        yield f"{where}: {_shown(old)} -> {_shown(new)}"


def _shown(value: Value) -> str:
    # What stands in a set is text already.
    return value if isinstance(value, str) else write(value)
