"""The span of one generation, by the conventions for generative AI: the client's and the router's are the same."""

from __future__ import annotations

import json
import time

from opentelemetry import trace
from opentelemetry.trace import Span

from countersign.services.runtime.telemetry import attributes as names
from countersign.services.runtime.telemetry import tracing
from countersign.v1.router_pb2 import GenerateRequest, StreamEvent
from countersign.v1.sampling_pb2 import FinishReason


def span_name(model: str) -> str:
    """As the conventions want it: the operation, and the model where it is known."""
    return f"{names.TEXT_COMPLETION} {model}".rstrip()


class GenerationSpan:
    """Fills in ``span`` as the request goes on. ``content``: with the answer, which nothing else here tells."""

    def __init__(self, span: Span, *, content: bool = False) -> None:
        self._span = span
        self._on = span.is_recording()
        self._began = time.monotonic() if self._on else 0.0
        self._text: list[str] | None = [] if content and self._on else None
        self._waiting, self._finished = True, False

    @staticmethod
    def of_call(request: GenerateRequest, *, content: bool) -> GenerationSpan:
        """The current span, which is that of the call."""
        span = trace.get_current_span()
        if span.is_recording():
            span.update_name(span_name(request.model))
            span.set_attributes(asked(request))
            if content:
                prompt = request.text or f"{len(request.token_ids.ids)} token ids"
                span.set_attribute(names.INPUT_MESSAGES, _messages("user", prompt))
        return GenerationSpan(span, content=content)

    def sees(self, event: StreamEvent) -> None:
        """An event of the answer, before it goes on."""
        if not self._on:
            return
        match event.WhichOneof("event"):
            case "accepted":
                self._accepted(event)
            case "finished":
                self._finish(event)
            case "tokens" | "hidden":
                self._chunk(event)

    def left(self) -> None:
        """Whoever read it has gone away."""
        if self._on and not self._finished:
            self._span.set_attribute(names.FINISH_REASONS, ("cancelled",))

    def _accepted(self, event: StreamEvent) -> None:
        self._span.update_name(span_name(event.accepted.model))
        self._span.set_attributes(
            {
                names.REQUEST_ID: event.accepted.request_id,
                names.RESPONSE_ID: event.accepted.request_id,
                names.REQUEST_MODEL: event.accepted.model,
                names.RESPONSE_MODEL: event.accepted.model,
                names.INPUT_TOKENS: event.accepted.prompt_tokens,
            }
        )

    def _chunk(self, event: StreamEvent) -> None:
        if self._waiting:
            self._waiting = False
            self._span.set_attribute(names.TIME_TO_FIRST_CHUNK, time.monotonic() - self._began)
        if self._text is not None:
            self._text += [token.text for token in event.tokens.tokens]

    def _finish(self, event: StreamEvent) -> None:
        self._finished = True
        reason, usage = event.finished.reason, event.finished.usage
        self._span.set_attributes(
            {
                names.FINISH_REASONS: (FinishReason.Name(reason).removeprefix("FINISH_REASON_").lower(),),
                names.INPUT_TOKENS: usage.prompt_tokens,
                names.OUTPUT_TOKENS: usage.output_tokens,
                names.CACHED_TOKENS: usage.cached_prompt_tokens,
                names.DRAFTED: usage.drafted_tokens,
                names.ACCEPTED: usage.accepted_tokens,
                names.ROUNDS: usage.target_passes,
            }
        )
        if self._text is not None:
            self._span.set_attribute(names.OUTPUT_MESSAGES, _messages("assistant", "".join(self._text)))
        if reason == FinishReason.FINISH_REASON_ERROR:
            tracing.fail(self._span, "FINISHED_WITH_ERROR")


def asked(request: GenerateRequest) -> dict[str, str | int | float | bool]:
    """What is known of a request before it is sent."""
    sampling = request.sampling
    told: dict[str, str | int | float | bool] = {
        names.OPERATION: names.TEXT_COMPLETION,
        names.PROVIDER: names.PROVIDER_NAME,
        names.OUTPUT_TYPE: "text",
        names.REQUEST_STREAM: True,
        names.REQUEST_MAX_TOKENS: sampling.max_tokens,
        names.REQUEST_TEMPERATURE: sampling.temperature,
        names.REQUEST_TOP_K: float(sampling.top_k),
        names.REQUEST_TOP_P: sampling.top_p if sampling.HasField("top_p") else 1.0,
    }
    if request.model:
        told[names.REQUEST_MODEL] = request.model
    if request.request_id:
        told[names.REQUEST_ID] = request.request_id
    # An attribute is a signed number of 64 bits, a seed an unsigned one: larger ones have no place there.
    if sampling.HasField("seed") and sampling.seed < 1 << 63:
        told[names.REQUEST_SEED] = sampling.seed
    return told


def _messages(role: str, text: str) -> str:
    return json.dumps([{"role": role, "parts": [{"type": "text", "content": text}]}], ensure_ascii=False)
