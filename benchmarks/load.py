"""Sixteen clients for a minute: does every request end with all its tokens and one valid receipt, or a typed error?"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from countersign.cli.bench import Row, stack_config
from countersign.cli.prompts import heldout_prompts
from countersign.client import Client
from countersign.services.runtime.errors import CountersignError
from countersign.services.runtime.supervisor import Supervisor
from countersign.verify.audit import audit
from countersign.verify.keys import load_public

CLIENTS = 16
TOKENS = 64
HANG_S = 120.0


@dataclass(slots=True)
class Tally:
    """What became of the requests; latencies in seconds."""

    asked: int = 0
    whole: int = 0
    bad: int = 0
    tokens: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)


async def run(quick: bool) -> list[Row]:
    """Whole answers, refusals and hangs over 60 s (quick: 10 s)."""
    seconds = 10.0 if quick else 60.0
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder:
        config = stack_config(folder)
        prompts = [prompt.text for prompt in heldout_prompts(config.target.model.parent, 100)]
        async with Supervisor(config) as stack:
            key = load_public(config.data_dir / "keys" / "receipts.pub")
            end = time.monotonic() + seconds
            clients = [_client(stack.router_address, prompts, key, end, i, tally) for i in range(CLIENTS)]
            async with asyncio.timeout(seconds + HANG_S):
                await asyncio.gather(*clients)
    n = tally.asked
    settled = tally.whole + sum(tally.refusals.values())
    return [
        Row(
            "load",
            f"{CLIENTS} clients",
            "whole with a valid receipt, or a typed error",
            settled / n,
            "share",
            n,
            "1",
            settled == n,
        ),
        Row("load", f"{CLIENTS} clients", "answers whole with a valid receipt", tally.whole, "answers", n),
        Row(
            "load",
            f"{CLIENTS} clients",
            "answers short or with a bad receipt",
            tally.bad,
            "answers",
            n,
            "0",
            tally.bad == 0,
        ),
        Row("load", f"{CLIENTS} clients", "typed errors", sum(tally.refusals.values()), "answers", n),
        Row("load", f"{CLIENTS} clients", "throughput", tally.tokens / seconds, "tokens/s", n),
        Row("load", f"{CLIENTS} clients", "latency of an answer, median", statistics.median(tally.latencies), "s", n),
    ]


async def _client(
    router: str, prompts: list[str], key: Ed25519PublicKey, end: float, number: int, tally: Tally
) -> None:
    async with Client(router) as client:
        turn = 0
        while time.monotonic() < end:
            turn += 1
            tally.asked += 1
            began = time.monotonic()
            try:
                answer = await client.complete(
                    prompts[(number * 13 + turn) % len(prompts)],
                    max_tokens=TOKENS,
                    temperature=0.8 * (turn % 2),
                    seed=turn,
                    ignore_eos=True,
                )
            except CountersignError as error:
                tally.refusals[error.reason] += 1
                continue
            tally.latencies.append(time.monotonic() - began)
            tally.tokens += len(answer.tokens)
            report = audit(answer.receipt, trusted_keys=[key], reference=None, levels=["form", "count"])
            if len(answer.tokens) == TOKENS and report.verdict == "pass":
                tally.whole += 1
            else:
                tally.bad += 1
