"""Work that nobody waits for; it is still held, so that it ends with its service and not with the garbage collector."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextvars import Context


class Background:
    """Tasks that run beside whoever started them."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[object, object, None], context: Context | None = None) -> None:
        """Starts it, in a copy of the current context or in ``context``."""
        task = asyncio.create_task(work, context=context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def drain(self) -> None:
        """Wait until all is done."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def cancel(self) -> None:
        """End all of it now."""
        for task in self._tasks:
            task.cancel()
        await self.drain()
