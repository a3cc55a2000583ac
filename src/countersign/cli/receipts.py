"""``countersign receipts``: what a stack has signed, the newest first, and what its auditors said of each."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from rich.console import Console
from rich.text import Text

from countersign.cli.generate import DEFAULT_DATA_DIR
from countersign.cli.operator import DataDir, Json, Nats, amount, connected, duration, moment, share
from countersign.cli.tables import BAD, CARE, GOOD, QUIET, Column, fitting, room, show
from countersign.services.protocol.subjects import receipt_subject
from countersign.services.runtime.clock import wall_ms
from countersign.services.runtime.errors import CountersignError, InvalidArgument
from countersign.services.runtime.journal import Entry, Journal
from countersign.services.runtime.registry import Registry
from countersign.v1.auditor_pb2 import AuditState, GetLogRequest, GetLogResponse, GetVerdictRequest, GetVerdictResponse
from countersign.verify import verdict as verdicts
from countersign.verify.errors import VerificationError
from countersign.verify.receipt import SignedReceipt, parse

if TYPE_CHECKING:
    from countersign.services.runtime.bus import Bus

CALL_S = 2.0
AT_ONCE = 32
ASKED_AT_ONCE = 256
UNKNOWN = "unknown"
"""No auditor that is there says anything of it."""

_SPAN = re.compile(r"([0-9]{1,9}) *([smhd])", re.ASCII)
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_STATES = {
    AuditState.AUDIT_STATE_LOGGED: "logged",
    AuditState.AUDIT_STATE_NOT_DRAWN: "not drawn",
    AuditState.AUDIT_STATE_WAITING: "waiting",
}
_STYLES = {"pass": GOOD, "fail": BAD, "inconclusive": CARE}
_COLUMNS = (
    Column("FINISHED", 3),
    Column("REQUEST"),
    Column("MODEL", 6),
    Column("PROMPT", 5, "right"),
    Column("TOKENS", 1, "right"),
    Column("TIME", 4, "right"),
    Column("ACCEPTED", 7, "right"),
    Column("ENDED BY", 2),
    Column("VERDICT"),
    Column("RECEIPT", 8),
)


class Finish(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    DEADLINE = "deadline"
    CANCELLED = "cancelled"
    ERROR = "error"


class Outcome(StrEnum):
    PASS = "pass"  # noqa: S105  an outcome, no password
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Filters:
    """What is asked for; times are Unix milliseconds."""

    model: str = ""
    finish: str = ""
    outcome: str = ""
    since_ms: float = 0
    until_ms: float = math.inf

    def take(self, row: Row) -> bool:
        audited = row.verdict if row.verdict in _STYLES else Outcome.NONE
        return (
            self.model in {"", row.model}
            and self.finish in {"", row.finish}
            and self.outcome in {"", audited}
            and self.since_ms <= row.finished_unix_ms <= self.until_ms
        )


@dataclass(frozen=True, slots=True)
class Row:
    """A receipt as it is listed. ``verdict``: an outcome, or how far the audit is; ``why``: what decided it."""

    finished_unix_ms: int
    request_id: str
    receipt_sha256: str
    model: str
    weights_sha256: str
    prompt_tokens: int
    output_tokens: int
    hidden_tokens: int
    drafted: int
    accepted: int
    seconds: float
    finish: str
    verdict: str = UNKNOWN
    why: str = ""
    audited_unix_ms: int = 0
    trace_id: str = ""


def receipts(
    model: Annotated[str, typer.Option(help="Only of this model.", metavar="NAME")] = "",
    finish: Annotated[Finish | None, typer.Option(help="Only answers that ended so.")] = None,
    verdict: Annotated[Outcome | None, typer.Option(help="Only those audited so; none: not audited (yet).")] = None,
    since: Annotated[
        str, typer.Option(help="Only from then on: 90s, 15m, 2h, 3d ago, or a time.", metavar="TIME")
    ] = "",
    until: Annotated[str, typer.Option(help="Only up to then, likewise.", metavar="TIME")] = "",
    limit: Annotated[int, typer.Option(help="At most so many.", min=1, max=100_000)] = 20,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    nats: Nats = "",
    json_: Json = False,
) -> None:
    """List the receipts of a running stack, the newest first, with their verdicts."""
    now = wall_ms()
    filters = Filters(
        model,
        finish or "",
        verdict or "",
        unix_ms(since, now) if since else 0,
        unix_ms(until, now) if until else math.inf,
    )
    found = asyncio.run(_list(data_dir, nats, filters, limit))
    if json_:
        rows = [asdict(row) for row in found.rows]
        print(json.dumps({"receipts": rows, "more": found.more, "unreadable": found.unreadable}))
        return
    report(Console(), found)


@dataclass(slots=True)
class Found:
    """``more``: there are others that fit; ``unreadable``: entries of the stream that are no receipts."""

    rows: list[Row]
    more: bool = False
    unreadable: int = 0


async def _list(data_dir: Path, nats: str, filters: Filters, limit: int) -> Found:
    async with connected(data_dir, nats, "receipts") as bus:
        keys = await _auditors(bus)
        found = await search(Journal(bus), filters, limit, list(keys.values()))
        for begin in range(0, len(found.rows), AT_ONCE):
            few = slice(begin, begin + AT_ONCE)
            found.rows[few] = await asyncio.gather(*(_state(bus, keys, row) for row in found.rows[few]))
        return found


async def search(journal: Journal, filters: Filters, limit: int, keys: Sequence[Ed25519PublicKey]) -> Found:
    """The newest ``limit`` receipts that fit, with the verdicts that one of the keys has signed."""
    found = Found([])
    async for page in journal.pages_back(receipt_subject("*")):
        signed = [one for entry in page if (one := _parsed(entry)) is not None]
        found.unreadable += len(page) - len(signed)
        said = await _verdicts(journal, signed, keys)
        rows = [row_of(one, said.get(one.digest)) for one in signed]
        found.rows += [row for row in rows if filters.take(row)]
        if len(found.rows) > limit or all(row.finished_unix_ms < filters.since_ms for row in rows):
            break
    found.more = len(found.rows) > limit
    del found.rows[limit:]
    return found


def report(console: Console, found: Found) -> None:
    """What people see."""
    if found.rows:
        show(console, fitting(_COLUMNS, [_cells(row) for row in found.rows], room(console)))
    show(console, *_notes(found))


def row_of(signed: SignedReceipt, verdict: verdicts.Verdict | None) -> Row:
    """The line of a receipt."""
    receipt = signed.receipt
    return Row(
        finished_unix_ms=receipt.usage.finished_unix_ms,
        request_id=receipt.request_id,
        receipt_sha256=signed.digest.hex(),
        model=receipt.model.name,
        weights_sha256=receipt.model.weights.hex(),
        prompt_tokens=receipt.request.prompt_tokens,
        output_tokens=receipt.output.tokens,
        hidden_tokens=receipt.output.hidden,
        drafted=receipt.evidence.drafted,
        accepted=receipt.evidence.accepted,
        seconds=max(0, receipt.usage.finished_unix_ms - receipt.request.opened_unix_ms) / 1000,
        finish=receipt.output.finish_reason,
        verdict=verdict.outcome if verdict is not None else UNKNOWN,
        why=_why(verdict) if verdict is not None else "",
        audited_unix_ms=verdict.audited_unix_ms if verdict is not None else 0,
        trace_id=receipt.trace.id.hex() if receipt.trace is not None else "",
    )


def _why(verdict: verdicts.Verdict) -> str:
    """The sentence of the level that decided, the last of those that did."""
    return next((each.summary for each in reversed(verdict.findings) if each.outcome == verdict.outcome), "")


def unix_ms(text: str, now_ms: int) -> float:
    """A time: so long ago (90s, 15m, 2h, 3d), or a date and time as ISO 8601 has them, of this machine's zone.

    Raises:
        InvalidArgument: reason BAD_TIME.
    """
    span = _SPAN.fullmatch(text.strip())
    try:
        if span is not None:
            return now_ms - 1000 * timedelta(**{_UNITS[span[2]]: int(span[1])}).total_seconds()
        return datetime.fromisoformat(text.strip()).timestamp() * 1000
    except (ValueError, OverflowError):
        raise InvalidArgument(
            f"{text!r} is no time", reason="BAD_TIME", help="such as 15m, 2h, 3d, 2026-11-21 or 2026-11-21T16:30"
        ) from None


def _parsed(entry: Entry) -> SignedReceipt | None:
    try:
        return parse(entry.data)
    except VerificationError:
        return None


async def _verdicts(
    journal: Journal, signed: Sequence[SignedReceipt], keys: Sequence[Ed25519PublicKey]
) -> Mapping[bytes, verdicts.Verdict]:
    """By receipt; of several auditors' words the worst."""
    found: dict[bytes, verdicts.Verdict] = {}
    subjects = [f"cs.v1.verdict.*.{one.digest.hex()}" for one in signed]
    for begin in range(0, len(subjects), ASKED_AT_ONCE):
        entries = await journal.newest_each(subjects[begin : begin + ASKED_AT_ONCE])
        for entry in entries.values():
            try:
                said = verdicts.verify(entry.data, keys)
            except VerificationError:
                continue  # of an auditor that is not there
            known = found.get(said.receipt)
            if known is None or _BADNESS.index(said.outcome) > _BADNESS.index(known.outcome):
                found[said.receipt] = said
    return found


