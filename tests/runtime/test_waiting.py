"""Waiting for events."""

from __future__ import annotations

import asyncio

import pytest

from countersign.services.runtime.waiting import happened

END_S = 30.0


async def test_it_tells_an_event_from_the_lack_of_one() -> None:
    event = asyncio.Event()
    assert not await happened(event, 0.01)
    asyncio.get_running_loop().call_soon(event.set)
    assert await happened(event, END_S)
    assert await happened(event, 0), "it is there already"
    assert await happened(event, None)


@pytest.mark.parametrize("turns", range(6))
async def test_a_stop_that_comes_with_the_event_is_not_lost(turns: int) -> None:
    event = asyncio.Event()
    waiting = asyncio.create_task(happened(event, END_S))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    event.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    if waiting.cancel():
        with pytest.raises(asyncio.CancelledError):
            await waiting
