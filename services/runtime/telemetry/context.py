"""For which request, and within which span of it, the code that runs now works.

The span is in a variable of our own, not in OpenTelemetry's context: a look at that costs a process that has just woken
up a fortieth of a millisecond, and a first token waits for many. Spans from outside are there (`Client`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import Context, ContextVar, Token, copy_context

from google.protobuf.message import Message
from opentelemetry.trace import INVALID_SPAN, Span

_MOST = 64  # characters of a request id; what is longer is none (router/admission.py)
_request: ContextVar[str] = ContextVar("countersign_request", default="")
_span: ContextVar[Span] = ContextVar("countersign_span", default=INVALID_SPAN)

# The span that the code works within; an invalid one where it works within none.
current_span = _span.get


def enter_span(span: Span) -> Token[Span]:
    """What this task does belongs to ``span``, until `leave_span`."""
    return _span.set(span)


def leave_span(token: Token[Span]) -> None:
    """What was before is again."""
    _span.reset(token)


@contextmanager
def span_context(span: Span) -> Iterator[None]:
    """What is done within belongs to ``span``, which this does not end."""
    token = _span.set(span)
    try:
        yield
    finally:
        _span.reset(token)


def task_context(span: Span) -> Context:
    """For a new task, whose work belongs to ``span``."""
    context = copy_context()
    context.run(_span.set, span)
    return context


def current_request() -> str:
    """Empty where the code works for none, or for many."""
    return _request.get()


def bind_request(request_id: str) -> None:
    """From here on this task works for this request, and so do the tasks that it starts."""
    _request.set(request_id)


def request_of(message: Message) -> str:
    """The request that a call's message names; empty when it names none."""
    request_id = getattr(message, "request_id", "")
    return request_id if len(request_id) <= _MOST else ""


@contextmanager
def request_context(request_id: str) -> Iterator[None]:
    """What runs within works for this request, and so do the tasks that it starts."""
    token = _request.set(request_id)
    try:
        yield
    finally:
        with suppress(ValueError):  # a generator may be closed from another task
            _request.reset(token)
