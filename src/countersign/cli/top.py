"""``countersign top``: how a stack is doing, second by second, from what its processes tell Prometheus."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from countersign.cli.generate import DEFAULT_DATA_DIR
from countersign.cli.operator import DataDir, Json, Nats, amount, connected, counted, duration, size
from countersign.cli.scrape import Change, look
from countersign.cli.tables import BAD, HEAD, QUIET, Column, fitting, named, room, show
from countersign.services.runtime.registry import Registry
from countersign.v1.registry_pb2 import Instance, TargetRole

_STATE, _TOKEN, _OUTCOME, _SOURCE = (
    "countersign_state",
    "gen_ai_token_type",
    "countersign_outcome",
    "countersign_source",
)
_COLUMNS = (
    Column("TARGET"),
    Column("ROLE", 6),
    Column("RUN", 0, "right"),
    Column("WAIT", 0, "right"),
    Column("PROMPT", 7, "right"),
    Column("TOKENS/S", 0, "right"),
    Column("PER PASS", 4, "right"),
    Column("BATCH", 5, "right"),
    Column("PASS", 3, "right"),
    Column("ACCEPTED", 2, "right"),
    Column("PAGES", 1, "right"),
    Column("COMMIT", 8, "right"),
    Column("CPU", 9, "right"),
    Column("BOUND BY", 10),
)
NO_METRICS = "no process tells metrics: telemetry.metrics is false, or their addresses cannot be reached from here"


@dataclass(frozen=True, slots=True)
class Target:
    """One target, or all of them. Rates are a second, times in seconds, shares from 0 to 1; None: nothing to tell."""

    instance: str
    role: str
    running: float | None
    waiting: float | None
    pending_prompt_tokens: float | None
    tokens_per_s: float | None
    tokens_per_round: float | None
    batch: float | None
    pass_s: float | None
    accepted: float | None
    pages_used: float | None
    commits_per_s: float | None
    commit_s: float | None
    cpu: float | None
    bound_by: str


@dataclass(frozen=True, slots=True)
class Figures:
    """The whole stack over ``seconds``; rates, times and shares as in ``Target``, the others since the start."""

    seconds: float
    processes: int
    telling: int
    requests_open: float | None
    requests_waiting: float | None
    requests_per_s: float | None
    first_token_s: float | None
    per_token_s: float | None
    request_s: float | None
    prefix_found: float | None
    store_bytes: float | None
    store_capacity: float | None
    store_hits: float | None
    conflicts: float | None
    takeovers: float | None
    verdicts: dict[str, float]
    audits_waiting: float | None
    log_size: float | None
    violations: float | None
    joules_per_token: float | None
    whole: Target
    targets: tuple[Target, ...]


def top(
    once: Annotated[bool, typer.Option("--once", help="Look twice, print what came between, and end.")] = False,
    interval: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.1, max=3600)] = 1.0,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    nats: Nats = "",
    json_: Json = False,
) -> None:
    """Watch a running stack: requests, tokens, drafts, cache, commits, audits. Ends by Ctrl-C."""
    console = Console()
    live = None if once or json_ or not console.is_terminal else Live(console=console, screen=True, auto_refresh=False)
    asyncio.run(_watch(data_dir, nats, interval, once, _Output(console, json_, live)))


@dataclass(frozen=True, slots=True)
class _Output:
    """Where the figures go: to a screen that is drawn anew each time, or one after the other."""

    console: Console
    as_json: bool
    live: Live | None

    def take(self, seen: Figures) -> None:
        if self.as_json:
            print(json.dumps(asdict(seen)), flush=True)
        elif self.live is None:
            show(self.console, *screen(seen, room(self.console)))
        else:
            at = Text(f"countersign top  {datetime.now().astimezone():%H:%M:%S}", HEAD)
            self.live.update(Group(at, Text(), *screen(seen, self.console.width)), refresh=True)


async def _watch(data_dir: Path, nats: str, interval: float, once: bool, output: _Output) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with connected(data_dir, nats, "top") as bus:
        registry = Registry(bus)
        await registry.start(create=False)
        try:
            with output.live or _Nothing():
                async with aclosing(_looks(registry, interval, stop)) as looks:
                    async for change in looks:
                        output.take(figures(change))
                        if once:
                            return
        finally:
            await registry.stop()


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


async def _looks(registry: Registry, interval: float, stop: asyncio.Event) -> AsyncGenerator[Change]:
    """What changed in each interval, until ``stop``."""
    before = await look(registry.everybody())
    while not stop.is_set():
        try:
            await asyncio.wait_for(stop.wait(), interval)
        except TimeoutError:
            now = await look(registry.everybody())
            yield Change(before, now)
            before = now


def figures(change: Change) -> Figures:
    """What two looks say together."""
    now, targets = change.now, change.of("target")
    instances = [each.instance for each in targets.now.scrapes]
    router, auditor, store = change.of("router"), now.of("auditor"), change.of("kv")
    return Figures(
        seconds=change.seconds,
        processes=len(now.scrapes),
        telling=sum(each.series is not None for each in now.scrapes),
        requests_open=router.now.total("countersign_router_requests_open"),
        requests_waiting=targets.now.total("countersign_target_requests", **{_STATE: "waiting"}),
        requests_per_s=router.rate("countersign_requests_total"),
        first_token_s=router.mean("gen_ai_server_time_to_first_token_seconds"),
        per_token_s=router.mean("gen_ai_server_time_per_output_token_seconds"),
        request_s=router.mean("gen_ai_server_request_duration_seconds"),
        prefix_found=targets.ratio("countersign_prefix_found_total", "countersign_prefix_queried_total"),
        store_bytes=store.now.total("countersign_store_bytes"),
        store_capacity=store.now.total("countersign_store_capacity_bytes"),
        store_hits=store.ratio("countersign_store_hits_total", "countersign_store_lookups_total"),
        conflicts=targets.now.total("countersign_commit_conflicts_total"),
        takeovers=router.now.total("countersign_takeovers_total"),
        verdicts=auditor.labels("countersign_auditor_verdicts_total", _OUTCOME),
        audits_waiting=auditor.total("countersign_auditor_audits_waiting"),
        log_size=auditor.total("countersign_log_size"),
        violations=now.of("sidecar").total("countersign_protocol_violations_total"),
        joules_per_token=_joules(targets),
        whole=_target(targets, "all", ""),
        targets=tuple(_target(change.one(each.instance), each.instance, _role(each)) for each in instances),
    )


def _target(of: Change, instance: str, role: str) -> Target:
    pages = of.now.labels("countersign_kv_pages", _STATE)
    bounds = of.now.labels("countersign_constraint", "countersign_constraint")
    told = [each for each in of.now.scrapes if each.series is not None]
    # The registry knows how busy a target is that tells no metrics.
    registered = float(sum(each.instance.active_requests for each in of.now.scrapes))
    return Target(
        instance=instance,
        role=role,
        running=of.now.total("countersign_target_requests", **{_STATE: "running"}) if told else registered,
        waiting=of.now.total("countersign_target_requests", **{_STATE: "waiting"}),
        pending_prompt_tokens=float(sum(each.instance.pending_prompt_tokens for each in of.now.scrapes)),
        tokens_per_s=of.rate("countersign_target_tokens_total", **{_TOKEN: "output"}),
        tokens_per_round=_per_round(of),
        batch=of.mean("countersign_pass_requests"),
        pass_s=of.mean("countersign_pass_duration_seconds"),
        accepted=of.ratio("countersign_draft_accepted_total", "countersign_draft_proposed_total"),
        pages_used=pages.get("used", 0.0) / sum(pages.values()) if sum(pages.values()) > 0 else None,
        commits_per_s=of.rate("countersign_commit_duration_seconds_count"),
        commit_s=of.mean("countersign_commit_duration_seconds"),
        cpu=of.now.total("countersign_utilisation_ratio", **{_SOURCE: "processor"}),
        bound_by=", ".join(sorted(name for name, value in bounds.items() if value)),
    )


def _per_round(of: Change) -> float | None:
    tokens = of.grown("countersign_target_tokens_total", **{_TOKEN: "output"})
    rounds = of.grown("countersign_rounds_total")
    return tokens / rounds if tokens is not None and rounds else None


def _joules(of: Change) -> float | None:
    tokens = of.grown("countersign_target_tokens_total", **{_TOKEN: "output"})
    joules = of.grown("countersign_energy_joules_total")
    return joules / tokens if joules is not None and tokens else None


def _role(each: Instance) -> str:
    return TargetRole.Name(each.role).removeprefix("TARGET_ROLE_").lower() if each.role else ""


def screen(seen: Figures, width: int | None) -> list[Table | Text]:
    """What is shown."""
    return [*_lines(seen), Text(), fitting(_COLUMNS, [_row(each) for each in seen.targets], width)]


def _lines(seen: Figures) -> list[Text]:
    if not seen.processes:
        return [Text("no process is to be seen: does the stack run?", BAD)]
    bad = seen.verdicts.get("fail") or seen.violations
    lines = [
        named("requests", _requests(seen)),
        named("tokens", _tokens(seen)),
        named("cache", _cache(seen)),
        named("commits", _commits(seen)),
        named("audits", _audits(seen), BAD if bad else ""),
        named("energy", _told("{} J a token", amount, seen.joules_per_token) or "unavailable"),
    ]
    if seen.telling < seen.processes:
        silent = f"{seen.processes - seen.telling} of {seen.processes} processes tell no metrics"
        lines.append(Text(silent if seen.telling else NO_METRICS, QUIET))
    return lines


def _requests(seen: Figures) -> str:
    return _joined(
        f"{_count(seen.requests_open)} open",
        f"{_count(seen.requests_waiting)} waiting",
        f"{_rate(seen.requests_per_s)} ended",
        _told("first token {}", duration, seen.first_token_s),
        _told("then {} each", duration, seen.per_token_s),
        _told("{} in all", duration, seen.request_s),
    )


def _tokens(seen: Figures) -> str:
    whole = seen.whole
    return _joined(
        _rate(whole.tokens_per_s),
        _told("{} a request and pass", amount, whole.tokens_per_round),
        _told("accepted {} of what was proposed", _share, whole.accepted),
        _told("pass {}", duration, whole.pass_s),
        _told("batch {}", amount, whole.batch),
    )


def _cache(seen: Figures) -> str:
    return _joined(
        f"{_share(seen.whole.pages_used)} of pages used",
        _told("{} of prompts found", _share, seen.prefix_found),
        f"store {_size(seen.store_bytes)} of {_size(seen.store_capacity)}",
        _told("{} hits", _share, seen.store_hits),
    )


def _commits(seen: Figures) -> str:
    return _joined(
        _rate(seen.whole.commits_per_s),
        _told("{} each", duration, seen.whole.commit_s),
        counted(seen.conflicts or 0, "conflict"),
        counted(seen.takeovers or 0, "take-over"),
    )


def _audits(seen: Figures) -> str:
    outcomes = [f"{amount(seen.verdicts.get(name, 0))} {name}" for name in ("pass", "fail", "inconclusive")]
    return _joined(
        *outcomes,
        f"{_count(seen.audits_waiting)} waiting",
        f"log of {_count(seen.log_size)}",
        counted(seen.violations or 0, "protocol violation"),
    )


def _row(each: Target) -> list[str | Text]:
    return [
        each.instance,
        each.role,
        _count(each.running),
        _count(each.waiting),
        _count(each.pending_prompt_tokens),
        _count(each.tokens_per_s),
        _count(each.tokens_per_round),
        _count(each.batch),
        _time(each.pass_s),
        _share(each.accepted),
        _share(each.pages_used),
        _time(each.commit_s),
        _share(each.cpu),
        each.bound_by,
    ]


_NOTHING = "–"


def _joined(*parts: str) -> str:
    return " · ".join(part for part in parts if part)


def _told(words: str, shown: Callable[[float], str], value: float | None) -> str:
    """Empty where there is nothing to tell."""
    return "" if value is None else words.format(shown(value))


def _count(value: float | None) -> str:
    return _NOTHING if value is None else amount(value)


def _rate(value: float | None) -> str:
    return _NOTHING if value is None else f"{amount(value)}/s"


def _time(value: float | None) -> str:
    return _NOTHING if value is None else duration(value)


def _share(value: float | None) -> str:
    return _NOTHING if value is None else f"{100 * value:.0f} %"


def _size(value: float | None) -> str:
    return _NOTHING if value is None else size(value)
