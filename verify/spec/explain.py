"""A recorded run, put in order and in the words of a specification, for TLC to explain step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from countersign.verify.spec import tlc
from countersign.verify.spec.manifest import specifications
from countersign.verify.spec.values import Value, write


class Illegal(Exception):
    """The run cannot even be put in order; the message names the record, event or step."""


@dataclass(frozen=True, slots=True)
class Line:
    """One step: an element of TraceLog, and how it is told to people."""

    fields: dict[Value, Value]
    told: str


@dataclass(frozen=True, slots=True)
class Trace:
    """``spec`` and ``module`` say what is to explain ``lines``; ``data`` is what else TraceData defines."""

    spec: str
    module: str
    lines: Sequence[Line]
    data: dict[str, Value]
    configuration: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """``explained`` of ``total`` steps are behaviour of the specification; ``first`` tells of the one that is not."""

    accepted: bool
    explained: int
    total: int
    first: str = ""


def explain(trace: Trace, *, seconds: float) -> Verdict:
    """Raises SpecError where TLC could not be run."""
    outcome = tlc.check(
        specifications() / trace.spec / f"{trace.module}.tla",
        trace.configuration,
        beside=[("TraceData.tla", _module(trace))],
        brief=True,
        timeout=seconds,
    )
    total = len(trace.lines)
    explained = max((int(line.strip("<>").split(",")[1]) for line in outcome.printed if "explained" in line), default=0)
    if outcome.code != tlc.PASSED:
        return Verdict(False, explained, total, f"{trace.lines[explained - 1].told} breaks {_property(outcome)}")
    if explained < total:
        return Verdict(False, explained, total, f"nothing explains {trace.lines[explained].told}")
    return Verdict(True, explained, total)


def _module(trace: Trace) -> str:
    data = {"TraceLog": tuple(line.fields for line in trace.lines), **trace.data}
    lines = [f"{name} == {write(value)}" for name, value in data.items()]
    return "\n".join(["---- MODULE TraceData ----", *lines, "===="])


def _property(outcome: tlc.Outcome) -> str:
    return (outcome.violated or "the specification").removeprefix("New")
