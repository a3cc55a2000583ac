"""The lines of a batch file in OpenAI's format, and the lines of its output.

Input, one JSON object a line: ``custom_id``, ``method`` "POST", ``url`` "/v1/completions", and ``body``, of which
:class:`Body` says what it may hold; a field that this deployment cannot honour is refused by name, never ignored.
Output: ``id``, ``custom_id``, ``response`` and ``error``, of which one is null.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

import msgspec

from countersign.client import Answer, GenerateOptions
from countersign.services.runtime.errors import CountersignError, InvalidArgument, Unimplemented

COMPLETIONS = "/v1/completions"
_CHAT = "/v1/chat/completions"

_T = TypeVar("_T")


TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]


class Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A completion's parameters, with OpenAI's defaults. ``top_k`` and ``ignore_eos`` are ours.

    Of the fields in the last paragraph only the values that change nothing are taken.
    """

    prompt: str | list[TokenId]
    model: str = ""
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: str | list[str] | None = None
    user: str = ""
    top_k: int = 0
    ignore_eos: bool = False

    n: Literal[1] = 1
    best_of: Literal[1] = 1
    echo: Literal[False] = False
    stream: Literal[False] = False
    logprobs: None = None
    logit_bias: dict[str, float] | None = None
    suffix: None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        for name in ("logit_bias", "presence_penalty", "frequency_penalty"):
            if getattr(self, name):
                raise ValueError(f"`{name}` is not served")


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    custom_id: str
    method: Literal["POST"]
    url: str
    body: msgspec.Raw


@dataclass(frozen=True, slots=True)
class Line:
    """A line that can be asked. ``number`` counts from 1."""

    number: int
    custom_id: str
    body: Body


@dataclass(frozen=True, slots=True)
class Refused:
    """A line that cannot; ``custom_id`` is empty where the line has none that can be read."""

    number: int
    custom_id: str
    error: CountersignError


def read_lines(content: bytes) -> list[Line | Refused]:
    """One for each line that is not blank."""
    taken: dict[str, int] = {}
    return [_read(number, text, taken) for number, text in enumerate(content.splitlines(), start=1) if text.strip()]


def _read(number: int, text: bytes, taken: dict[str, int]) -> Line | Refused:
    custom_id = ""
    try:
        line = _decoded(text, _Line, number)
        custom_id = line.custom_id
        if not custom_id:
            raise InvalidArgument(f"line {number} has an empty custom_id", reason="NO_CUSTOM_ID", help="give it a name")
        first = taken.setdefault(custom_id, number)
        if first != number:
            raise InvalidArgument(
                f"line {number} has the custom_id of line {first}: {custom_id[:80]!r}",
                reason="DUPLICATE_CUSTOM_ID",
                help="give each line its own",
            )
        return Line(number, custom_id, _body(line, number))
    except CountersignError as error:
        return Refused(number, custom_id, error)


def _body(line: _Line, number: int) -> Body:
    if line.url == _CHAT:
        raise Unimplemented(
            f"line {number} asks for a chat: this router applies no chat template",
            reason="NO_CHAT",
            help=f"write the conversation as one prompt for {COMPLETIONS}",
        )
    if line.url != COMPLETIONS:
        raise InvalidArgument(
            f"line {number} has the url {line.url[:80]!r}", reason="UNKNOWN_URL", help=f"use {COMPLETIONS}"
        )
    return _decoded(bytes(line.body), Body, number)


def _decoded(text: bytes, kind: type[_T], number: int) -> _T:
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.ValidationError as error:
        raise InvalidArgument(
            f"line {number}: {error}", reason="BAD_LINE", help="see the OpenAI batch format"
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidArgument(
            f"line {number} is not a JSON object: {error}", reason="BAD_JSON", help="write one object a line"
        ) from None


def options_of(line: Line, salt: str) -> GenerateOptions:
    """How to ask for it. A seed that the line leaves out follows from ``salt`` and its id, so that a second try gives
    the same tokens.
    """
    body = line.body
    seed = body.seed
    if seed is None and body.temperature > 0:
        seed = int.from_bytes(_digest(f"{salt}\0{line.custom_id}")[:8], "big")
    return {
        "model": body.model,
        "max_tokens": body.max_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "seed": seed,
        "stop": () if body.stop is None else body.stop,
        "ignore_eos": body.ignore_eos,
    }


def answered(line: Line, answer: Answer, model: str, receipt: str, clock: Callable[[], float] = time.time) -> str:
    """The output line of an answer; ``receipt``: the file's name."""
    usage = answer.usage
    body = {
        "id": f"cmpl-{answer.request_id}",
        "object": "text_completion",
        "created": int(clock()),
        "model": model,
        "choices": [{"index": 0, "text": answer.text, "logprobs": None, "finish_reason": answer.finish}],
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.output_tokens,
            "total_tokens": usage.prompt_tokens + usage.output_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_prompt_tokens},
        },
        "countersign": {"receipt": receipt, "seed": answer.seed},
    }
    response = {"status_code": 200, "request_id": answer.request_id, "body": body}
    return _line(line.custom_id, response=response, error=None)


def failed(custom_id: str, error: CountersignError) -> str:
    """The line of an error."""
    said = {"code": error.reason, "message": error.message, "help": error.help}
    return _line(custom_id, response=None, error=said)


def _line(custom_id: str, *, response: object, error: object) -> str:
    record = {
        "id": f"batch_req_{_digest(custom_id).hex()[:24]}",
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }
    return json.dumps(record, ensure_ascii=False, separators=(",", ":"))


def _digest(text: str) -> bytes:
    return hashlib.sha256(b"countersign/batch/v1\0" + text.encode()).digest()


def finished_ids(output: bytes) -> Sequence[str]:
    """The custom_ids of whole output lines. Raises ValueError where a line is none of ours."""
    return [json.loads(line)["custom_id"] for line in output.splitlines()]
