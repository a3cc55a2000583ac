"""An async client of the front door.

    async with Client("127.0.0.1:7411") as client:
        async for event in client.generate("def quicksort("):
            ...

Every failure is a typed ``CountersignError``. Arguments are checked here only where the wire cannot carry them; all
other rules are the server's, so that one place knows them.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from itertools import count
from typing import Literal, TypedDict, Unpack

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind

from countersign import wire
from countersign.events import (
    Accepted,
    Answer,
    Event,
    Finished,
    FinishReason,
    Hidden,
    Info,
    ModelInfo,
    Token,
    Tokens,
    TokenSource,
    Usage,
    event_from_wire,
    info_from_wire,
    reason_from_wire,
)
from countersign.services.runtime.closing import Closing
from countersign.services.runtime.errors import DataLoss, Unavailable
from countersign.services.runtime.rpc import Channel
from countersign.services.runtime.telemetry import attributes as names
from countersign.services.runtime.telemetry import tracing
from countersign.services.runtime.telemetry.generation import GenerationSpan, span_name
from countersign.services.runtime.telemetry.tracing import Lasted
from countersign.v1 import router_pb2, sampling_pb2

__all__ = [
    "DEFAULT_ADDRESS",
    "Accepted",
    "Answer",
    "Client",
    "Event",
    "FinishReason",
    "Finished",
    "GenerateOptions",
    "Hidden",
    "Info",
    "ModelInfo",
    "Token",
    "TokenSource",
    "Tokens",
    "Usage",
]

DEFAULT_ADDRESS = "127.0.0.1:7411"
UNARY_TIMEOUT_S = 10.0
# Every request has a deadline at the server; this only ends a stream whose server has lost it.
STREAM_TIMEOUT_S = 86_400.0
# The server ends an answer at its deadline, then signs and sends the receipt.
RECEIPT_GRACE_S = 10.0
FIRST_PAUSE_S = 0.1

_SERVICE = "/countersign.v1.RouterService"
_DRAFTING = {
    None: sampling_pb2.DRAFTING_UNSPECIFIED,
    "off": sampling_pb2.DRAFTING_OFF,
    "model": sampling_pb2.DRAFTING_MODEL,
}
_ON_DISCONNECT = {"cancel": router_pb2.ON_DISCONNECT_CANCEL, "continue": router_pb2.ON_DISCONNECT_CONTINUE}

_Message = router_pb2.GenerateResponse | router_pb2.ResumeResponse
_Stream = AsyncGenerator[router_pb2.GenerateResponse, None] | AsyncGenerator[router_pb2.ResumeResponse, None]


class GenerateOptions(TypedDict, total=False):
    """The keyword arguments of ``Client.generate``, which documents them."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int | None
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    drafting: Literal["model", "off"] | None
    model: str
    request_id: str
    timeout: float | None
    on_disconnect: Literal["cancel", "continue"]
    tenant: str


