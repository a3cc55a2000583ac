"""Whether a recorded run is a behaviour of its specification."""

from __future__ import annotations

from countersign.verify.spec import cachetrace, committrace
from countersign.verify.spec.explain import Illegal, Verdict, explain
from countersign.verify.spec.run import Run
from countersign.verify.spec.steps import CacheRun

__all__ = ["Verdict", "replay"]


def replay(run: Run | CacheRun, *, seconds: float = 300) -> Verdict:
    """Have TLC explain the run.

    Raises:
        SpecError: TLC could not be run.
    """
    try:
        trace = cachetrace.arrange(run) if isinstance(run, CacheRun) else committrace.arrange(run)
    except Illegal as error:
        return Verdict(False, 0, len(run), str(error))
    return explain(trace, seconds=seconds)
