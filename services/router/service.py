"""The router service: lets requests in, places them, streams what is committed."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing

from google.protobuf.descriptor import ServiceDescriptor

from countersign import __version__
from countersign.services.protocol.commit import LogState, decode, replay
from countersign.services.protocol.driver import settle
from countersign.services.protocol.errors import LogError, RequestIdTaken
from countersign.services.protocol.events import ClosedAlready, Settled
from countersign.services.protocol.opener import Opener
from countersign.services.protocol.subjects import commit_subject, request_of
from countersign.services.router import admission
from countersign.services.router.drawing import Draws
from countersign.services.router.following import Follower
from countersign.services.router.metering import RequestMeter
from countersign.services.router.placing import Placer
from countersign.services.router.receipts import Receipts
from countersign.services.router.text import Text
from countersign.services.runtime.announcer import Announcer
from countersign.services.runtime.background import Background
from countersign.services.runtime.clock import wall_ms
from countersign.services.runtime.errors import (
    AlreadyExists,
    CountersignError,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    NotFound,
    ResourceExhausted,
    Unavailable,
    translated,
)
from countersign.services.runtime.journal import Entry
from countersign.services.runtime.service import Call, Context
from countersign.services.runtime.telemetry import attributes as names
from countersign.services.runtime.telemetry import metrics, tracing
from countersign.services.runtime.telemetry.context import bind_request, current_span, request_context
from countersign.services.runtime.telemetry.generation import GenerationSpan
from countersign.services.runtime.telemetry.phases import Phases
from countersign.services.runtime.telemetry.traceparent import traceparent
from countersign.v1 import router_pb2
from countersign.v1.commit_pb2 import Closed, Opened
from countersign.v1.registry_pb2 import Instance
from countersign.v1.router_pb2 import (
    CancelRequest,
    CancelResponse,
    GenerateRequest,
    GenerateResponse,
    GetInfoRequest,
    GetInfoResponse,
    GetReceiptRequest,
    GetReceiptResponse,
    ModelInfo,
    OnDisconnect,
    OpenActivationsRequest,
    OpenActivationsResponse,
    OpenHiddenRequest,
    OpenHiddenResponse,
    ResumeRequest,
    ResumeResponse,
    StreamEvent,
    TokenizeRequest,
    TokenizeResponse,
)
from countersign.v1.sampling_pb2 import FinishReason
from countersign.v1.target_pb2 import RefreshRequest, RefreshResponse

CALL_TIMEOUT_S = 5.0
CANCEL_WAIT_S = 5.0
LAG_LOOKS, LAG_PAUSE_S = 20, 0.1
ADOPT_PAUSE_S = 5.0
DEFAULT_TENANT = "default"


class RouterService:
    """The public API. Its state is the logs: any router can go on where another stopped."""

    descriptor: ServiceDescriptor = router_pb2.DESCRIPTOR.services_by_name["RouterService"]

    def __init__(self, context: Context) -> None:
        self._context = context
        self._config = context.config.router
        self._bus = context.bus
        self._journal = context.journal
        self._receipts = Receipts(context.journal)
        self._draws = Draws(context.journal, self._config.open_hidden)
        self._text = Text(context.bus)
        self._placer = Placer(context, wall_ms)
        announcer = Announcer(context.bus if context.config.sidecar.enabled else None, context.instance)
        self._follower = Follower(self._text, context.journal, self._placer, self._receipts, wall_ms, announcer)
        self._active = 0
        self._tracer = tracing.tracer()
        self._content = context.config.telemetry.content
        self._meter = RequestMeter(asyncio.get_running_loop().time)
        self._background = Background()
        self._orphans = Background()

    @property
    def active(self) -> int:
        """Requests whose client waits."""
        return self._active

    async def run(self) -> None:
        """See to the requests that a router left behind: nobody else may be following them."""
        while not await self._adopted():  # noqa: ASYNC110  it asks the server, which offers no event
            await asyncio.sleep(ADOPT_PAUSE_S)
        await asyncio.Event().wait()

    async def _adopted(self) -> bool:
        """Whether all logs could be looked at; the open ones are followed from then on."""
        left: list[str] = []
        try:
            for subject in await self._journal.subjects():
                entry = await self._journal.last(subject)
                if entry is not None and not isinstance(decode(entry.data)[1], Closed):
                    left.append(request_of(subject))
        except (CountersignError, LogError) as error:
            self._context.log.warning(
                "the token logs cannot be looked through, trying again", extra={"error": str(error)}
            )
            return False
        for request_id in left:
            with request_context(request_id):
                self._orphans.spawn(self._look_after(request_id))
        return True

    async def close(self) -> None:
        await self._orphans.cancel()
        await self._background.drain()

    def describe(self, instance: Instance) -> None:
        instance.active_requests = self._active

    async def Generate(self, request: GenerateRequest, call: Call) -> AsyncIterator[GenerateResponse]:
        """Raises what ``admission`` raises, ResourceExhausted when full, AlreadyExists for a request id in use."""
        with self._meter.request() as measured:
            async with aclosing(self._generate(request)) as events:
                async for event in events:
                    measured.saw(event)
                    yield GenerateResponse(event=event)

    async def _generate(self, request: GenerateRequest) -> AsyncGenerator[StreamEvent, None]:
        if self._active >= self._config.max_requests:
            raise ResourceExhausted(
                f"this router has {self._config.max_requests} open requests",
                reason="ROUTER_FULL",
                help="try again later",
            )
        self._active += 1
        request_id = request.request_id or uuid.uuid4().hex
        bind_request(request_id)
        finished = False
        opened = False
        span = current_span()  # of this call
        generation = GenerationSpan(span, request, content=self._content)
        phases = Phases(self._tracer, span)
        try:
            with phases.step("admit"):
                opener = await self._open(request_id, request, traceparent(span))
            opened = True
            with phases.step("place"):
                await self._placer.place(opener)
            phases.begin("stream")
            async with aclosing(self._follower.follow(request_id, 0)) as events:
                async for event in events:
                    finished = event.HasField("finished")
                    generation.sees(event)
                    yield event
        except (GeneratorExit, asyncio.CancelledError):
            generation.left()
            raise
        finally:
            generation.close()
            phases.end()
            self._active -= 1
            goes_on = request.on_disconnect == OnDisconnect.ON_DISCONNECT_CONTINUE
            if opened and not finished:
                left = (
                    self._look_after(request_id)
                    if goes_on
                    else self._cancel_quietly(request_id, "the client went away")
                )
                self._background.spawn(left)

    async def Resume(self, request: ResumeRequest, call: Call) -> AsyncIterator[ResumeResponse]:
        """Raises NotFound(UNKNOWN_REQUEST)."""
        admission.check_request_id(request.request_id)
        _belongs_to(await self._log_of(request.request_id))
        async with aclosing(self._follower.follow(request.request_id, request.position)) as events:
            async for event in events:
                yield ResumeResponse(event=event)

    async def Cancel(self, request: CancelRequest, call: Call) -> CancelResponse:
        """Raises NotFound(UNKNOWN_REQUEST), DeadlineExceeded when its target does not close it."""
        admission.check_request_id(request.request_id)
        opener = Opener(await self._log_of(request.request_id))
        _belongs_to(opener.log)
        final = await settle(opener, opener.cancel("the client asked for it"), self._journal)
        if isinstance(final, ClosedAlready):
            return CancelResponse(reason=final.reason)
        if opener.log.instance:
            await self._refresh(opener.log)
        reason = await self._closed(request.request_id, min(CANCEL_WAIT_S, call.remaining()))
        return CancelResponse(reason=reason)

    async def GetReceipt(self, request: GetReceiptRequest, call: Call) -> GetReceiptResponse:
        """Raises NotFound(UNKNOWN_REQUEST), FailedPrecondition(NOT_ENDED or NO_RECEIPT)."""
        admission.check_request_id(request.request_id)
        entries = await self._journal.read(commit_subject(request.request_id))
        if not entries:
            kept = await self._receipts.stored(request.request_id)
            if kept is None:
                raise _unknown(request.request_id)
            return GetReceiptResponse(receipt=kept)
        return GetReceiptResponse(receipt=await self._receipts.of(_signed_log(request.request_id, entries)))

    async def OpenActivations(self, request: OpenActivationsRequest, call: Call) -> OpenActivationsResponse:
        """Only once the receipt commits to them, so that nobody can ask first and have it signed accordingly.

        Raises:
            InvalidArgument: BAD_POSITIONS.
            NotFound: UNKNOWN_REQUEST, of a log that was not kept as well.
            FailedPrecondition: NOT_ENDED, NO_RECEIPT, NO_FINGERPRINTS, HIDDEN_TOKENS.
        """
        admission.check_request_id(request.request_id)
        entries = await self._journal.read(commit_subject(request.request_id))
        if not entries:
            raise _unknown(request.request_id)
        log = _signed_log(request.request_id, entries)
        # All leaves are hashed, a quarter of a second for 32,000 tokens: others are streamed to meanwhile.
        return OpenActivationsResponse(
            openings=await asyncio.to_thread(self._receipts.activations, log, request.positions)
        )

    async def OpenHidden(self, request: OpenHiddenRequest, call: Call) -> OpenHiddenResponse:
        """Only once the receipt is signed, and one draw for each request.

        Raises:
            InvalidArgument: BAD_BEACON.
            NotFound: UNKNOWN_REQUEST, of a log that was not kept as well.
            FailedPrecondition: NOT_ENDED, NO_RECEIPT, NOTHING_HIDDEN, NOT_OPENED, ALREADY_DRAWN.
        """
        admission.check_request_id(request.request_id)
        entries = await self._journal.read(commit_subject(request.request_id))
        if not entries:
            raise _unknown(request.request_id)
        log = _signed_log(request.request_id, entries)
        leaves, openings = await self._draws.opened(log, await self._receipts.of(log), request.beacon)
        return OpenHiddenResponse(leaves=leaves, openings=openings)

    async def Tokenize(self, request: TokenizeRequest, call: Call) -> TokenizeResponse:
        """Raises InvalidArgument(EMPTY_PROMPT, PROMPT_TOO_LONG)."""
        admission.check_text(request.text)
        return TokenizeResponse(token_ids=await self._text.encode(request.text))

    async def GetInfo(self, request: GetInfoRequest, call: Call) -> GetInfoResponse:
        return GetInfoResponse(models=self._models(), version=__version__)

    def _models(self) -> list[ModelInfo]:
        """One for each name, of the live targets."""
        targets = sorted(self._context.registry.live("target"), key=lambda target: target.instance)
        return list({target.model.name: target.model for target in targets}.values())

    async def _open(self, request_id: str, request: GenerateRequest, traceparent: str) -> Opener:
        """Check the request and write its first record."""
        model = admission.choose_model(request.model, self._models())
        admission.check(request, model)
        prompt = await self._prompt(request)
        admission.check_length(prompt, request.sampling, model)
        now = wall_ms()
        timeout_ms = min(request.timeout_ms or self._config.default_timeout_ms, self._config.max_timeout_ms)
        if not request.sampling.HasField("top_p"):
            request.sampling.top_p = 1.0  # the log holds what was asked, defaults included
        opener = Opener(LogState(request_id))
        effect = opener.open(
            Opened(
                model=model.name,
                weights_sha256=model.weights_sha256,
                prompt_token_ids=prompt,
                sampling=request.sampling,
                drafting=request.drafting,
                deadline_unix_ms=now + timeout_ms,
                tenant=request.tenant or DEFAULT_TENANT,
                opened_unix_ms=now,
                salt_key=os.urandom(32),
                hidden=model.hidden if model.HasField("hidden") else None,
                traceparent=traceparent,
            )
        )
        try:
            with translated(LogError, DataLoss, about=f"the log of request {request_id} is damaged"):
                await settle(opener, effect, self._journal)
        except RequestIdTaken as error:
            raise AlreadyExists(
                f"request id {request_id} names another request",
                reason="REQUEST_ID_TAKEN",
                help="choose another id, or resume that one",
            ) from error
        return opener

    async def _prompt(self, request: GenerateRequest) -> Sequence[int]:
        if request.WhichOneof("prompt") == "token_ids":
            return request.token_ids.ids
        return await self._text.encode(request.text)

    async def _refresh(self, log: LogState) -> None:
        """Tell the log's target that it has grown. It would find out by itself, at its next append."""
        request = RefreshRequest(request_id=log.request_id)
        try:
            await self._bus.call(
                "target", "Refresh", request, RefreshResponse, timeout=CALL_TIMEOUT_S, instance=log.instance
            )
        except CountersignError as error:
            about = {"request_id": log.request_id, "target": log.instance, "reason": error.reason}
            self._context.log.warning("a target was not told that its request has moved on", extra=about)

    async def _look_after(self, request_id: str) -> None:
        """See a request to its end whose client will come back for it."""
        try:
            await self._follower.ended(request_id)
        except CountersignError as error:
            about = {"request_id": request_id, "reason": error.reason}
            self._context.log.warning("a request is left to itself", extra=about)

    async def _cancel_quietly(self, request_id: str, cause: str) -> None:
        """Nobody waits for the answer any more; the log says so, and the target stops."""
        try:
            opener = Opener(await self._log_of(request_id))
            if isinstance(await settle(opener, opener.cancel(cause), self._journal), Settled) and opener.log.instance:
                await self._refresh(opener.log)
        except (CountersignError, LogError) as error:
            about = {"request_id": request_id, "error": str(error)}
            self._context.log.warning("a request could not be cancelled", extra=about)

    async def _closed(self, request_id: str, patience: float) -> FinishReason.ValueType:
        """Wait for the target to close the request."""
        try:
            async with asyncio.timeout(patience):
                return await self._follower.ended(request_id)
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"request {request_id} is cancelled, but its target has not closed it",
                reason="TARGET_SILENT",
                help="nothing more is committed; its receipt will follow if the target lives",
            ) from error

    async def _log_of(self, request_id: str) -> LogState:
        subject = commit_subject(request_id)
        for _ in range(LAG_LOOKS):
            if entries := await self._journal.read(subject):
                return _replayed(request_id, entries)
            if await self._journal.last(subject) is None:
                raise _unknown(request_id)
            await asyncio.sleep(LAG_PAUSE_S)  # the replica that was read lags behind
        raise Unavailable(
            f"the log of request {request_id} cannot be read yet", reason="REPLICA_LAGS", help="try again"
        )


