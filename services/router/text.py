"""The tokenizer service, asked with patience: it holds no state, and one that died is back within seconds."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TypeVar

from google.protobuf.message import Message

from countersign.services.runtime.bus import Bus
from countersign.services.runtime.errors import DeadlineExceeded, Unavailable
from countersign.v1.tokenizer_pb2 import DecodeRequest, DecodeResponse, EncodeRequest, EncodeResponse

M = TypeVar("M", bound=Message)

TRY_S = 2.0
PATIENCE_S = 15.0
PAUSE_S = 0.1


class Text:
    """Text to tokens and back, over the bus."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def encode(self, text: str) -> Sequence[int]:
        """Its token ids."""
        return (await self._call("Encode", EncodeRequest(text=text), EncodeResponse, traced=True)).token_ids

    async def decode(self, context: Sequence[int], token_ids: Sequence[int], *, final: bool) -> Sequence[str]:
        """A piece for each token whose text is settled; see ``tokenizer.proto``."""
        request = DecodeRequest(context_ids=context, token_ids=token_ids, final=final)
        return (await self._call("Decode", request, DecodeResponse, traced=False)).pieces

    async def _call(self, method: str, request: Message, reply: type[M], *, traced: bool) -> M:
        """Raises what the last try raised, after ``PATIENCE_S``."""
        loop = asyncio.get_running_loop()
        give_up = loop.time() + PATIENCE_S
        while True:
            try:
                return await self._bus.call("tokenizer", method, request, reply, timeout=TRY_S, traced=traced)
            except (Unavailable, DeadlineExceeded):
                if loop.time() > give_up:
                    raise
            await asyncio.sleep(PAUSE_S)