class Client(Closing):
    """A connection to one router.

    Args:
        address: host:port.
        reconnects: how often one answer is resumed after a broken connection.
        tracer_provider: each answer is a span of OpenTelemetry; the process's own provider by default.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        reconnects: int = 5,
        tracer_provider: trace.TracerProvider | None = None,
    ) -> None:
        self._channel = Channel(address, tracer_provider=tracer_provider)
        self._address = address
        self._reconnects = reconnects
        self._tracer = tracing.tracer(tracer_provider)

    async def close(self) -> None:
        await self._channel.close()

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        ignore_eos: bool = False,
        drafting: Literal["model", "off"] | None = None,
        model: str = "",
        request_id: str = "",
        timeout: float | None = None,
        on_disconnect: Literal["cancel", "continue"] = "cancel",
        tenant: str = "",
    ) -> AsyncGenerator[Event, None]:
        """Answer ``prompt``, text or token ids: ``Accepted``, ``Tokens`` as they are committed, then ``Finished``.

        Of tokens that the deployment hides (reasoning) only the number comes, as ``Hidden``.

        The output is a function of the weights, the prompt and the sampling arguments alone. When ``temperature`` is
        above 0 and ``seed`` is None, a seed is drawn here from the system's randomness, since the provider must never
        choose it, and ``Accepted.seed`` tells it. ``timeout`` is the server's deadline in seconds: the answer then ends
        as it is, with reason DEADLINE.

        Leaving the loop early closes the stream, which cancels the request unless ``on_disconnect`` is "continue" (use
        ``contextlib.aclosing`` where it must happen at once). With "continue", a connection that breaks after
        ``Accepted`` is resumed from the last token received.

        Raises:
            InvalidArgument: a value that the wire cannot carry (at once) or that the server refuses.
            Unavailable: nobody answers, or the connection broke and was not resumed, or too often.
            DataLoss: the server left out tokens.
            CountersignError: whatever else the server answers.

        """
        if seed is None and temperature > 0:
            seed = secrets.randbits(64)
        request = router_pb2.GenerateRequest(
            request_id=wire.text("request_id", request_id),
            model=wire.text("model", model),
            sampling=sampling_pb2.SamplingParams(
                temperature=temperature,
                top_k=wire.unsigned("top_k", top_k, 32),
                top_p=top_p,
                seed=None if seed is None else wire.unsigned("seed", seed, 64),
                max_tokens=wire.unsigned("max_tokens", max_tokens, 32),
                stop_token_ids=[wire.unsigned("stop_token_ids", token, 32) for token in stop_token_ids],
                stop=[wire.text("stop", string) for string in ([stop] if isinstance(stop, str) else stop)],
                ignore_eos=ignore_eos,
            ),
            drafting=wire.one_of("drafting", drafting, _DRAFTING),
            timeout_ms=0 if timeout is None else wire.milliseconds("timeout", timeout),
            on_disconnect=wire.one_of("on_disconnect", on_disconnect, _ON_DISCONNECT),
            tenant=wire.text("tenant", tenant),
        )
        if isinstance(prompt, str):
            request.text = wire.text("prompt", prompt)
        else:
            request.token_ids.ids.extend(wire.unsigned("prompt", token, 32) for token in prompt)
        method, limit = f"{_SERVICE}/Generate", STREAM_TIMEOUT_S if timeout is None else timeout + RECEIPT_GRACE_S
        progress = _Progress(seed)
        stream = self._channel.stream(method, request, router_pb2.GenerateResponse, limit, progress.lasted)
        return self._generated(request, stream, progress, goes_on=on_disconnect == "continue")

    def resume(self, request_id: str, position: int = 0) -> AsyncGenerator[Event, None]:
        """The events of a request that exists, from output token ``position`` on. A broken connection is resumed.

        Raises as ``generate``; NotFound for an unknown request.
        """
        request_id = wire.text("request_id", request_id)
        position = wire.unsigned("position", position, 32)
        stream = self._resume(request_id, position)
        return self._answer(stream, _Progress(request_id=request_id, position=position), goes_on=True)

    async def complete(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> Answer:
        """The whole answer at once. Arguments and errors as ``generate``."""
        accepted, tokens, finished = Accepted("", "", 0), list[Token](), Finished(FinishReason.UNKNOWN, Usage(), b"")
        async with aclosing(self.generate(prompt, **options)) as events:
            async for event in events:
                match event:
                    case Accepted():
                        accepted = event
                    case Tokens():
                        tokens += event.tokens
                    case Finished():
                        finished = event
        return Answer(
            request_id=accepted.request_id,
            text="".join(token.text for token in tokens),
            tokens=tuple(tokens),
            finish=finished.reason,
            usage=finished.usage,
            receipt=finished.receipt,
            seed=accepted.seed,
            message=finished.message,
        )

    async def cancel(self, request_id: str) -> FinishReason:
        """End a request; what is committed stands. Tells why it ended: it may have had another reason before."""
        request = router_pb2.CancelRequest(request_id=wire.text("request_id", request_id))
        reply = await self._channel.unary(f"{_SERVICE}/Cancel", request, router_pb2.CancelResponse, UNARY_TIMEOUT_S)
        return reason_from_wire(reply.reason)

    async def receipt(self, request_id: str) -> bytes:
        """The signed receipt of a request that has ended, with its openings."""
        request = router_pb2.GetReceiptRequest(request_id=wire.text("request_id", request_id))
        method = f"{_SERVICE}/GetReceipt"
        reply = await self._channel.unary(method, request, router_pb2.GetReceiptResponse, UNARY_TIMEOUT_S)
        return reply.receipt

    async def activations(self, request_id: str, positions: Sequence[int]) -> bytes:
        """Activation fingerprints of a request whose receipt is signed, at these output tokens, ascending; see
        ``countersign.verify.fingerprints``. Draw the positions once you have the receipt.
        """
        request = router_pb2.OpenActivationsRequest(
            request_id=wire.text("request_id", request_id),
            positions=[wire.unsigned("positions", position, 32) for position in positions],
        )
        method = f"{_SERVICE}/OpenActivations"
        reply = await self._channel.unary(method, request, router_pb2.OpenActivationsResponse, UNARY_TIMEOUT_S)
        return reply.openings

    async def open_hidden(self, request_id: str, beacon: bytes) -> tuple[int, bytes]:
        """Hidden tokens of a request whose receipt is signed, at leaves that the beacon draws: how many leaves the
        deployment opens of this answer, and they; see ``countersign.verify.coin.challenge``. Make the beacon of 32
        random bytes once you have the receipt; the first one stands.
        """
        request = router_pb2.OpenHiddenRequest(request_id=wire.text("request_id", request_id), beacon=beacon)
        method = f"{_SERVICE}/OpenHidden"
        reply = await self._channel.unary(method, request, router_pb2.OpenHiddenResponse, UNARY_TIMEOUT_S)
        return reply.leaves, reply.openings

    async def tokenize(self, text: str) -> Sequence[int]:
        """The token ids that ``generate`` makes of a text."""
        request = router_pb2.TokenizeRequest(text=wire.text("text", text))
        method = f"{_SERVICE}/Tokenize"
        reply = await self._channel.unary(method, request, router_pb2.TokenizeResponse, UNARY_TIMEOUT_S)
        return list(reply.token_ids)

    async def info(self) -> Info:
        """What the deployment serves."""
        request = router_pb2.GetInfoRequest()
        reply = await self._channel.unary(f"{_SERVICE}/GetInfo", request, router_pb2.GetInfoResponse, UNARY_TIMEOUT_S)
        return info_from_wire(reply)

    def _resume(
        self, request_id: str, position: int, lasted: Lasted | None = None
    ) -> AsyncGenerator[router_pb2.ResumeResponse, None]:
        request = router_pb2.ResumeRequest(request_id=request_id, position=position)
        return self._channel.stream(f"{_SERVICE}/Resume", request, router_pb2.ResumeResponse, STREAM_TIMEOUT_S, lasted)

    async def _generated(
        self, request: router_pb2.GenerateRequest, stream: _Stream, progress: _Progress, goes_on: bool
    ) -> AsyncGenerator[Event, None]:
        """One answer as one span of the caller's trace, or of one that begins here."""
        host, _, port = self._address.rpartition(":")
        told: dict[str, str | int] = {names.SERVER_ADDRESS: host}
        if port.isdigit():
            told[names.SERVER_PORT] = int(port)
        span = self._tracer.start_span(span_name(request.model), kind=SpanKind.CLIENT, attributes=told)
        progress.lasted.began_ns = getattr(span, "start_time", None)  # the API does not tell, SDKs do
        progress.span = GenerationSpan(span, request)
        with tracing.EndedWithCalls(span, progress.lasted):
            try:
                async with aclosing(self._answer(stream, progress, goes_on, span)) as events:
                    async for event in events:
                        yield event
            except (GeneratorExit, asyncio.CancelledError):
                progress.span.left()
                raise
            finally:
                progress.span.close()

    async def _answer(
        self, stream: _Stream, progress: _Progress, goes_on: bool, span: Span | None = None
    ) -> AsyncGenerator[Event, None]:
        """The events of one answer over as many streams as it takes and ``reconnects`` allows."""
        span = span or trace.get_current_span()  # noqa: TID251  the caller's
        for attempt in count():
            messages: AsyncGenerator[_Message] = tracing.within(span, stream)
            try:
                async with aclosing(stream), aclosing(messages):
                    async for message in messages:
                        for event in progress.take(message.event):
                            yield event
                progress.require_finished()
            except Unavailable:
                if not (goes_on and progress.request_id) or attempt == self._reconnects:
                    raise
            else:
                return
            await asyncio.sleep(FIRST_PAUSE_S * 2**attempt)
            stream = self._resume(progress.request_id, progress.position, progress.lasted)


