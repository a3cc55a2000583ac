"""``countersign top``: what two looks at a stack's metrics say together, and how it is shown."""

from __future__ import annotations

import asyncio
import inspect
import io
import json
import re
from dataclasses import asdict

import pytest
from aiohttp import web
from rich.cells import cell_len
from rich.console import Console

from countersign.cli import top
from countersign.cli.scrape import Change, Look, Scrape, look, parsed
from countersign.cli.tables import room, show
from countersign.cli.top import Figures, figures, screen
from countersign.services.runtime.telemetry.exposition import prometheus_name
from countersign.services.runtime.telemetry.metrics import TABLE
from countersign.v1.registry_pb2 import Instance, TargetRole

TARGET = """
# TYPE countersign_target_requests gauge
countersign_target_requests{{countersign_state="running"}} {running}
countersign_target_requests{{countersign_state="waiting"}} 1
# TYPE countersign_target_tokens counter
countersign_target_tokens_total{{gen_ai_token_type="output"}} {tokens}
countersign_target_tokens_total{{gen_ai_token_type="input"}} 7
# TYPE countersign_rounds counter
countersign_rounds_total {rounds}
# TYPE countersign_draft_proposed counter
countersign_draft_proposed_total {proposed}
# TYPE countersign_draft_accepted counter
countersign_draft_accepted_total {accepted}
# TYPE countersign_kv_pages gauge
countersign_kv_pages{{countersign_state="used"}} 30
countersign_kv_pages{{countersign_state="free"}} 70
# TYPE countersign_pass_duration_seconds histogram
countersign_pass_duration_seconds_bucket{{le="+Inf"}} {rounds}
countersign_pass_duration_seconds_count {rounds}
countersign_pass_duration_seconds_sum {seconds}
# TYPE countersign_constraint gauge
countersign_constraint{{countersign_constraint="memory"}} 1
countersign_constraint{{countersign_constraint="compute"}} 0
"""
AUDITOR = """
# TYPE countersign_auditor_verdicts counter
countersign_auditor_verdicts_total{countersign_outcome="pass"} 5
countersign_auditor_verdicts_total{countersign_outcome="fail"} 1
"""


def instance(service: str, number: int = 1, address: str = "") -> Instance:
    return Instance(service=service, instance=f"{service}-{number}", metrics_address=address)


def target(at: float, number: int = 1, **values: float) -> Scrape:
    given = {"running": 2.0, "tokens": 0.0, "rounds": 0.0, "proposed": 0.0, "accepted": 0.0, "seconds": 0.0, **values}
    who = instance("target", number)
    who.role = TargetRole.TARGET_ROLE_DECODE
    return Scrape(who, at, parsed(TARGET.format(**given)))


BEFORE = Look([target(10.0, tokens=100, rounds=50, proposed=60, accepted=20, seconds=1), target(10.0, 2)])
NOW = Look([
    target(12.0, tokens=300, rounds=100, proposed=100, accepted=50, seconds=1.5),
    target(12.0, 2, tokens=100, rounds=100),
    Scrape(instance("auditor"), 12.0, parsed(AUDITOR)),
])  # fmt: skip


def printed(seen: Figures, width: int) -> list[str]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system=None, width=width)
    show(console, *screen(seen, room(console)))
    return out.getvalue().splitlines()


def test_rates_shares_and_means_are_of_what_came_between_two_looks() -> None:
    seen = figures(Change(BEFORE, NOW))
    first, second = seen.targets
    assert seen.seconds == 2.0
    assert (first.tokens_per_s, first.tokens_per_round, first.accepted) == (100.0, 4.0, 0.75)
    assert (first.pass_s, first.pages_used, first.running, first.waiting) == (0.01, 0.3, 2.0, 1.0)
    assert (first.role, first.bound_by) == ("decode", "memory")
    assert (second.tokens_per_s, second.accepted) == (50.0, None)
    assert (seen.whole.tokens_per_s, seen.whole.running) == (150.0, 4.0)
    assert seen.verdicts == {"pass": 5.0, "fail": 1.0}
    assert seen.requests_open is None, "there is no router"