def _belongs_to(log: LogState) -> None:
    """This call's span names the request, and links to its trace."""
    span = current_span()
    asked = tracing.context_of(log.opened.traceparent) if log.opened is not None else None
    span.set_attribute(names.REQUEST_ID, log.request_id)
    if asked is not None:
        span.add_link(asked)


def _replayed(request_id: str, entries: Sequence[Entry]) -> LogState:
    with translated(LogError, DataLoss, about=f"the log of request {request_id} is damaged"):
        return replay(request_id, entries)


def _signed_log(request_id: str, entries: Sequence[Entry]) -> LogState:
    """The log of a request that has ended with a receipt. Raises FailedPrecondition(NOT_ENDED or NO_RECEIPT)."""
    log = _replayed(request_id, entries)
    if log.closed is None:
        raise FailedPrecondition(f"request {request_id} has not ended", reason="NOT_ENDED", help="resume it, or wait")
    if not log.closed.receipt_sha256:
        raise FailedPrecondition(f"request {request_id} ended without a receipt", reason="NO_RECEIPT")
    return log


def _unknown(request_id: str) -> NotFound:
    return NotFound(
        f"there is no request {request_id}", reason="UNKNOWN_REQUEST", help="check the id; logs are kept for a set time"
    )


async def create(context: Context) -> RouterService:
    """A router needs nothing but the bus."""
    service, most = RouterService(context), context.config.router.max_requests
    metrics.observe(metrics.REQUESTS_OPEN, lambda: service.active)
    metrics.observe(metrics.REQUESTS_LIMIT, lambda: most)
    return service
