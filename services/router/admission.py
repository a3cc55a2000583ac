"""What the front door lets in: every rule on a request, in order, before anything is written.

1. the request id, if given, is 1 to 64 of A-Z a-z 0-9 _ -
2. the model, if named, is served
3. there is a prompt, it is not empty, and its text has at most 768 KiB
4. temperature is finite and not negative; top_p is in (0, 1]; a seed is given when temperature > 0
5. max_tokens is at least 1
6. stop strings are 1 to 16, none empty, none over 256 bytes; stop token ids are at most 64 and in the vocabulary
7. prompt token ids are in the vocabulary, and prompt and max_tokens together fit the context
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from countersign.services.runtime.errors import InvalidArgument, NotFound, Unavailable
from countersign.v1.router_pb2 import GenerateRequest, ModelInfo
from countersign.v1.sampling_pb2 import SamplingParams

REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
TENANT = re.compile(r"[A-Za-z0-9_.-]{1,64}")
MAX_STOPS = 16
# The tokenizer is asked over the bus, whose messages hold 1 MiB.
MAX_TEXT_BYTES = 768 * 1024
MAX_STOP_BYTES = 256
MAX_STOP_TOKENS = 64


def check_request_id(request_id: str) -> None:
    """Raises InvalidArgument(BAD_REQUEST_ID)."""
    if not REQUEST_ID.fullmatch(request_id):
        raise InvalidArgument(
            f"request_id {request_id[:80]!r} is not a valid name",
            reason="BAD_REQUEST_ID",
            help="use 1 to 64 of A-Z a-z 0-9 _ -, or leave it empty",
        )


def choose_model(name: str, models: Sequence[ModelInfo]) -> ModelInfo:
    """The model asked for, or the only one. Raises NotFound(UNKNOWN_MODEL), Unavailable(NO_TARGET), InvalidArgument."""
    if not models:
        raise Unavailable("no target is alive", reason="NO_TARGET", help="wait for one to start, then try again")
    names = sorted({model.name for model in models})
    if not name and len(names) > 1:
        raise InvalidArgument(
            f"the request names no model and this deployment serves {len(names)}",
            reason="MODEL_NEEDED",
            help="name one of: " + ", ".join(names),
        )
    for model in models:
        if name in ("", model.name):
            return model
    raise NotFound(
        f"model {name[:80]!r} is not served here", reason="UNKNOWN_MODEL", help="it serves: " + ", ".join(names)
    )


def check(request: GenerateRequest, model: ModelInfo) -> None:
    """Rules 1 and 3 to 6, which need no tokenizer. Raises InvalidArgument with a reason for each."""
    if request.request_id:
        check_request_id(request.request_id)
    if request.tenant and not TENANT.fullmatch(request.tenant):
        raise InvalidArgument(
            f"tenant {request.tenant[:80]!r} is not a valid name",
            reason="BAD_TENANT",
            help="use 1 to 64 of A-Z a-z 0-9 _ . -",
        )
    if not request.token_ids.ids:
        check_text(request.text, f"the context of {model.name} holds {model.context_length} tokens")
    _check_sampling(request.sampling)
    _check_stops(request.sampling, model)


def check_text(text: str, limit: str = "shorten it") -> None:
    """Rule 3 for text. Raises InvalidArgument(EMPTY_PROMPT or PROMPT_TOO_LONG)."""
    if not text:
        raise InvalidArgument("the prompt is empty", reason="EMPTY_PROMPT", help="send some text to continue")
    size = len(text.encode())
    if size > MAX_TEXT_BYTES:
        raise InvalidArgument(
            f"the prompt has {size} bytes, one text may have {MAX_TEXT_BYTES}", reason="PROMPT_TOO_LONG", help=limit
        )


def check_length(prompt_tokens: Sequence[int], params: SamplingParams, model: ModelInfo) -> None:
    """Rule 7. Raises InvalidArgument(TOKEN_OUT_OF_VOCABULARY, PROMPT_TOO_LONG or MAX_TOKENS_TOO_LARGE)."""
    outside = next((token for token in prompt_tokens if token >= model.vocabulary_size), None)
    if outside is not None:
        raise InvalidArgument(
            f"prompt token id {outside} is not in the vocabulary of {model.name}",
            reason="TOKEN_OUT_OF_VOCABULARY",
            help=f"ids go up to {model.vocabulary_size - 1}",
        )
    room = model.context_length - len(prompt_tokens)
    if room < 1:
        raise InvalidArgument(
            f"the prompt has {len(prompt_tokens)} tokens, the context of {model.name} holds {model.context_length}",
            reason="PROMPT_TOO_LONG",
            help=f"shorten the prompt to at most {model.context_length - 1} tokens",
        )
    if params.max_tokens > room:
        raise InvalidArgument(
            f"max_tokens {params.max_tokens} and the prompt's {len(prompt_tokens)} tokens exceed the context of "
            f"{model.context_length}",
            reason="MAX_TOKENS_TOO_LARGE",
            help=f"ask for at most {room} tokens",
        )


def _check_sampling(params: SamplingParams) -> None:
    if not math.isfinite(params.temperature) or params.temperature < 0:
        raise InvalidArgument(
            f"temperature {params.temperature} is not a number of at least 0",
            reason="BAD_TEMPERATURE",
            help="use 0 for greedy, or a value such as 0.8",
        )
    if params.HasField("top_p") and not 0 < params.top_p <= 1:
        raise InvalidArgument(
            f"top_p {params.top_p} is not above 0 and at most 1", reason="BAD_TOP_P", help="use 1 to keep every token"
        )
    if params.temperature > 0 and not params.HasField("seed"):
        raise InvalidArgument(
            "temperature is above 0 and no seed is given",
            reason="SEED_NEEDED",
            help="choose one: a provider that chose the seed could pick among answers, so this one never does",
        )
    if params.max_tokens < 1:
        raise InvalidArgument("max_tokens is 0", reason="BAD_MAX_TOKENS", help="ask for at least 1 token")


def _check_stops(params: SamplingParams, model: ModelInfo) -> None:
    if len(params.stop) > MAX_STOPS or any(not 0 < len(s.encode()) <= MAX_STOP_BYTES for s in params.stop):
        raise InvalidArgument(
            "a stop string is empty or too long, or there are too many",
            reason="BAD_STOP",
            help=f"give at most {MAX_STOPS} strings of 1 to {MAX_STOP_BYTES} bytes",
        )
    ids = params.stop_token_ids
    if len(ids) > MAX_STOP_TOKENS or any(token >= model.vocabulary_size for token in ids):
        raise InvalidArgument(
            "a stop token id is outside the vocabulary, or there are too many",
            reason="BAD_STOP",
            help=f"give at most {MAX_STOP_TOKENS} ids below {model.vocabulary_size}",
        )
