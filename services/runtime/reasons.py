"""How an answer's end is named outside the wire: in receipts, spans, metrics."""

from __future__ import annotations

from countersign.v1.sampling_pb2 import FinishReason


def finish_name(reason: FinishReason.ValueType) -> str:
    """FINISH_REASON_STOP is "stop", and so on."""
    return FinishReason.Name(reason).removeprefix("FINISH_REASON_").lower()
