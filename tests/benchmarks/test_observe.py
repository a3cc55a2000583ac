"""``countersign bench observe`` measures what it says: while telemetry is off, there is none."""

from __future__ import annotations

import asyncio
from typing import Any

from scraping import scraped

from countersign.cli import bench
from countersign.client import Client
from countersign.services.runtime.bus import Bus
from countersign.services.runtime.registry import Registry
from countersign.services.runtime.telemetry.kept import FOLDER, KeptSpan, read_spans

OBSERVE: Any = bench.load("observe")


async def test_a_stack_makes_no_spans_and_counts_nothing_until_it_is_switched_on() -> None:
    spans, counted = list[list[KeptSpan]](), list[float]()
    async with (
        OBSERVE.staged() as stage,
        Client(stage.stack.router_address) as client,
        await Bus.connect(stage.stack.nats_url, "test") as bus,
        Registry(bus) as registry,
    ):
        for on in (False, True, False):
            await stage.switch(on)
            await client.complete("def f(", max_tokens=8, ignore_eos=True)
            await asyncio.sleep(2 * OBSERVE.SETTLE_S)
            spans.append(list(read_spans(stage.stack.data_dir / FOLDER)))
            told = await scraped(registry, "target", "countersign_target_tokens_total")
            counted.append(sum(told.values()))
    assert [len(each) for each in spans] == [0, len(spans[1]), len(spans[1])]
    assert {"admit", "answer", "stream", "tokenizer/Encode"} <= {kept.span.name for kept in spans[1]}
    assert counted[0] == 0.0 < counted[1] == counted[2]
