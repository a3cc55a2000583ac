"""``countersign demo``: the whole stack on real code, receipts audited, forgeries refused, in under a minute."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from countersign.cli.prompts import Prompt, heldout_prompts
from countersign.cli.render import AnswerPrinter
from countersign.cli.up import printer
from countersign.client import Accepted, Client, Finished, Tokens
from countersign.services.runtime.config import FREE_PORTS, Config, load
from countersign.services.runtime.errors import CountersignError, Internal
from countersign.services.runtime.rpc import Channel
from countersign.services.runtime.supervisor import Supervisor
from countersign.v1.auditor_pb2 import AuditOutcome, AuditRequest, AuditResponse

PROMPTS = 5
MAX_TOKENS = 64
AUDIT_TIMEOUT_S = 60.0
# The first prompts are continued greedily, the others drawn.
TEMPERATURES = (0.0, 0.0, 0.0, 0.8, 0.8)
SEED = 20261120


@dataclass(frozen=True, slots=True)
class Run:
    """One answer of the demo."""

    token_ids: tuple[int, ...]
    finished: Finished


@dataclass(frozen=True, slots=True)
class Summary:
    """What ``--json`` prints (DESIGN.md section 12)."""

    prompts: int
    tokens: int
    tokens_per_pass: float
    accepted: float
    audits_passed: int
    tampered_refused: int
    drafting_off_identical: bool
    seconds: float

    @property
    def good(self) -> bool:
        """Whether everything was as it must be."""
        from countersign.cli.forgery import FORGERIES

        audited = self.audits_passed == self.prompts and self.tampered_refused == len(FORGERIES)
        return audited and self.drafting_off_identical and self.accepted > 0


def demo(
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="One setting, such as draft.tokens=6.", metavar="KEY=VALUE")
    ] = None,
) -> None:
    """Start a stack in a temporary folder, complete five held-out Python files, audit, forge, stop."""
    console = Console(quiet=json_, highlight=False, soft_wrap=True)
    try:
        summary = asyncio.run(_run(console, list(set_ or [])))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except CountersignError as error:
        # The log lay in the folder that is gone by now.
        sys.stderr.write(error.metadata.get("log_tail", ""))
        raise
    except asyncio.CancelledError:
        raise typer.Exit(128 + signal.SIGTERM) from None
    if json_:
        sys.stdout.write(json.dumps(dataclasses.asdict(summary)) + "\n")
    if not summary.good:
        console.print("[red]something was not as it must be[/red]")
        raise typer.Exit(1)


async def _run(console: Console, overrides: Sequence[str]) -> Summary:
    began = time.monotonic()
    # As Ctrl-C does: stop what was started, remove the folder.
    if (task := asyncio.current_task()) is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    with tempfile.TemporaryDirectory(prefix="countersign-demo-") as folder:
        own = [f"data_dir={folder}", *FREE_PORTS]
        config = load(None, os.environ, [*own, *overrides])
        prompts = heldout_prompts(config.target.model.parent, PROMPTS)
        console.rule("six services and nats-server start, each a process")
        supervisor = Supervisor(config, on_event=printer(console.print))
        async with supervisor as stack, Client(stack.router_address) as client:
            runs = [await _complete(console, client, p, t) for p, t in zip(prompts, TEMPERATURES, strict=True)]
            audited = await _audit(console, stack.address("auditor"), runs)
            refused = _forge(console, config, runs[0].finished.receipt)
            identical = await _without_draft(console, client, prompts, runs)
    passes = sum(run.finished.usage.target_passes for run in runs)
    tokens = sum(len(run.token_ids) for run in runs)
    drafted = sum(run.finished.usage.drafted_tokens for run in runs)
    accepted = sum(run.finished.usage.accepted_tokens for run in runs)
    seconds = time.monotonic() - began
    console.rule(f"all stopped after {seconds:.1f} s")
    return Summary(
        prompts=len(runs),
        tokens=tokens,
        tokens_per_pass=round(tokens / passes, 3),
        accepted=round(accepted / max(1, drafted), 3),
        audits_passed=audited,
        tampered_refused=refused,
        drafting_off_identical=identical,
        seconds=round(seconds, 1),
    )


async def _complete(console: Console, client: Client, prompt: Prompt, temperature: float) -> Run:
    """Stream one answer: the draft's accepted tokens in one colour, the target's own in another."""
    console.print()
    console.rule(f"{prompt.origin}, temperature {temperature:g}", align="left")
    printer = AnswerPrinter(console)
    printer.prompt(prompt.text)
    began = time.monotonic()
    run = await _answer(client, prompt.text, temperature, drafting="model", printer=printer)
    printer.footer(run.finished, time.monotonic() - began)
    return run


async def _answer(
    client: Client, prompt: str, temperature: float, *, drafting: str, printer: AnswerPrinter | None = None
) -> Run:
    token_ids: list[int] = []
    stream = client.generate(
        prompt,
        max_tokens=MAX_TOKENS,
        temperature=temperature,
        seed=SEED,
        drafting="off" if drafting == "off" else "model",
    )
    async for event in stream:
        if isinstance(event, Tokens):
            token_ids += [token.id for token in event.tokens]
            if printer is not None:
                printer.tokens(event.tokens)
        elif isinstance(event, Finished):
            return Run(tuple(token_ids), event)
        elif not isinstance(event, Accepted):
            raise Internal(f"the router sent {event!r}, which this client does not know")
    raise Internal("the stream ended without Finished")


async def _audit(console: Console, address: str, runs: Sequence[Run]) -> int:
    """Have the auditor service check each receipt against the reference weights."""
    console.print()
    console.rule("the auditor checks each receipt: form, count, every token", align="left")
    passed = 0
    channel = Channel(address)
    try:
        for run in runs:
            request = AuditRequest(receipt=run.finished.receipt)
            verdict = await channel.unary(
                "/countersign.v1.AuditorService/Audit", request, AuditResponse, timeout=AUDIT_TIMEOUT_S
            )
            good = verdict.verdict == AuditOutcome.AUDIT_OUTCOME_PASS
            passed += good
            colour = "green" if good else "red"
            word = AuditOutcome.Name(verdict.verdict).removeprefix("AUDIT_OUTCOME_")
            console.print(f"[{colour}]{word}[/{colour}]  {verdict.levels[-1].summary}")
    finally:
        await channel.close()
    return passed


def _forge(console: Console, config: Config, receipt: bytes) -> int:
    """Change a receipt in three ways; each must be refused."""
    from countersign.cli.forgery import FORGERIES
    from countersign.verify.audit import audit
    from countersign.verify.keys import load_public

    console.print()
    console.rule("three forged receipts", align="left")
    key = load_public(Path(config.data_dir) / "keys" / "receipts.pub")
    refused = 0
    for name, forge in FORGERIES.items():
        report = audit(forge(receipt), trusted_keys=[key], reference=None, levels=["form", "count"])
        bad = report.verdict == "fail"
        refused += bad
        word = "[green]REFUSED[/green]" if bad else "[red]TAKEN[/red]"
        console.print(f"{word}  {name}: {report.levels[-1].summary}")
    return refused


async def _without_draft(console: Console, client: Client, prompts: Sequence[Prompt], runs: Sequence[Run]) -> bool:
    """Answer the last prompt once more with drafting off: slower, and the same tokens."""
    again = await _answer(client, prompts[-1].text, TEMPERATURES[-1], drafting="off")
    same = again.token_ids == runs[-1].token_ids
    console.print()
    console.rule("the last prompt once more, drafting off", align="left")
    colour = "green" if same else "red"
    word = "same" if same else "OTHER"
    before, after = runs[-1].finished.usage.target_passes, again.finished.usage.target_passes
    console.print(f"[{colour}]{word}[/{colour}] tokens; {after} target passes instead of {before}")
    return same
