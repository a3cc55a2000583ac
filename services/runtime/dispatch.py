"""The answering side of the bus: bounded tasks, deadlines, typed errors in every case."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from nats.aio.msg import Msg
from opentelemetry.trace import Span, Tracer

from countersign.services.runtime.call import Call, Method, parse_request
from countersign.services.runtime.errors import (
    CountersignError,
    DeadlineExceeded,
    Internal,
    ResourceExhausted,
    Unavailable,
)
from countersign.services.runtime.telemetry import tracing
from countersign.services.runtime.telemetry.context import bind_request, request_of

DEADLINE_HEADER = "Cs-Deadline"
STATUS_HEADER = "Cs-Status"
STATUS_ERROR = "error"
# For a caller that names no deadline: a message from another client than ours.
DEFAULT_TIMEOUT_S = 30.0

_log = logging.getLogger(__name__)
Publish = Callable[[str, bytes, Mapping[str, str]], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Limits:
    """``concurrency`` calls run, ``queue`` more wait for their turn, the others are refused at once."""

    concurrency: int
    queue: int


class Dispatcher:
    """Answers one service's calls. `accept` never waits for a handler, so one slow call does not hold up the next."""

    def __init__(self, service: str, limits: Limits, publish: Publish, tracer: Tracer) -> None:
        self._service = service
        self._limits = limits
        self._publish = publish
        self._tracer = tracer
        self._slots = asyncio.Semaphore(limits.concurrency)
        self._tasks: set[asyncio.Task[None]] = set()

    async def accept(self, msg: Msg, method: Method) -> None:
        """Take a message: start its task, or refuse it."""
        if not msg.reply:
            _log.warning("a call without reply subject is dropped", extra={"subject": msg.subject})
        elif len(self._tasks) >= self._limits.concurrency + self._limits.queue:
            full = ResourceExhausted(
                f"{self._service} has {len(self._tasks)} calls in hand",
                reason="OVERLOADED",
                help="try again later",
            )
            await self._answer_error(msg, full)
        else:
            task = asyncio.create_task(self._run(msg, method), name=msg.subject)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def stop(self, grace: float) -> None:
        """Give the calls in hand ``grace`` seconds, then cancel them; each is answered either way."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=grace)
        running = list(self._tasks)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def _run(self, msg: Msg, method: Method) -> None:
        headers = msg.headers or {}
        attributes = tracing.rpc_attributes("nats", self._service, method.name)
        with tracing.inner_server_span(self._tracer, f"{self._service}/{method.name}", attributes, headers) as span:
            try:
                data = await self._result(msg, method, headers)
            except CountersignError as error:
                await self._fail(msg, span, error)
            except asyncio.CancelledError:
                stopping = Unavailable(f"{self._service} is stopping", reason="STOPPING", help="try another instance")
                await self._fail(msg, span, stopping)
                raise
            except Exception:  # noqa: BLE001  whatever a handler raises must be logged and answered
                _log.exception("a handler failed", extra={"method": f"{self._service}.{method.name}"})
                await self._fail(msg, span, Internal(f"{self._service}.{method.name} failed: a bug, see its log"))
            else:
                await self._answer(msg, data)
                await asyncio.sleep(0)  # the answer goes out, and then its span ends

    async def _result(self, msg: Msg, method: Method, headers: Mapping[str, str]) -> bytes:
        call = Call(deadline_unix_ms(headers), "nats")
        if call.remaining() <= 0:
            raise DeadlineExceeded(f"{method.name} arrived after its deadline", reason="EXPIRED_ON_ARRIVAL")
        request = parse_request(method.request_type, msg.data)
        bind_request(request_of(request))
        _log.debug("a call is taken", extra={"method": f"{self._service}.{method.name}"})
        try:
            async with asyncio.timeout(call.remaining()) as scope, self._slots:
                return method.encode(await method.function(request, call))
        except TimeoutError:
            if not scope.expired():
                raise  # the handler's own
            raise DeadlineExceeded(f"{method.name} was not done by its deadline") from None

    async def _fail(self, msg: Msg, span: Span, error: CountersignError) -> None:
        tracing.record_error(span, error)
        await self._answer_error(msg, error)

    async def _answer(self, msg: Msg, data: bytes) -> None:
        try:
            await self._publish(msg.reply, data, {})
        except ResourceExhausted as error:
            await self._answer_error(msg, error)
        except CountersignError as error:
            _log.warning("a reply is lost", extra={"subject": msg.subject, "error": str(error)})

    async def _answer_error(self, msg: Msg, error: CountersignError) -> None:
        try:
            await self._publish(msg.reply, error.to_status().SerializeToString(), {STATUS_HEADER: STATUS_ERROR})
        except CountersignError as lost:
            _log.warning("a reply is lost", extra={"subject": msg.subject, "error": str(lost)})


def deadline_unix_ms(headers: Mapping[str, str]) -> int:
    """The caller's absolute deadline; `DEFAULT_TIMEOUT_S` from now when it names none."""
    text = headers.get(DEADLINE_HEADER, "")
    # 15 digits last until the year 33658, and int() of them is cheap.
    if text.isascii() and text.isdigit() and len(text) <= 15:
        return int(text)
    return int((time.time() + DEFAULT_TIMEOUT_S) * 1000)
