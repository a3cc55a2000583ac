from __future__ import annotations

from dataclasses import replace

import pytest

from countersign.services.auditor.tracing import request_traceparent
from countersign.services.runtime.telemetry import tracing
from countersign.verify.receipt import Trace, sign
from countersign.verify.testing import example_receipt, signing_key


def receipt(trace: Trace | None) -> bytes:
    example, openings = example_receipt()
    return sign(replace(example, trace=trace), openings, signing_key())


@pytest.mark.parametrize("sampled", [False, True])
def test_a_receipt_names_the_span_of_its_request(sampled: bool) -> None:
    span = tracing.context_of(request_traceparent(receipt(Trace(bytes(range(16)), bytes(range(8)), sampled=sampled))))
    assert span is not None
    assert span.trace_id.to_bytes(16, "big") == bytes(range(16))
    assert span.span_id.to_bytes(8, "big") == bytes(range(8))
    assert span.trace_flags.sampled is sampled


@pytest.mark.parametrize("data", [b"", b"\xff" * 100])
def test_what_is_no_receipt_names_none(data: bytes) -> None:
    assert request_traceparent(data) == ""


def test_a_receipt_without_a_trace_or_with_an_invalid_one_names_none() -> None:
    assert request_traceparent(receipt(None)) == ""
    assert tracing.context_of(request_traceparent(receipt(Trace(bytes(16), bytes(8), sampled=True)))) is None