class _Progress:
    """Makes one answer of several streams: what came before is dropped, what is missing is noticed."""

    def __init__(self, seed: int | None = None, request_id: str = "", position: int = 0) -> None:
        self._seed = seed
        self._accepted = False
        self.request_id = request_id
        self.position = position
        self.span: GenerationSpan | None = None
        self.lasted = Lasted()
        self._finished = False

    def take(self, message: router_pb2.StreamEvent) -> Iterator[Event]:
        """The event, if there is anything new in it.

        Raises:
            DataLoss: reason GAP, tokens are missing before it.

        """
        if self.span is not None:
            self.span.sees(message)
        event = event_from_wire(message, self._seed)
        match event:
            case Accepted():
                if not self._accepted:
                    yield event
                self.request_id, self._accepted = event.request_id, True
            case Tokens():
                tokens = event.tokens[self._known(event.position) :]
                if tokens:
                    event = Tokens(self.position, tokens)
                    self.position += len(tokens)
                    yield event
            case Hidden():
                fresh = event.count - self._known(event.position)
                if fresh > 0:
                    event = Hidden(self.position, fresh)
                    self.position += fresh
                    yield event
            case Finished():
                self._finished = True
                yield event

    def _known(self, position: int) -> int:
        """How many tokens from ``position`` on have come before. Raises DataLoss: reason GAP."""
        if position > self.position:
            raise DataLoss(f"output tokens {self.position} to {position - 1} never came", reason="GAP")
        return self.position - position

    def require_finished(self) -> None:
        """Raises Unavailable(STREAM_ENDED)."""
        if not self._finished:
            raise Unavailable("the router ended the stream before the answer was final", reason="STREAM_ENDED")