def test_a_process_that_was_not_there_before_or_began_anew_gives_no_wrong_rate() -> None:
    alone = figures(Change(Look(), NOW))
    assert (alone.seconds, alone.whole.tokens_per_s, alone.whole.accepted) == (0.0, None, None)
    joined = figures(Change(Look(BEFORE.scrapes[:1]), NOW))
    assert joined.whole.tokens_per_s == 100.0, "of the one that was there"
    again = figures(Change(NOW, Look([target(14.0, tokens=3)])))
    assert again.whole.tokens_per_s == 0.0, "never below nothing"


def test_a_target_without_metrics_shows_what_the_registry_knows() -> None:
    silent = instance("target", 9)
    silent.active_requests, silent.pending_prompt_tokens = 3, 40
    seen = figures(Change(Look(), Look([Scrape(silent, 1.0)])))
    assert (seen.targets[0].running, seen.targets[0].pending_prompt_tokens) == (3.0, 40.0)
    assert (seen.targets[0].tokens_per_s, seen.telling, seen.processes) == (None, 0, 1)
    assert "no process tells metrics" in "\n".join(printed(seen, 200))
    assert "does the stack run?" in printed(figures(Change(Look(), Look())), 80)[0]


@pytest.mark.parametrize("width", [20, 60, 100, 160])
def test_what_is_shown_fits(width: int) -> None:
    lines = printed(figures(Change(BEFORE, NOW)), width)
    assert max(map(cell_len, lines)) <= width
    head = next(line for line in lines if line.startswith("TARGET"))
    assert ("BOUND BY" in head, "TOKENS/S" in head) == (width >= 160, width >= 60)


def test_the_lines_say_what_there_is_and_nothing_of_what_there_is_not() -> None:
    text = "\n".join(printed(figures(Change(BEFORE, NOW)), 200))
    for part in ("150/s", "accepted 75 % of what was proposed", "30 % of pages used", "5 pass · 1 fail", "unavailable"):
        assert part in text
    assert "first token" not in text


def test_the_object_is_plain_json() -> None:
    told = json.loads(json.dumps(asdict(figures(Change(BEFORE, NOW)))))
    assert (told["whole"]["tokens_per_s"], told["targets"][1]["instance"]) == (150.0, "target-2")


async def test_who_answers_nothing_that_can_be_read_tells_nothing_and_holds_nobody_up() -> None:
    async def metrics(request: web.Request) -> web.Response:
        return await replies[request.host.rpartition(":")[2]]()

    async def good() -> web.Response:
        return web.Response(text=TARGET.format(running=2, tokens=1, rounds=1, proposed=1, accepted=1, seconds=1))

    async def rubbish() -> web.Response:
        return web.Response(body=b"\xff{{{\x00 not metrics\n")

    async def broken() -> web.Response:
        return web.Response(status=500)

    replies, runners, addresses = {}, [], list[str]()
    for reply in (good, rubbish, broken):
        app = web.Application()
        app.router.add_get("/metrics", metrics)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        replies[str(port)] = reply
        runners.append(runner)
        addresses.append(f"127.0.0.1:{port}")
    instances = [instance("target", number, address) for number, address in enumerate([*addresses, "127.0.0.1:1", ""])]
    async with asyncio.timeout(20):
        found = await look(instances)
    assert [scrape.series is not None for scrape in found.scrapes] == [True, False, False, False, False]
    for runner in runners:
        await runner.cleanup()


def test_names_of_metrics_are_those_of_the_table() -> None:
    known = {prometheus_name(row.name, row.unit, gauge=row.kind == "gauge") for row in TABLE}
    asked = set(re.findall(r'"((?:countersign|gen_ai)_[a-z_]+)"', inspect.getsource(top)))
    asked -= {"countersign_state", "gen_ai_token_type", "countersign_outcome", "countersign_source"}
    assert len(asked) > 20
    assert {re.sub(r"_(total|count|sum)$", "", name) for name in asked} - known == set()