_BADNESS = ("pass", "inconclusive", "fail")


async def _auditors(bus: Bus) -> dict[str, Ed25519PublicKey]:
    """The keys of those that are there, by instance."""
    registry = Registry(bus)
    await registry.start(create=False)
    try:
        instances = [each.instance for each in registry.live("auditor")]
    finally:
        await registry.stop()
    keys: dict[str, Ed25519PublicKey] = {}
    for instance in instances:
        try:
            log = await bus.call(
                "auditor", "GetLog", GetLogRequest(), GetLogResponse, timeout=CALL_S, instance=instance
            )
            keys[instance] = Ed25519PublicKey.from_public_bytes(log.auditor_key)
        except (CountersignError, ValueError):
            continue
    return keys


async def _state(bus: Bus, auditors: Iterable[str], row: Row) -> Row:
    """How far its audit is, where there is no verdict."""
    if row.verdict != UNKNOWN:
        return row
    request = GetVerdictRequest(receipt_sha256=bytes.fromhex(row.receipt_sha256))
    for instance in auditors:
        try:
            reply = await bus.call(
                "auditor", "GetVerdict", request, GetVerdictResponse, timeout=CALL_S, instance=instance
            )
        except CountersignError:
            continue
        return replace(row, verdict=_STATES.get(reply.state, UNKNOWN))
    return row


def _cells(row: Row) -> list[str | Text]:
    tokens = f"{amount(row.output_tokens)}" + (f" ({amount(row.hidden_tokens)} hidden)" if row.hidden_tokens else "")
    return [
        moment(row.finished_unix_ms),
        row.request_id,
        row.model,
        amount(row.prompt_tokens),
        tokens,
        duration(row.seconds),
        share(row.accepted, row.drafted),
        row.finish,
        Text(row.verdict, _STYLES.get(row.verdict, QUIET)),
        row.receipt_sha256[:16],
    ]


def _notes(found: Found) -> list[Text]:
    notes: list[Text] = []
    if not found.rows:
        notes.append(Text("no receipts fit"))
    if found.more:
        notes.append(Text(f"there are more than these {len(found.rows)}: see --limit", QUIET))
    notes += [Text(f"{row.request_id}: {row.why}", BAD) for row in found.rows if row.verdict == "fail"]
    if found.unreadable:
        notes.append(Text(f"{found.unreadable} of the stream's entries cannot be read", CARE))
    return notes
