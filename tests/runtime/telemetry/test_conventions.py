"""What the conventions for generative AI ask of an inference span (semantic-conventions-genai, in development)."""

from __future__ import annotations

from contextlib import suppress

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import error_attributes, gen_ai_attributes, server_attributes

from countersign.services.runtime.errors import NotFound
from countersign.services.runtime.telemetry import attributes as names
from countersign.services.runtime.telemetry import tracing
from countersign.services.runtime.telemetry.generation import GenerationSpan
from countersign.v1.router_pb2 import Accepted, Finished, GenerateRequest, StreamEvent, Token, Tokens
from countersign.v1.sampling_pb2 import FinishReason, SamplingParams, Usage

REQUIRED = {"gen_ai.operation.name", "gen_ai.provider.name"}
# Where they are known: the model that was asked for, the seed, the kind of output; the port where the address is told.
CONDITIONAL = {"gen_ai.request.model", "gen_ai.request.seed", "gen_ai.output.type"}
RECOMMENDED = {
    "gen_ai.request.max_tokens",
    "gen_ai.request.temperature",
    "gen_ai.request.top_k",
    "gen_ai.request.top_p",
    "gen_ai.response.finish_reasons",
    "gen_ai.response.id",
    "gen_ai.response.model",
    "gen_ai.usage.input_tokens",
    "gen_ai.usage.output_tokens",
}
SECRET = "nobody may read this"


def generated(*, content: bool = False, fails: bool = False) -> ReadableSpan:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    request = GenerateRequest(
        text=SECRET, model="m", sampling=SamplingParams(max_tokens=9, temperature=0.5, seed=7, stop=[SECRET])
    )
    span = provider.get_tracer("test").start_span("call")
    generation = GenerationSpan(span, request, content=content)
    with suppress(NotFound), tracing.Ended(span):
        try:
            generation.sees(StreamEvent(accepted=Accepted(request_id="r", model="m", prompt_tokens=3)))
            generation.sees(StreamEvent(tokens=Tokens(tokens=[Token(id=1, text=SECRET)])))
            if fails:
                raise NotFound(SECRET, reason="GONE")
            finished = Finished(reason=FinishReason.FINISH_REASON_STOP, usage=Usage(prompt_tokens=3, output_tokens=1))
            generation.sees(StreamEvent(finished=finished))
        finally:
            generation.close()
    (out,) = exporter.get_finished_spans()
    return out


def test_a_generation_has_all_that_is_required_and_recommended() -> None:
    span = generated()
    assert span.name == "text_completion m"
    assert set(span.attributes or {}) >= REQUIRED | CONDITIONAL | RECOMMENDED
    assert (span.attributes or {})[
        "gen_ai.operation.name"
    ] == gen_ai_attributes.GenAiOperationNameValues.TEXT_COMPLETION.value
    assert (span.attributes or {})["gen_ai.response.finish_reasons"] == ("stop",)


def test_an_error_has_its_type() -> None:
    assert (generated(fails=True).attributes or {})[error_attributes.ERROR_TYPE] == "GONE"


@pytest.mark.parametrize("fails", [False, True])
def test_what_was_asked_and_answered_is_told_only_where_that_is_switched_on(fails: bool) -> None:
    assert SECRET not in generated(fails=fails).to_json()
    told = generated(content=True).attributes or {}
    assert SECRET in str(told[names.INPUT_MESSAGES])
    assert SECRET in str(told[names.OUTPUT_MESSAGES])


def test_each_name_is_one_of_the_conventions_or_ours() -> None:
    known = {
        value
        for module in (gen_ai_attributes, server_attributes, error_attributes)
        for value in vars(module).values()
        if isinstance(value, str)
    }
    used = {value for key, value in vars(names).items() if key.isupper() and "." in str(value)}
    ours = {name for name in used if name.startswith("countersign.")}
    # Newer than the package that lists them.
    newer = {"gen_ai.request.stream", "gen_ai.response.time_to_first_chunk"}
    assert used - ours - known <= newer
    assert ours
