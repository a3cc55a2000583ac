"""The tokenizer service: text to token ids and back. Each call stands alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

from google.protobuf.descriptor import ServiceDescriptor

from countersign.services.engine.errors import CheckpointError
from countersign.services.engine.text import Tokenizer
from countersign.services.runtime.errors import FailedPrecondition, InvalidArgument, translated
from countersign.services.runtime.service import Call, Context
from countersign.v1 import tokenizer_pb2
from countersign.v1.registry_pb2 import Instance
from countersign.v1.tokenizer_pb2 import (
    CheckCanonicalRequest,
    CheckCanonicalResponse,
    DecodeRequest,
    DecodeResponse,
    EncodeRequest,
    EncodeResponse,
)

MAX_TEXT_BYTES = 4 * 2**20
MAX_TOKENS = 2**20
# Work on more characters or tokens than this leaves the event loop: it would make other calls wait.
INLINE_SIZE = 2048

_P = ParamSpec("_P")
_R = TypeVar("_R")


class TokenizerService:
    """Handlers over one ``Tokenizer``."""

    descriptor: ServiceDescriptor = tokenizer_pb2.DESCRIPTOR.services_by_name["TokenizerService"]

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def close(self) -> None:
        """Nothing is held."""

    def describe(self, instance: Instance) -> None:
        """Nothing to add: no request stays here."""

    async def Encode(self, request: EncodeRequest, _call: Call) -> EncodeResponse:
        """Raises InvalidArgument (EMPTY_PROMPT, TEXT_TOO_LONG)."""
        if not request.text:
            raise InvalidArgument("the text is empty", reason="EMPTY_PROMPT", help="send some text to continue")
        size = len(request.text.encode())
        if size > MAX_TEXT_BYTES:
            raise InvalidArgument(
                f"the text has {size} bytes, more than the {MAX_TEXT_BYTES} that one call takes",
                reason="TEXT_TOO_LONG",
                help="shorten it",
            )
        ids = await _run(size, self._tokenizer.encode, request.text, request.plain)
        return EncodeResponse(token_ids=ids)

    async def Decode(self, request: DecodeRequest, _call: Call) -> DecodeResponse:
        """Raises InvalidArgument (TOO_MANY_TOKENS, TOKEN_OUT_OF_VOCABULARY)."""
        self._check("context_ids", request.context_ids)
        self._check("token_ids", request.token_ids)
        size = len(request.context_ids) + len(request.token_ids)
        decode = self._tokenizer.decode_pieces
        return DecodeResponse(pieces=await _run(size, decode, request.context_ids, request.token_ids, request.final))

    async def CheckCanonical(self, request: CheckCanonicalRequest, _call: Call) -> CheckCanonicalResponse:
        """Raises InvalidArgument (TOO_MANY_TOKENS, TOKEN_OUT_OF_VOCABULARY)."""
        self._check("token_ids", request.token_ids)
        ids = await _run(len(request.token_ids), self._tokenizer.canonical, request.token_ids)
        return CheckCanonicalResponse(canonical=ids == list(request.token_ids), canonical_ids=ids)

    def _check(self, name: str, ids: Sequence[int]) -> None:
        if len(ids) > MAX_TOKENS:
            raise InvalidArgument(
                f"{name} has {len(ids)} tokens, more than the {MAX_TOKENS} that one call takes",
                reason="TOO_MANY_TOKENS",
                help="send fewer",
            )
        size = self._tokenizer.vocabulary_size
        if ids and max(ids) >= size:
            raise InvalidArgument(
                f"{name} holds {max(ids)}, which is not in the vocabulary",
                reason="TOKEN_OUT_OF_VOCABULARY",
                help=f"ids go up to {size - 1}",
            )


async def _run(size: int, function: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
    if size <= INLINE_SIZE:
        return function(*args, **kwargs)
    return await asyncio.to_thread(function, *args, **kwargs)


async def create(context: Context) -> TokenizerService:
    """Load the tokenizer of ``tokenizer.model``; raises FailedPrecondition(BAD_CHECKPOINT) when it has none."""
    with translated(
        CheckpointError,
        FailedPrecondition,
        reason="BAD_CHECKPOINT",
        help="set tokenizer.model to a Hugging Face folder",
    ):
        return TokenizerService(await asyncio.to_thread(Tokenizer, context.config.tokenizer.model))
