"""Targets die, hang and are stopped in the middle of answers; another goes on, and clients see a pause only."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pytest
from scraping import scraped
from stacks import Running, running_stack

from countersign.client import Client, Finished, FinishReason, Tokens
from countersign.services.protocol.commit import LogState, replay
from countersign.services.protocol.subjects import commit_subject
from countersign.services.runtime.bus import Bus
from countersign.services.runtime.errors import CountersignError
from countersign.services.runtime.fetching import ask
from countersign.services.runtime.journal import Journal
from countersign.services.runtime.registry import Registry
from countersign.verify.arithmetic import arithmetic_of
from countersign.verify.audit import audit
from countersign.verify.difr import load_reference
from countersign.verify.fingerprints import Challenge
from countersign.verify.keys import load_public
from countersign.verify.logged import opened_fingerprints
from countersign.verify.receipt import parse

PROMPT = "class Stack:\n    def push(self, item):\n"
LENGTH = 1500


@dataclass(frozen=True, slots=True)
class Stage:
    """Two targets, and a view of the log and of who is alive."""

    running: Running
    journal: Journal
    registry: Registry

    async def log(self, request_id: str) -> LogState:
        return replay(request_id, await self.journal.read(commit_subject(request_id)))

    async def owner(self, request_id: str) -> int:
        """Process id of the request's target."""
        instance = (await self.log(request_id)).instance
        return next(target.pid for target in self.registry.live("target") if target.instance == instance)

    async def known(self) -> set[str]:
        """The targets that the router knows, which may have noticed later than others that one is silent."""
        (router,) = self.registry.live("router")
        told = await asyncio.to_thread(ask, f"http://{router.metrics_address}/targets")
        labels = [group["labels"] for group in json.loads(told.body)]
        return {each["instance"] for each in labels if each["service"] == "target"}

    async def complete(self, past: int = 0) -> None:
        """Wait until two targets live; ``past``: a process that ends, and may not have noticed yet."""
        async with asyncio.timeout(60):
            while len({t.pid for t in self.registry.live("target") if psutil.pid_exists(t.pid)} - {past}) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.1)


@dataclass(slots=True)
class Told:
    """What a client was told of one answer."""

    token_ids: list[int]
    finished: Finished


async def told(stage: Stage, request_id: str, seed: int, hurt: int | None = None) -> Told:
    """One answer; its target gets the signal ``hurt`` once the first tokens are there."""
    token_ids: list[int] = []
    async with asyncio.timeout(100), Client(stage.running.router) as client:
        async for event in client.generate(
            PROMPT, request_id=request_id, max_tokens=LENGTH, ignore_eos=True, temperature=0.7, seed=seed
        ):
            if isinstance(event, Tokens):
                if hurt is not None and not token_ids:
                    os.kill(await stage.owner(request_id), hurt)
                token_ids += [token.id for token in event.tokens]
            elif isinstance(event, Finished):
                return Told(token_ids, event)
    pytest.fail("the stream ended without Finished")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """They get hurt, so that the stack is this file's own."""
    with running_stack(tmp_path_factory.mktemp("takeover") / "data", "target.processes=2") as running:
        yield running
        wake(running)


def wake(running: Running) -> None:
    """Let go on what was stopped."""
    for child in psutil.Process(running.process.pid).children(recursive=True):
        child.resume()


@asynccontextmanager
async def watched(running: Running) -> AsyncIterator[Stage]:
    async with await Bus.connect(running.nats, "test") as bus, Registry(bus) as registry:
        yield Stage(running, Journal(bus), registry)


@pytest.fixture
async def stage(running: Running) -> AsyncIterator[Stage]:
    wake(running)
    async with watched(running) as stage:
        await stage.complete()
        yield stage


@pytest.mark.parametrize("hurt", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM], ids=lambda number: number.name)
async def test_another_target_goes_on_with_the_same_tokens_and_one_valid_receipt(
    stage: Stage, hurt: signal.Signals, demo_models: dict[str, Path]
) -> None:
    whole = await told(stage, f"whole-{hurt.name}", seed=5)
    found = await told(stage, f"hurt-{hurt.name}", seed=5, hurt=hurt)
    assert found.token_ids == whole.token_ids
    assert len(found.token_ids) == LENGTH
    log = await stage.log(f"hurt-{hurt.name}")  # replay refuses positions committed twice and tokens of a fenced epoch
    assert log.epoch >= 2
    assert found.finished.reason is FinishReason.LENGTH
    drawn = tuple(range(0, LENGTH, 25))
    report = audit(
        found.finished.receipt,
        trusted_keys=[load_public(stage.running.data_dir / "keys" / "receipts.pub")],
        reference=partial(load_reference, demo_models["target"]),
        challenge=Challenge(drawn, opened_fingerprints(log, drawn)),
    )
    assert report.verdict == "pass", report
    assert report.levels[-1].level == "activations"


async def test_a_target_that_wakes_up_after_it_was_replaced_commits_nothing(stage: Stage) -> None:
    request_id = "asleep"
    found = await told(stage, request_id, seed=6, hurt=signal.SIGSTOP)
    log = await stage.log(request_id)
    wake(stage.running)
    await told(stage, "after", seed=7)  # the woken one has had its time to try
    later = await stage.log(request_id)
    assert (later.sequence, later.token_ids) == (log.sequence, tuple(found.token_ids))


async def test_many_answers_survive_the_death_of_a_target(stage: Stage) -> None:
    whole = await asyncio.gather(*(told(stage, f"many-{seed}", seed) for seed in range(6)))
    answers = [asyncio.create_task(told(stage, f"many-hurt-{seed}", seed)) for seed in range(6)]
    async with asyncio.timeout(30):
        while not (await stage.log("many-hurt-0")).token_ids:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    os.kill(await stage.owner("many-hurt-0"), signal.SIGKILL)
    assert [one.token_ids for one in await asyncio.gather(*answers)] == [one.token_ids for one in whole]


