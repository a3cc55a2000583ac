"""Whole stacks that cheat on purpose: their receipts are signed and well formed, and their tokens give them away."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from stacks import Running, running_stack

from countersign.cli.prompts import heldout_prompts
from countersign.client import Client
from countersign.verify.audit import AuditReport, audit
from countersign.verify.difr import load_reference
from countersign.verify.keys import load_public

ANSWERS, TOKENS = 3, 200


async def audits(stack: Running, demo_models: dict[str, Path]) -> list[AuditReport]:
    """Of a few drawn answers, with the reference weights."""
    key = load_public(stack.data_dir / "keys" / "receipts.pub")
    reference = partial(load_reference, demo_models["target"])
    reports = []
    async with Client(stack.router) as client:
        for number, prompt in enumerate(heldout_prompts(demo_models["target"].parent, ANSWERS)):
            answer = await client.complete(
                prompt.text, max_tokens=TOKENS, temperature=1.0, top_k=50, top_p=0.95, seed=number, ignore_eos=True
            )
            reports.append(audit(answer.receipt, trusted_keys=[key], reference=reference))
    return reports


async def test_the_answers_of_an_honest_stack_pass(stack: Running, demo_models: dict[str, Path]) -> None:
    assert [report.verdict for report in await audits(stack, demo_models)] == ["pass"] * ANSWERS


@pytest.mark.parametrize("fault", ["int4", "temperature-1.1", "draft-10", "truncated"])
async def test_the_audit_refuses_the_answers_of_a_stack_that_cheats_at_their_tokens(
    tmp_path: Path, demo_models: dict[str, Path], fault: str
) -> None:
    with running_stack(tmp_path / "data", f"target.fault={fault}") as stack:
        reports = await audits(stack, demo_models)
    for report in reports:
        assert [(level.level, level.outcome) for level in report.levels[:2]] == [("form", "pass"), ("count", "pass")]
        assert report.receipt is not None
        assert report.receipt.receipt.evidence.kv_policy == "exact"
    assert [report.levels[2].outcome for report in reports] == ["fail"] * ANSWERS
    assert "CHEAT on purpose" in (tmp_path / "data.up.log").read_text()
    logs = "".join(file.read_text() for file in (stack.data_dir / "logs").glob("target*"))
    assert logs.count("this answer is dishonest on purpose") >= ANSWERS
