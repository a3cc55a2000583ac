"""Every failure that can cross a process boundary.

    CountersignError
    ├── InvalidArgument       the request is wrong and stays wrong
    ├── NotFound              no such request, model or receipt
    ├── AlreadyExists         the request id is taken by another request
    ├── FailedPrecondition    right request, wrong state
    ├── ResourceExhausted     full: try again later
    ├── DeadlineExceeded      it took too long
    ├── Cancelled             the caller gave up
    ├── Unavailable           nobody answers: try again
    ├── DataLoss              stored bytes are not what was written
    ├── Unimplemented         this release cannot
    └── Internal              a bug

Each travels as a ``google.rpc.Status`` with an ``ErrorInfo`` (reason, domain, metadata), on NATS and gRPC alike. The
message says what happened and where; ``help`` says what to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from google.rpc import code_pb2, error_details_pb2, status_pb2

DOMAIN = "countersign"
# Bytes of UTF-8. gRPC carries errors in HTTP/2 headers, of which most peers take 8 KiB: the message once with each byte
# outside ASCII as three, then all of it in base64.
_MAX_MESSAGE = 1024
_MAX_HELP = 512
_MAX_METADATA = 200


class CountersignError(Exception):
    """Base of all. ``reason`` is UPPER_SNAKE_CASE and stable: programs branch on it, people read the message."""

    code: ClassVar[int] = code_pb2.UNKNOWN
    default_reason: ClassVar[str] = "UNKNOWN"

    def __init__(self, message: str, *, reason: str = "", help: str = "", **metadata: str) -> None:  # noqa: A002  the field's word
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.help = help
        self.metadata = metadata

    def __str__(self) -> str:
        return f"{self.message} ({self.help})" if self.help else self.message

    def to_status(self) -> status_pb2.Status:
        """The error as it travels, long texts clipped."""
        status = status_pb2.Status(code=self.code, message=_clip(self.message, _MAX_MESSAGE))
        metadata = {key: _clip(value, _MAX_METADATA) for key, value in self.metadata.items()}
        info = error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=metadata)
        status.details.add().Pack(info)
        if self.help:
            text = error_details_pb2.LocalizedMessage(locale="en", message=_clip(self.help, _MAX_HELP))
            status.details.add().Pack(text)
        return status

    @staticmethod
    def from_status(status: status_pb2.Status) -> CountersignError:
        """The typed error that a status carries; an unknown code becomes the base class."""
        info, text = error_details_pb2.ErrorInfo(), error_details_pb2.LocalizedMessage()
        for detail in status.details:
            detail.Unpack(info)
            detail.Unpack(text)
        kind = _BY_CODE.get(status.code, CountersignError)
        error = kind(status.message, reason=info.reason, help=text.message)
        error.metadata = dict(info.metadata)
        return error


class InvalidArgument(CountersignError):
    code = code_pb2.INVALID_ARGUMENT
    default_reason = "INVALID_ARGUMENT"


class NotFound(CountersignError):
    code = code_pb2.NOT_FOUND
    default_reason = "NOT_FOUND"


class AlreadyExists(CountersignError):
    code = code_pb2.ALREADY_EXISTS
    default_reason = "ALREADY_EXISTS"


class FailedPrecondition(CountersignError):
    code = code_pb2.FAILED_PRECONDITION
    default_reason = "FAILED_PRECONDITION"


class ResourceExhausted(CountersignError):
    code = code_pb2.RESOURCE_EXHAUSTED
    default_reason = "RESOURCE_EXHAUSTED"


class DeadlineExceeded(CountersignError):
    code = code_pb2.DEADLINE_EXCEEDED
    default_reason = "DEADLINE_EXCEEDED"


class Cancelled(CountersignError):
    code = code_pb2.CANCELLED
    default_reason = "CANCELLED"


class Unavailable(CountersignError):
    code = code_pb2.UNAVAILABLE
    default_reason = "UNAVAILABLE"


class DataLoss(CountersignError):
    code = code_pb2.DATA_LOSS
    default_reason = "DATA_LOSS"


class Unimplemented(CountersignError):
    code = code_pb2.UNIMPLEMENTED
    default_reason = "UNIMPLEMENTED"


class Internal(CountersignError):
    code = code_pb2.INTERNAL
    default_reason = "INTERNAL"


def _clip(text: str, limit: int) -> str:
    data = text.encode(errors="replace")  # a lone surrogate, such as in a file name, cannot be sent
    if len(data) <= limit:
        return data.decode()
    return data[: limit - 3].decode(errors="ignore") + "…"


@contextmanager
def translated(
    cause: type[Exception],
    kind: type[CountersignError],
    *,
    about: str = "",
    reason: str = "",
    help: str = "",  # noqa: A002  the field's word
) -> Iterator[None]:
    """What raises ``cause`` inside is ``kind`` to whoever asked: its message after ``about``, its traceback gone."""
    try:
        yield
    except cause as error:
        raise kind(f"{about}: {error}" if about else str(error), reason=reason, help=help) from None


_BY_CODE: dict[int, type[CountersignError]] = {
    kind.code: kind
    for kind in (
        InvalidArgument,
        NotFound,
        AlreadyExists,
        FailedPrecondition,
        ResourceExhausted,
        DeadlineExceeded,
        Cancelled,
        Unavailable,
        DataLoss,
        Unimplemented,
        Internal,
    )
}
