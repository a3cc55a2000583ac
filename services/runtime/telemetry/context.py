"""Which request the code that runs now works for, so that its log lines can say so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar

from google.protobuf.message import Message

_MOST = 64  # characters of a request id; what is longer is none (router/admission.py)
_request: ContextVar[str] = ContextVar("countersign_request", default="")


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
