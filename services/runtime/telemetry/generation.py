"""The span of one generation, by the conventions for generative AI: the client's and the router's are the same."""

from __future__ import annotations

import json
import time

from opentelemetry.trace import Span
from opentelemetry.util.types import AttributeValue

from countersign.services.runtime.reasons import finish_name
from countersign.services.runtime.telemetry import attributes as names
from countersign.services.runtime.telemetry import tracing
from countersign.v1.router_pb2 import Accepted, Finished, GenerateRequest, StreamEvent
from countersign.v1.sampling_pb2 import FinishReason


def span_name(model: str) -> str:
    """As the conventions want it: the operation, and the model where it is known."""
    return f"{names.TEXT_COMPLETION} {model}".rstrip()


class GenerationSpan:
    """What a span says of one generation. It is noted as the request goes on and written at the end (`close`), so that
    nobody waits for it. ``content``: with prompt and answer, which nothing else here tells.
    """

    def __init__(self, span: Span, request: GenerateRequest, *, content: bool = False) -> None:
        self._span = span
        self._request = request
        self._on = span.is_recording()
        self._began = time.monotonic() if self._on else 0.0
        self._first = 0.0
        self._accepted: Accepted | None = None
        self._finished: Finished | None = None
        self._left = False
        self._text: list[str] | None = [] if content and self._on else None

    def sees(self, event: StreamEvent) -> None:
        """An event of the answer, before it goes on."""
        if not self._on:
            return
        match event.WhichOneof("event"):
            case "accepted":
                self._accepted = event.accepted
            case "finished":
                self._finished = event.finished
            case "tokens" | "hidden":
                self._first = self._first or time.monotonic()
                if self._text is not None:
                    self._text += [token.text for token in event.tokens.tokens]

    def left(self) -> None:
        """Whoever read it has gone away."""
        self._left = True

    def close(self) -> None:
        """Nothing more comes."""
        if not self._on:
            return
        model = self._accepted.model if self._accepted is not None else self._request.model
        self._span.update_name(span_name(model))
        self._span.set_attributes(_asked(self._request) | self._answered() | self._said())
        if self._finished is not None and self._finished.reason == FinishReason.FINISH_REASON_ERROR:
            tracing.fail(self._span, "FINISHED_WITH_ERROR")

    def _answered(self) -> dict[str, AttributeValue]:
        told: dict[str, AttributeValue] = {}
        if self._accepted is not None:
            told[names.REQUEST_ID] = told[names.RESPONSE_ID] = self._accepted.request_id
            told[names.REQUEST_MODEL] = told[names.RESPONSE_MODEL] = self._accepted.model
            told[names.INPUT_TOKENS] = self._accepted.prompt_tokens
        if self._first:
            told[names.TIME_TO_FIRST_CHUNK] = self._first - self._began
        if self._finished is not None:
            usage = self._finished.usage
            told |= {
                names.FINISH_REASONS: (finish_name(self._finished.reason),),
                names.INPUT_TOKENS: usage.prompt_tokens,
                names.OUTPUT_TOKENS: usage.output_tokens,
                names.CACHED_TOKENS: usage.cached_prompt_tokens,
                names.DRAFTED: usage.drafted_tokens,
                names.ACCEPTED: usage.accepted_tokens,
                names.ROUNDS: usage.target_passes,
            }
        elif self._left:
            told[names.FINISH_REASONS] = ("cancelled",)
        return told

    def _said(self) -> dict[str, AttributeValue]:
        if self._text is None:
            return {}
        prompt = self._request.text or f"{len(self._request.token_ids.ids)} token ids"
        answer = "".join(self._text)
        return {names.INPUT_MESSAGES: _messages("user", prompt), names.OUTPUT_MESSAGES: _messages("assistant", answer)}


def _asked(request: GenerateRequest) -> dict[str, AttributeValue]:
    """What is known of a request before it is sent."""
    sampling = request.sampling
    told: dict[str, AttributeValue] = {
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
