"""All checks of a specification: that it holds, that its models reach something, and that its properties can fall."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from countersign.verify.spec import tlc
from countersign.verify.spec.errors import SpecError
from countersign.verify.spec.manifest import SECTIONS, Configuration, Manifest, Mutant
from countersign.verify.spec.story import tell

AT_ONCE = 2
"""TLC processes side by side, of one thread each, so that depths come out the same."""

FEW, MANY = 20_000, 100_000
"""Models of fewer states are gone through in brief runs; those where one state is looked for, of so many more."""

Run = Callable[[tlc.Progress | None], tlc.Outcome]


@dataclass(frozen=True, slots=True)
class Check:
    """One run of TLC. ``expected``: "pass", or the property that must fall.

    ``weight``: states that it has about, for the order of the runs and the progress.
    """

    kind: str
    name: str
    expected: str
    run: Run
    weight: int
    states: int = 0
    depth: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a check; ``why`` says what is wrong, and is empty where nothing is."""

    check: Check
    got: str
    states: int
    depth: int
    seconds: float
    why: str

    @property
    def ok(self) -> bool:
        return not self.why


def checks(manifest: Manifest, *, quick: bool) -> list[Check]:
    """All checks of the manifest, or the quick ones."""
    found: list[Check] = []
    for one in manifest.configurations:
        if quick and not one.quick:
            continue
        found.append(Check("configuration", one.name, "pass", _whole(one), max(one.states, 1), one.states, one.depth))
        found += [Check("witness", one.name, name, _single(one, name), one.states // 2) for name in one.witnesses]
        found += [
            Check("witness", one.name, name, _single(one, name, SECTIONS[1]), one.states // 2) for name in one.fair
        ]
    for mutant in manifest.mutants:
        if quick and not mutant.quick:
            continue
        weight = mutant.base.states // 2
        found += [Check("mutant", mutant.name, name, _mutated(mutant, name), weight) for name in mutant.killers]
    if not quick:
        found += [Check("equivalent", one.name, "pass", _mutated(one), one.base.states) for one in manifest.equivalents]
    return found


def perform(todo: Sequence[Check], progress: Callable[[int, int], None] | None = None) -> list[Result]:
    """Run them, the longest first, and judge. ``progress`` is told the checks done and the states seen so far."""
    queue = [(-check.weight, index, check) for index, check in enumerate(todo)]
    heapq.heapify(queue)
    results: dict[int, Result] = {}
    seen: dict[int, int] = {}
    lock = threading.Lock()

    def report(index: int, states: int) -> None:
        with lock:
            seen[index] = states
            if progress is not None:
                progress(len(results), sum(seen.values()))

    def work() -> None:
        while True:
            with lock:
                if not queue:
                    return
                _, index, check = heapq.heappop(queue)
            result = judge(check, lambda states, index=index: report(index, states))  # type: ignore[misc]  # a default binds it
            with lock:
                results[index] = result
            report(index, result.states)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for future in [pool.submit(work) for _ in range(AT_ONCE)]:
            future.result()
    return [results[index] for index in range(len(todo))]


def judge(check: Check, progress: tlc.Progress | None = None) -> Result:
    """Run one check and compare with what is expected of it."""
    try:
        outcome = check.run(progress)
    except SpecError as error:
        return Result(check, "error", 0, 0, 0.0, str(error))
    got = "pass" if outcome.code == tlc.PASSED else outcome.violated or "?"
    why = ""
    # TLC does not say which property over behaviours fell; in a run of one it is that one.
    fell = got in {check.expected, "temporal properties"} and got != "pass"
    if check.expected == "pass" and got != "pass":
        why = f"{got} is violated:\n{tell(outcome.trace)}"
    elif check.expected != "pass" and not fell:
        why = f"{check.expected} should be violated, and is not: got {got}"
    elif check.states and outcome.states != check.states:
        why = f"{outcome.states} distinct states, and {check.states} are written in the manifest"
    elif check.depth and outcome.depth != check.depth:
        why = f"depth {outcome.depth}, and {check.depth} is written in the manifest"
    return Result(check, check.expected if fell else got, outcome.states, outcome.depth, outcome.seconds, why)


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """What ``countersign spec check --json`` prints (DESIGN.md section 12)."""
    return {
        "configs": [
            {
                "name": result.check.name,
                "kind": result.check.kind,
                "expected": result.check.expected,
                "got": result.got,
                "ok": result.ok,
                "states": result.states,
                "depth": result.depth,
                "seconds": round(result.seconds, 1),
            }
            for result in results
            if result.check.kind != "mutant"
        ],
        "mutants": [
            {
                "name": result.check.name,
                "killer": result.check.expected,
                "killed": result.ok,
                "states": result.states,
                "seconds": round(result.seconds, 1),
            }
            for result in results
            if result.check.kind == "mutant"
        ],
        "states": sum(result.states for result in results if result.check.kind == "configuration"),
        "ok": all(result.ok for result in results),
    }


def _whole(one: Configuration) -> Run:
    brief = one.states < FEW and one.simulate is None
    return lambda progress: tlc.check(one.module, one.cfg.text(), simulate=one.simulate, brief=brief, progress=progress)


def _single(one: Configuration, name: str, kind: str = SECTIONS[0]) -> Run:
    text = one.cfg.text((name,), default=kind)
    # Whether a behaviour is fair is known when all states are.
    brief = one.states < (MANY if kind == SECTIONS[0] else FEW) and one.simulate is None
    return lambda progress: tlc.check(one.module, text, simulate=one.simulate, brief=brief, progress=progress)


def _mutated(mutant: Mutant, *names: str) -> Run:
    text = mutant.base.cfg.text(names or None, mutant.replace)
    brief = mutant.base.states < MANY
    return lambda progress: tlc.check(mutant.module, text, brief=brief, progress=progress)