async def test_a_rolling_restart_under_load_is_a_pause_for_nobody_but_the_clock(stage: Stage) -> None:
    whole = await asyncio.gather(*(told(stage, f"still-{seed}", seed) for seed in range(8)))
    answers = [asyncio.create_task(told(stage, f"rolling-{seed}", seed)) for seed in range(8)]
    for pid in {target.pid for target in stage.registry.live("target")}:
        async with asyncio.timeout(30):
            while not (await stage.log("rolling-7")).token_ids:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        os.kill(pid, signal.SIGTERM)
        await stage.complete(past=pid)
    assert [one.token_ids for one in await asyncio.gather(*answers)] == [one.token_ids for one in whole]
    epochs = [(await stage.log(f"rolling-{seed}")).epoch for seed in range(8)]
    assert max(epochs) >= 2, "no answer was moved"


async def test_a_request_past_its_deadline_is_closed_though_its_target_hangs(stage: Stage) -> None:
    # With every target asleep, only the router is left to close it.
    reason = None
    async with asyncio.timeout(60), Client(stage.running.router) as client:
        stopped = False
        async for event in client.generate(
            PROMPT, request_id="late", max_tokens=1900, ignore_eos=True, timeout=3, temperature=0.7, seed=1
        ):
            if isinstance(event, Tokens) and not stopped:
                stopped = True
                for target in stage.registry.live("target"):
                    os.kill(target.pid, signal.SIGSTOP)
            elif isinstance(event, Finished):
                reason = event.reason
    assert reason is FinishReason.DEADLINE


async def test_a_request_that_everybody_has_left_is_still_answered(tmp_path: Path) -> None:
    with running_stack(tmp_path / "data") as running:  # its router comes back at another address
        async with watched(running) as stage, Client(running.router, reconnects=0) as client:
            with suppress(CountersignError):
                async for event in client.generate(
                    PROMPT, request_id="left", max_tokens=LENGTH, ignore_eos=True, seed=8, on_disconnect="continue"
                ):
                    if isinstance(event, Tokens):
                        for pid in {one.pid for kind in ("router", "target") for one in stage.registry.live(kind)}:
                            with suppress(ProcessLookupError):
                                os.kill(pid, signal.SIGKILL)
            assert (await stage.log("left")).closed is None
            async with asyncio.timeout(60):
                while (await stage.log("left")).closed is None:  # noqa: ASYNC110  nobody follows it who could be asked
                    await asyncio.sleep(0.1)
            assert len((await stage.log("left")).token_ids) == LENGTH


async def test_operators_see_take_overs_and_the_appends_that_a_fenced_target_still_tries(stage: Stage) -> None:
    [before] = (await scraped(stage.registry, "router", "countersign_takeovers_total")).values()
    await told(stage, "counted", seed=6, hurt=signal.SIGSTOP)
    [after] = (await scraped(stage.registry, "router", "countersign_takeovers_total")).values()
    assert after > before
    wake(stage.running)  # what was stopped goes on where it was, and its log is another's, and closed by now
    conflicts, outcome = "countersign_commit_conflicts_total", "countersign_outcome"
    async with asyncio.timeout(30):
        while not (await scraped(stage.registry, "target", conflicts, outcome)).get("closed"):  # noqa: ASYNC110  no event
            await asyncio.sleep(0.1)


@contextmanager
def another_target(running: Running, *settings: str) -> Iterator[None]:
    """One more, that the stack does not look after."""
    options = [item for setting in settings for item in ("--set", setting)]
    command = [
        sys.executable,
        "-m",
        "countersign.services.target",
        "--config",
        str(running.data_dir / "config.json"),
        *options,
    ]
    with (running.data_dir.parent / "another.log").open("wb") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            yield
        finally:
            process.send_signal(signal.SIGTERM)


async def test_nobody_who_computes_otherwise_takes_an_answer_over(tmp_path: Path, demo_models: dict[str, Path]) -> None:
    with running_stack(tmp_path / "data") as running:
        async with watched(running) as stage, asyncio.TaskGroup() as tasks:
            begun = tasks.create_task(told(stage, "begun", seed=5, hurt=signal.SIGSTOP))
            async with asyncio.timeout(60):
                while not (await stage.log("begun")).token_ids:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            hanging, silent = await stage.owner("begun"), (await stage.log("begun")).instance
            with another_target(running, "target.dtype=bf16"):
                async with asyncio.timeout(60):
                    while silent in (known := await stage.known()) or not known:  # noqa: ASYNC110
                        await asyncio.sleep(0.1)
                # One that nobody has begun goes to who is there; the other waits for its like.
                other = await told(stage, "other", seed=6)
                os.kill(hanging, signal.SIGKILL)
                answers = {"begun": await begun, "other": other}
            logs = {request_id: await stage.log(request_id) for request_id in answers}
    for request_id, dtype in (("begun", "fp32"), ("other", "bf16")):
        log, receipt = logs[request_id], answers[request_id].finished.receipt
        assert log.arithmetic == str(arithmetic_of(parse(receipt).receipt))
        assert log.arithmetic.endswith(dtype)
        assert (log.epoch > 1) == (request_id == "begun")
        report = audit(
            receipt,
            trusted_keys=[load_public(running.data_dir / "keys" / "receipts.pub")],
            reference=partial(load_reference, demo_models["target"]),
        )
        assert report.verdict == "pass", report
