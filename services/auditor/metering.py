"""What an auditor counts."""

from __future__ import annotations

from collections.abc import Sequence

from countersign.services.auditor.intake import Taken
from countersign.services.runtime.telemetry import metrics
from countersign.services.runtime.telemetry.instruments import Meter
from countersign.verify.verdict import Finding

# Of a level's figures, the mean distance from the reference; its limit is mean_threshold.
_MEANS = {"tokens": "mean_score", "activations": "mean_distance"}


class AuditMeter:
    """An auditor's instruments."""

    def __init__(self, meter: Meter | None = None) -> None:
        self._receipts = metrics.counter(metrics.RECEIPTS_TAKEN, meter)
        self._verdicts = metrics.counter(metrics.VERDICTS, meter)
        self._seconds = metrics.histogram(metrics.AUDIT_DURATION, meter)
        self._delay = metrics.histogram(metrics.AUDIT_DELAY, meter)
        self._used = metrics.histogram(metrics.AUDIT_LIMIT_USED, meter)

    def taken(self, taken: Taken) -> None:
        """A batch of receipts came."""
        counts = {"logged": taken.logged, "known": taken.known, "refused": taken.refused, "later": len(taken.later)}
        for outcome, count in counts.items():
            if count:
                self._receipts.add(count, {metrics.OUTCOME: outcome})

    def audited(self, seconds: float) -> None:
        """An audit is made."""
        self._seconds.record(seconds)

    def decided(self, outcome: str, findings: Sequence[Finding], delay: float) -> None:
        """A verdict is signed, ``delay`` seconds after the receipt."""
        self._verdicts.add(1, {metrics.OUTCOME: outcome})
        self._delay.record(max(0.0, delay))
        for finding in findings:
            mean, limit = finding.figures.get(_MEANS.get(finding.level, "")), finding.figures.get("mean_threshold")
            if mean is not None and limit:
                self._used.record(max(0.0, mean / limit), {metrics.LEVEL: finding.level})
