"""``countersign status``: who is there, of which release, how busy, with which models, and whether all is well."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from google.protobuf.message import Message
from rich.console import Console
from rich.text import Text

from countersign.cli.generate import DEFAULT_DATA_DIR
from countersign.cli.operator import DataDir, Json, Nats, connected, counted, duration
from countersign.cli.printable import in_one_line
from countersign.cli.tables import BAD, CARE, GOOD, QUIET, Column, fitting, named, room, show
from countersign.services.runtime.bus import Bus
from countersign.services.runtime.call import M
from countersign.services.runtime.clock import wall_ms
from countersign.services.runtime.errors import CountersignError
from countersign.services.runtime.health import is_serving
from countersign.services.runtime.registry import Registry
from countersign.v1.auditor_pb2 import GetLogRequest, GetLogResponse
from countersign.v1.registry_pb2 import Instance, TargetRole
from countersign.v1.router_pb2 import ModelInfo
from countersign.v1.sidecar_pb2 import StatusRequest, StatusResponse

CALL_S = 2.0
# Without one of each nothing can be answered.
NEEDED = ("router", "tokenizer", "target")

_COLUMNS = (
    Column("SERVICE", 8),
    Column("INSTANCE"),
    Column("HEALTH"),
    Column("ROLE", 4),
    Column("LOAD", 1),
    Column("UP", 3, "right"),
    Column("VERSION", 6),
    Column("ADDRESS", 5),
    Column("METRICS", 7),
)
_HEALTH = {"serving": GOOD, "draining": CARE, "silent": BAD}


@dataclass(frozen=True, slots=True)
class Seen:
    """All that was asked. ``serving``: of each instance whether its health service says so; ``log`` and ``watched``:
    what the auditor and the sidecar answered, None where they did not.
    """

    nats: str
    nats_version: str
    round_trip_s: float
    instances: Sequence[Instance]
    serving: Sequence[bool]
    log: GetLogResponse | None
    watched: StatusResponse | None
    now_ms: int

    @property
    def missing(self) -> list[str]:
        """Services that are needed and of which no instance serves."""
        up = {each.service for each, serving in zip(self.instances, self.serving, strict=True) if serving}
        return [service for service in NEEDED if service not in up]

    @property
    def well(self) -> bool:
        """Whether all answer, none that is needed is missing, and the protocol was kept."""
        violated = self.watched is not None and self.watched.violation_count > 0
        return all(self.serving) and not self.missing and not violated


def status(data_dir: DataDir = DEFAULT_DATA_DIR, nats: Nats = "", json_: Json = False) -> None:
    """Show the services of a running stack, their load and health, and its models. Exits 1 unless all is well."""
    seen = asyncio.run(_look(data_dir, nats))
    if json_:
        print(json.dumps(facts(seen)))
    else:
        report(Console(), seen)
    if not seen.well:
        raise typer.Exit(1)


async def _look(data_dir: Path, nats: str) -> Seen:
    async with connected(data_dir, nats, "status") as bus:
        registry = Registry(bus)
        await registry.start(create=False)
        try:
            instances = registry.everybody()
        finally:
            await registry.stop()
        begin = time.perf_counter()
        await bus.flush()
        round_trip = time.perf_counter() - begin
        serving, log, watched = await asyncio.gather(
            asyncio.gather(*(is_serving(each.address) for each in instances)),
            _asked(bus, "auditor", "GetLog", GetLogRequest(), GetLogResponse),
            _asked(bus, "sidecar", "Status", StatusRequest(), StatusResponse),
        )
        url, version = bus.server
        return Seen(url, version, round_trip, instances, serving, log, watched, wall_ms())


async def _asked(bus: Bus, service: str, method: str, request: Message, reply: type[M]) -> M | None:
    """The answer; None where there is none, of which the table tells."""
    try:
        return await bus.call(service, method, request, reply, timeout=CALL_S)
    except CountersignError:
        return None


def report(console: Console, seen: Seen) -> None:
    """What people see."""
    show(console, fitting(_COLUMNS, [_row(seen, place) for place in range(len(seen.instances))], room(console)))
    show(console, *_rest(seen))


def facts(seen: Seen) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "well": seen.well,
        "missing": seen.missing,
        "nats": {"url": seen.nats, "version": seen.nats_version, "round_trip_s": round(seen.round_trip_s, 6)},
        "instances": [
            {
                "service": each.service,
                "instance": each.instance,
                "health": _health(each, serving),
                "version": each.version,
                "role": _role(each),
                "address": each.address,
                "metrics_address": each.metrics_address,
                "pid": each.pid,
                "started_unix_ms": each.started_unix_ms,
                "active_requests": each.active_requests,
                "pending_prompt_tokens": each.pending_prompt_tokens,
                "prefilled_blocks": each.prefilled_blocks,
                "model": each.model.name,
            }
            for each, serving in zip(seen.instances, seen.serving, strict=True)
        ],
        "models": [_model_facts(model, count) for model, count in models(seen.instances)],
        "log": None
        if seen.log is None
        else {
            "origin": seen.log.origin,
            "receipts": seen.log.size,
            "waiting": seen.log.waiting,
            "outcomes": dict(seen.log.outcomes),
            "equivocations": seen.log.equivocations,
        },
        "protocol": None
        if seen.watched is None
        else {"requests": seen.watched.requests, "violations": seen.watched.violation_count},
    }


def models(instances: Sequence[Instance]) -> list[tuple[ModelInfo, int]]:
    """Each model that targets serve, and at how many of them; two of one name and other weights are two."""
    found: dict[tuple[str, bytes], list[Instance]] = {}
    for each in instances:
        if each.model.name:
            found.setdefault((each.model.name, each.model.weights_sha256), []).append(each)
    return [(targets[0].model, len(targets)) for _, targets in sorted(found.items())]


def _model_facts(model: ModelInfo, targets: int) -> dict[str, Any]:
    return {
        "name": model.name,
        "targets": targets,
        "dtype": model.dtype,
        "context_length": model.context_length,
        "vocabulary_size": model.vocabulary_size,
        "cache_tokens": model.cache_tokens,
        "drafting": model.drafting,
        "weights_sha256": model.weights_sha256.hex(),
        "tokenizer_sha256": model.tokenizer_sha256.hex(),
        "config_sha256": model.config_sha256.hex(),
        "receipt_key": model.receipt_key.hex(),
    }


def _row(seen: Seen, place: int) -> list[str | Text]:
    each, health = seen.instances[place], _health(seen.instances[place], seen.serving[place])
    return [
        each.service,
        each.instance,
        Text(health, _HEALTH[health]),
        _role(each),
        _load(each),
        duration(max(0, seen.now_ms - each.started_unix_ms) / 1000),
        each.version,
        each.address,
        each.metrics_address,
    ]


def _health(each: Instance, serving: bool) -> str:
    if not serving:
        return "silent"
    return "draining" if each.draining else "serving"


def _role(each: Instance) -> str:
    return TargetRole.Name(each.role).removeprefix("TARGET_ROLE_").lower() if each.role else ""


def _load(each: Instance) -> str:
    parts = [counted(each.active_requests, "request")] if each.active_requests else []
    if each.pending_prompt_tokens:
        parts.append(counted(each.pending_prompt_tokens, "prompt token"))
    return ", ".join(parts) or "idle"


def _rest(seen: Seen) -> list[Text]:
    """What stands below the table."""
    lines = [Text()]
    nats = f"{seen.nats}, version {seen.nats_version}, answers in {duration(seen.round_trip_s)}"
    lines.append(named("nats", nats))
    for model, count in models(seen.instances):
        about = f"{model.name}: {model.dtype}, context {model.context_length}, {counted(count, 'target')}"
        lines.append(named("model", f"{about}, room for {model.cache_tokens:,} tokens each"))
        digests = (("weights", model.weights_sha256), ("tokenizer", model.tokenizer_sha256))
        lines += [
            Text(f"  {name:<10}{digest.hex()}", QUIET) for name, digest in (*digests, ("config", model.config_sha256))
        ]
    if seen.log is not None:
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in sorted(seen.log.outcomes.items()))
        log = f"{counted(seen.log.size, 'receipt')}; audited: {outcomes or 'none yet'}; {seen.log.waiting} wait"
        bad = seen.log.outcomes.get("fail", 0) or seen.log.equivocations
        lines.append(named("log", log, BAD if bad else ""))
    if seen.watched is not None:
        kept = f"{counted(seen.watched.requests, 'request')} watched, {seen.watched.violation_count} violations"
        lines.append(named("protocol", kept, BAD if seen.watched.violation_count else ""))
    return lines + _troubles(seen)


def _troubles(seen: Seen) -> list[Text]:
    """What is not as it should be, and what to do."""
    lines = [
        Text(f"there is no {service} that serves: requests cannot be answered; see its log in the data folder", BAD)
        for service in seen.missing
    ]
    for each, serving in zip(seen.instances, seen.serving, strict=True):
        if not serving and each.service not in seen.missing:
            lines.append(Text(f"{in_one_line(each.instance)} does not answer at {in_one_line(each.address)}", BAD))
    if seen.watched is not None and seen.watched.violation_count:
        lines.append(Text("the commit protocol was violated; see: countersign spec status", BAD))
    return lines and [Text(), *lines]
