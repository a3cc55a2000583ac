"""Prompts that a target computes for others: nothing is sampled of them, their blocks go to the store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from countersign.services.engine.generation import Generation
from countersign.services.engine.pages import PAGE_TOKENS
from countersign.services.runtime.errors import CountersignError, Internal, Unavailable
from countersign.services.runtime.telemetry.context import current_span

# Chunks whose blocks may be on their way to the store while the next is computed.
MAX_CHUNKS = 2


class Put(Protocol):
    """Blocks on their way to the store; leaving it seals those that are whole."""

    async def part(self, layer: int, slices: Sequence[bytes]) -> None:
        """The next layer of each."""


class Store(Protocol):
    """What a prefill needs of the store."""

    @property
    def resting(self) -> bool:
        """It did not answer, and is left alone for a while."""

    def putting(
        self, request_id: str, keys: Sequence[bytes], first: int, count: int
    ) -> AbstractAsyncContextManager[Put]:
        """Put so many blocks of a chain, layer by layer; whatever goes wrong costs speed only."""


@dataclass(frozen=True, slots=True)
class _Part:
    """One layer of the blocks ``first``, ``first`` + 1, ..."""

    layer: int
    first: int
    slices: Sequence[bytes]


class PrefillJob:
    """The full blocks of one prompt: those that the store lacks are computed by the engine and put, chunk by chunk.

    ``generation`` is what the engine knows of it, of as many tokens as its keys stand for. ``loading`` while its
    prefix comes from the store. ``offered`` and ``found`` count blocks. :meth:`filled` alone is called in the model's
    thread.
    """

    def __init__(self, generation: Generation, layers: int) -> None:
        self.generation = generation
        self.loading = False
        self.offered = self.found = 0
        self.span = current_span()  # of the call that asks for it
        self._layers = layers
        self._parts: asyncio.Queue[_Part] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        # So many blocks are in the store or on their way there.
        self._told = 0
        generation.filled = self.filled

    @property
    def prompt_tokens(self) -> int:
        return self.generation.prompt_tokens

    @property
    def waits(self) -> bool:
        """No pass may include it now."""
        return self.loading or self._parts.qsize() >= MAX_CHUNKS * self._layers

    def lacking(self, held: int) -> range:
        """Of the ``held`` first blocks, those that the store was not offered yet."""
        return range(self._told, held)

    def filled(self, layer: int, first: int, slices: Sequence[bytes]) -> None:
        """A pass has computed this layer of these blocks; those that were told of before a preemption are left out."""
        known = max(self._told - first, 0)
        if layer == self._layers - 1:
            self._told = max(self._told, first + len(slices))
        if known < len(slices):
            part = _Part(layer, first + known, slices[known:])
            self._loop.call_soon_threadsafe(self._parts.put_nowait, part)

    def loaded(self, lacking: Sequence[bytes], held: int, found: int) -> None:
        """It begins with ``held`` blocks that were here, of which the store may lack these, then ``found`` from it."""
        size = len(lacking[0]) // self._layers if lacking else 0
        for layer in range(self._layers):
            slices = [block[layer * size : (layer + 1) * size] for block in lacking]
            self._parts.put_nowait(_Part(layer, self._told, slices))
        self._told = max(self._told, held)
        self.found += max(held + found - self._told, 0)
        self._told = max(self._told, held + found)

    def end(self, error: CountersignError) -> None:
        """Its blocks will not be computed."""
        if not self._ended.done():
            self._ended.set_exception(error)

    async def run(self, store: Store, wake: Callable[[], None]) -> None:
        """Put the blocks as they come, until all are in the store. ``wake``: it may take part in passes again.

        Raises:
            Unavailable: reason NO_STORE: it takes none.
            CountersignError: what :meth:`end` was given.
        """
        putting = asyncio.ensure_future(self._put_all(store, wake))
        try:
            await asyncio.wait({putting, self._ended}, return_when=asyncio.FIRST_COMPLETED)
            await (putting if putting.done() else self._ended)
        finally:
            putting.cancel()
            self._ended.cancel()
            await asyncio.gather(putting, self._ended, return_exceptions=True)

    async def _put_all(self, store: Store, wake: Callable[[], None]) -> None:
        while self.offered + self.found < len(self.generation.keys):
            part = await self._parts.get()
            first, count = part.first, len(part.slices)
            async with store.putting(self.generation.id, self.generation.keys, first, count) as put:
                await put.part(0, part.slices)
                for layer in range(1, self._layers):
                    part = await self._parts.get()
                    if (part.layer, part.first) != (layer, first):
                        raise self._broken(first)
                    wake()
                    await put.part(layer, part.slices)
            if store.resting:
                raise no_store()
            self.offered += count

    def _broken(self, first: int) -> Internal:
        """A pass withholds the last layer of blocks whose numbers are not finite."""
        message = f"the numbers of the prompt's tokens {PAGE_TOKENS * first} and on are not finite"
        return Internal(message, reason="NOT_COMPUTED")


def no_store() -> Unavailable:
    """What a prefill without a store ends with."""
    return Unavailable(
        "the kv store takes no blocks", reason="NO_STORE", help="whoever answers the request computes its prompt"
    )


def prefill_id(request_id: str) -> str:
    """The engine's name of a prefill, beside which the request itself may be here; no request has it."""
    return f"{request_id}.prefill"
