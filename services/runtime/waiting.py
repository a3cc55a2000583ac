"""Waiting for an event, and no longer than for some time."""

from __future__ import annotations

import asyncio


async def happened(event: asyncio.Event, seconds: float | None) -> bool:
    """Whether the event comes within so many seconds; None: however long it takes.

    Not by ``asyncio.wait_for``: before Python 3.12 that loses a cancellation which comes with the event, so that a task
    that was told to stop goes on for ever.
    """
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True
