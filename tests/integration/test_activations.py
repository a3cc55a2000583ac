"""Activation fingerprints of a real stack: committed with the tokens, signed, opened afterwards, and audited."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest
from stacks import Running, running_stack

from countersign.client import Answer, Client
from countersign.services.runtime.errors import FailedPrecondition, InvalidArgument, NotFound
from countersign.verify.audit import AuditReport, Level, audit
from countersign.verify.difr import load_reference
from countersign.verify.fingerprints import Challenge, decode
from countersign.verify.keys import load_public
from countersign.verify.receipt import parse

DEMO = Path(__file__).resolve().parents[2] / "infra" / "models" / "demo-target"
PROMPT = "class Queue:\n    def put(self, item):\n        self.items.append(item)\n\n    def get(self):\n"
DRAWN = (0, 3, 4, 9, 17, 21, 22, 30, 39)


async def ask(client: Client, **more: object) -> Answer:
    return await client.complete(PROMPT, max_tokens=40, temperature=0.8, seed=3, ignore_eos=True, **more)  # type: ignore[arg-type]


def audited(stack: Running, answer: Answer, challenge: Challenge, *levels: Level) -> AuditReport:
    return audit(
        answer.receipt,
        levels=levels,
        trusted_keys=[load_public(stack.data_dir / "keys" / "receipts.pub")],
        reference=lambda dtype: load_reference(DEMO, dtype),
        challenge=challenge,
    )


async def test_fingerprints_of_an_answer_with_drafts_and_cached_prefix_are_the_references(stack: Running) -> None:
    async with Client(stack.router) as client:
        await ask(client)
        answer = await ask(client)
        opened = await client.activations(answer.request_id, DRAWN)
    assert answer.usage.accepted_tokens > 0
    assert answer.usage.cached_prompt_tokens > 0
    signed = parse(answer.receipt).receipt.evidence.activations
    assert signed is not None
    assert (signed.size, signed.count) == (8, 40)
    report = audited(stack, answer, Challenge(DRAWN, opened))
    assert [(part.level, part.outcome) for part in report.levels][2:] == [("tokens", "pass"), ("activations", "pass")]
    assert report.levels[-1].figures["max_distance"] == 0


async def test_whoever_has_fingerprints_of_another_answer_fails(stack: Running) -> None:
    async with Client(stack.router) as client:
        answer, other = await ask(client), await ask(client, request_id="other-activations")
        opened = await client.activations(other.request_id, DRAWN)
    report = audited(stack, answer, Challenge(DRAWN, opened))
    assert (report.verdict, report.levels[-1].level) == ("fail", "activations")


async def test_only_positions_of_a_signed_answer_are_opened(stack: Running) -> None:
    async with Client(stack.router) as client:
        answer = await ask(client)
        assert [each.index for each in decode(await client.activations(answer.request_id, [39])).openings] == [39]
        for positions in ((), (40,), (3, 3), (4, 3)):
            with pytest.raises(InvalidArgument, match="rising positions from 0 to 39"):
                await client.activations(answer.request_id, positions)
        with pytest.raises(NotFound):
            await client.activations("nobody", (0,))
        stream = client.generate(PROMPT, max_tokens=400, ignore_eos=True, request_id="activations-too-early")
        async for _ in stream:
            with pytest.raises(FailedPrecondition, match="has not ended"):
                await client.activations("activations-too-early", (0,))
            break
        await client.cancel("activations-too-early")
        await stream.aclose()


async def test_the_command_line_draws_asks_and_audits(stack: Running, tmp_path: Path) -> None:
    async with Client(stack.router) as client:
        answer = await ask(client)
    file = tmp_path / "answer.receipt"
    file.write_bytes(answer.receipt)
    command = ("audit", str(file), "--level", "activations", "--positions", "12", "--router", stack.router, "--json")
    process = await asyncio.create_subprocess_exec(
        str(Path(sys.executable).parent / "countersign"),
        *command,
        "--data-dir",
        str(stack.data_dir),
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await asyncio.wait_for(process.communicate(), 60)
    report = json.loads(out)
    assert (process.returncode, report["verdict"]) == (0, "pass")
    assert [level["level"] for level in report["levels"]] == ["form", "count", "activations"]
    assert report["levels"][-1]["figures"]["sample_size"] == 12


async def test_a_dishonest_target_is_told_by_two_fingerprints_whatever_its_tokens_are(tmp_path: Path) -> None:
    with running_stack(tmp_path / "data", "target.fault=int8") as running:
        async with Client(running.router) as client:
            answer = await ask(client)
            opened = await client.activations(answer.request_id, (7, 21))
        report = audited(running, answer, Challenge((7, 21), opened), "activations")
    assert [(part.level, part.outcome) for part in report.levels][2:] == [("activations", "fail")]
    assert report.levels[-1].figures["max_distance"] > 1e-3


async def test_a_target_may_make_none(tmp_path: Path) -> None:
    with running_stack(tmp_path / "data", "target.fingerprints=0") as running:
        async with Client(running.router) as client:
            answer = await ask(client)
            with pytest.raises(FailedPrecondition, match="kept no fingerprints"):
                await client.activations(answer.request_id, (0,))
    report = audited(running, answer, Challenge((0,), b""))
    assert report.verdict == "inconclusive"
