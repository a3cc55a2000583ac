"""What the client hands out: the events of an answer, and what a deployment serves, as plain typed values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from countersign.services.runtime.errors import DataLoss
from countersign.v1 import router_pb2, sampling_pb2


class TokenSource(StrEnum):
    """Who had a token first. Every token is the target's own sample; the draft only had some of them before."""

    TARGET = "target"
    DRAFT = "draft"
    UNKNOWN = "unknown"


class FinishReason(StrEnum):
    """Why an answer ended."""

    STOP = "stop"
    LENGTH = "length"
    DEADLINE = "deadline"
    CANCELLED = "cancelled"
    ERROR = "error"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Token:
    """One committed token; ``text`` is what it completes, often empty inside a character or a stop string."""

    id: int
    source: TokenSource
    text: str


@dataclass(frozen=True, slots=True)
class Usage:
    """What an answer used. ``drafted_tokens`` were proposed, ``accepted_tokens`` of them countersigned."""

    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_prompt_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    target_passes: int = 0


@dataclass(frozen=True, slots=True)
class Accepted:
    """The request is in the log. ``seed`` is the one it was sent with, drawn by the client if the caller gave none.

    It is None for greedy requests without a seed, and for requests that were only resumed.
    """

    request_id: str
    model: str
    prompt_tokens: int
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Tokens:
    """Committed tokens, in order; ``position`` output tokens came before them."""

    position: int
    tokens: tuple[Token, ...]

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)


@dataclass(frozen=True, slots=True)
class Hidden:
    """So many committed tokens, the model's reasoning, that are not shown; ``position`` output tokens came before."""

    position: int
    count: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The answer is final. ``receipt`` is as ``countersign audit`` reads it, empty when none could be made."""

    reason: FinishReason
    usage: Usage
    receipt: bytes
    message: str = ""


Event = Accepted | Tokens | Hidden | Finished


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    request_id: str
    text: str
    tokens: tuple[Token, ...]
    finish: FinishReason
    usage: Usage
    receipt: bytes
    seed: int | None
    message: str = ""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model of a live target. Digests are SHA-256, ``receipt_key`` is Ed25519; its target keeps ``cache_tokens``."""

    name: str
    weights_sha256: bytes
    tokenizer_sha256: bytes
    config_sha256: bytes
    context_length: int
    vocabulary_size: int
    dtype: str
    receipt_key: bytes
    drafting: bool
    cache_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Info:
    """What a deployment serves."""

    version: str
    models: tuple[ModelInfo, ...]


_SOURCES = {
    router_pb2.TOKEN_SOURCE_TARGET: TokenSource.TARGET,
    router_pb2.TOKEN_SOURCE_DRAFT: TokenSource.DRAFT,
}
_REASONS = {
    sampling_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    sampling_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    sampling_pb2.FINISH_REASON_DEADLINE: FinishReason.DEADLINE,
    sampling_pb2.FINISH_REASON_CANCELLED: FinishReason.CANCELLED,
    sampling_pb2.FINISH_REASON_ERROR: FinishReason.ERROR,
}


def event_from_wire(message: router_pb2.StreamEvent, seed: int | None = None) -> Event:
    """The event that a message carries; ``seed`` is noted in ``Accepted``.

    Raises:
        DataLoss: reason EMPTY_EVENT, the message carries none that this release knows.

    """
    match message.WhichOneof("event"):
        case "accepted":
            accepted = message.accepted
            return Accepted(accepted.request_id, accepted.model, accepted.prompt_tokens, seed)
        case "tokens":
            return Tokens(message.tokens.position, tuple(map(_token, message.tokens.tokens)))
        case "hidden":
            return Hidden(message.hidden.position, message.hidden.tokens)
        case "finished":
            finished = message.finished
            return Finished(
                reason_from_wire(finished.reason), _usage(finished.usage), finished.receipt, finished.message
            )
        case _:
            raise DataLoss("the router sent an event of a kind that this release does not know", reason="EMPTY_EVENT")


def reason_from_wire(reason: sampling_pb2.FinishReason.ValueType) -> FinishReason:
    return _REASONS.get(reason, FinishReason.UNKNOWN)


def info_from_wire(message: router_pb2.GetInfoResponse) -> Info:
    return Info(message.version, tuple(map(_model, message.models)))


def _token(message: router_pb2.Token) -> Token:
    return Token(message.id, _SOURCES.get(message.source, TokenSource.UNKNOWN), message.text)


def _usage(message: sampling_pb2.Usage) -> Usage:
    return Usage(
        prompt_tokens=message.prompt_tokens,
        output_tokens=message.output_tokens,
        cached_prompt_tokens=message.cached_prompt_tokens,
        drafted_tokens=message.drafted_tokens,
        accepted_tokens=message.accepted_tokens,
        target_passes=message.target_passes,
    )


def _model(message: router_pb2.ModelInfo) -> ModelInfo:
    return ModelInfo(
        name=message.name,
        weights_sha256=message.weights_sha256,
        tokenizer_sha256=message.tokenizer_sha256,
        config_sha256=message.config_sha256,
        context_length=message.context_length,
        vocabulary_size=message.vocabulary_size,
        dtype=message.dtype,
        receipt_key=message.receipt_key,
        drafting=message.drafting,
        cache_tokens=message.cache_tokens,
    )
