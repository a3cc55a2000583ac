"""What the auditor knows about each receipt and each log, in SQLite or PostgreSQL.

    receipts        every entry of the log: index, digest, request
    refused         what came and is no receipt of a trusted key
    checkpoints     every checkpoint that was signed
    audits          every receipt that was drawn: until when it waits, what came out, the signed verdict
    last_seen       of each log that is witnessed, the largest checkpoint that was found consistent
    conflicts       evidence: two checkpoints of one log that do not fit

The log folder is the truth about what was logged and signed; the first tables say where to find it and what is left to
do, and what they lack is filled in from the folder (``intake``, ``notary``). Verdicts, what was seen of other logs, and
evidence are here alone. Every method is one transaction.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, Engine, Insert, RowMapping, create_engine, event, func, insert, select, update
from sqlalchemy.engine import URL, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, IntegrityError, SQLAlchemyError
from sqlalchemy.pool import ConnectionPoolEntry

from countersign.services.auditor.tables import (
    AUDITS,
    CHECKPOINTS,
    CONFLICTS,
    LAST_SEEN,
    METADATA,
    RECEIPTS,
    REFUSED,
    VERSIONS,
)
from countersign.services.runtime.errors import DataLoss, FailedPrecondition, Unavailable
from countersign.verify.equivocation import Equivocation

SCHEMA = 1
"""Version of the tables. A ledger of an older version is brought up to it where it is opened, a newer one refused."""

PAGE = 1000
MOST_EVIDENCE = 32
"""Pieces kept against one log. One convicts it, and whoever has its key could sign conflicts until our disk is full."""

_BUSY_MS = 10_000


@dataclass(frozen=True, slots=True)
class Logged:
    """A receipt in the log."""

    index: int
    digest: bytes
    request_id: str


@dataclass(frozen=True, slots=True)
class Audit:
    """A receipt that was drawn. ``outcome`` and ``verdict`` (the signed statement) are None while it waits."""

    index: int
    digest: bytes
    checkpoint: int
    attempts: int
    outcome: str | None
    verdict: bytes | None


@dataclass(frozen=True, slots=True)
class Counts:
    """How many of each."""

    receipts: int
    refused: int
    waiting: int
    outcomes: dict[str, int]
    conflicts: int


class Ledger:
    """An open ledger. Safe to use from several threads; one auditor writes to it.

    Every method raises Unavailable (reason LEDGER_UNAVAILABLE) where the database does not answer.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @staticmethod
    def open(url: str) -> Ledger:
        """The ledger at a URL, ``sqlite:///FILE`` or ``postgresql+psycopg://USER:PASSWORD@HOST/DATABASE``; its tables
        are made if there are none.

        Raises:
            FailedPrecondition: reason LEDGER_UNUSABLE: no such database, or tables of a newer release.
        """
        try:
            place = make_url(url)
            if place.get_backend_name() == "sqlite" and place.database:
                Path(place.database).parent.mkdir(parents=True, exist_ok=True)
            engine = create_engine(place, pool_pre_ping=True)
            if engine.dialect.name == "sqlite":
                event.listen(engine, "connect", _configure_sqlite)
            ledger = Ledger(engine)
            with contextlib.ExitStack() as on_failure:
                on_failure.callback(ledger.close)
                ledger._prepare()
                on_failure.pop_all()
        except (SQLAlchemyError, ModuleNotFoundError, OSError) as error:
            raise FailedPrecondition(
                f"the ledger {_shown(url)} cannot be used: {_first_line(error)}",
                reason="LEDGER_UNUSABLE",
                help="set auditor.ledger to sqlite:///FILE or postgresql+psycopg://USER:PASSWORD@HOST/DATABASE",
            ) from error
        return ledger

    def close(self) -> None:
        """Gives the connections back."""
        self._engine.dispose()

    # What was logged.

    def size(self) -> int:
        """How many entries of the log are known here: all below it."""
        with self._transaction() as db:
            return int(db.execute(select(func.coalesce(func.max(RECEIPTS.c.index) + 1, 0))).scalar_one())

    def known(self, digests: Sequence[bytes]) -> set[bytes]:
        """Those of the digests that are in the log."""
        with self._transaction() as db:
            return set(db.execute(select(RECEIPTS.c.digest).where(RECEIPTS.c.digest.in_(digests))).scalars())

    def record(self, entries: Iterable[Logged]) -> None:
        """Entries that the log has taken.

        Raises:
            DataLoss: a digest or an index is there already: log and ledger are not of each other.
        """
        rows = [{"index": entry.index, "digest": entry.digest, "request_id": entry.request_id} for entry in entries]
        if not rows:
            return
        try:
            with self._transaction() as db:
                db.execute(insert(RECEIPTS), rows)
        except IntegrityError as error:
            raise DataLoss(
                f"the ledger has entries {rows[0]['index']} to {rows[-1]['index']} already, and others than the log's",
                reason="LEDGER_MISMATCH",
                help="log folder and ledger are not of each other: restore both from one copy",
            ) from error

    def find(self, digest: bytes) -> Logged | None:
        """The entry of a receipt."""
        with self._transaction() as db:
            row = db.execute(select(RECEIPTS).where(RECEIPTS.c.digest == digest)).mappings().one_or_none()
        return None if row is None else Logged(row["index"], row["digest"], row["request_id"])

    def between(self, begin: int, end: int) -> list[Logged]:
        """The entries from ``begin`` to ``end`` - 1."""
        query = select(RECEIPTS).where(RECEIPTS.c.index >= begin, RECEIPTS.c.index < end).order_by(RECEIPTS.c.index)
        with self._transaction() as db:
            return [Logged(row["index"], row["digest"], row["request_id"]) for row in db.execute(query).mappings()]

    def refuse(self, sha256: bytes, reason: str, now_ms: int) -> None:
        """What came and does not belong into the log; once."""
        with self._transaction() as db:
            if db.execute(select(REFUSED.c.sha256).where(REFUSED.c.sha256 == sha256)).one_or_none() is None:
                db.execute(insert(REFUSED).values(sha256=sha256, reason=reason[:400], at_unix_ms=now_ms))

    # What was signed, and drawn from it.

    def last_checkpoint(self) -> tuple[int, bytes] | None:
        """Size and note of the newest checkpoint."""
        query = select(CHECKPOINTS.c.size, CHECKPOINTS.c.note).order_by(CHECKPOINTS.c.size.desc()).limit(1)
        with self._transaction() as db:
            row = db.execute(query).one_or_none()
        return None if row is None else (row.size, row.note)

    def checkpoint_over(self, index: int) -> tuple[int, bytes] | None:
        """Size and note of the first checkpoint that covers an entry."""
        columns = select(CHECKPOINTS.c.size, CHECKPOINTS.c.note).where(CHECKPOINTS.c.size > index)
        with self._transaction() as db:
            row = db.execute(columns.order_by(CHECKPOINTS.c.size).limit(1)).one_or_none()
        return None if row is None else (row.size, row.note)

    def signed(self, size: int, note: bytes, drawn: Iterable[Logged]) -> None:
        """A checkpoint, and the receipts that were drawn from it: both or neither."""
        waits = {"checkpoint": size, "attempts": 0, "due_unix_ms": 0, "published": False}
        rows = [{"index": entry.index, "digest": entry.digest, **waits} for entry in drawn]
        with self._transaction() as db:
            db.execute(insert(CHECKPOINTS).values(size=size, note=note, published=False))
            if rows:
                db.execute(insert(AUDITS), rows)

    def cosigned(self, size: int, note: bytes) -> None:
        """The same checkpoint with more signatures; it is to be published again."""
        with self._transaction() as db:
            db.execute(update(CHECKPOINTS).where(CHECKPOINTS.c.size == size).values(note=note, published=False))

    # Audits.

    def next_audit(self, now_ms: int) -> Audit | None:
        """The audit that has waited longest of those that are due."""
        query = select(AUDITS).where(AUDITS.c.outcome.is_(None), AUDITS.c.due_unix_ms <= now_ms)
        with self._transaction() as db:
            row = db.execute(query.order_by(AUDITS.c.index).limit(1)).mappings().one_or_none()
        return None if row is None else _audit(row)

    def postpone(self, index: int, due_ms: int) -> None:
        """An audit cannot be made yet."""
        values = {"attempts": AUDITS.c.attempts + 1, "due_unix_ms": due_ms}
        with self._transaction() as db:
            db.execute(update(AUDITS).where(AUDITS.c.index == index).values(values))

    def decided(self, index: int, outcome: str, verdict: bytes) -> None:
        """How an audit ended. What was decided stays."""
        mine = AUDITS.c.index == index, AUDITS.c.outcome.is_(None)
        with self._transaction() as db:
            db.execute(update(AUDITS).where(*mine).values(outcome=outcome, verdict=verdict))

    def audit_of(self, digest: bytes) -> Audit | None:
        """The audit of a receipt, if it was drawn."""
        with self._transaction() as db:
            row = db.execute(select(AUDITS).where(AUDITS.c.digest == digest)).mappings().one_or_none()
        return None if row is None else _audit(row)

    def verdicts(self, after: int, most: int, outcome: str | None = None) -> list[Audit]:
        """Audits that ended, of entries over ``after`` (-1 for the first page), in the order of the log."""
        query = select(AUDITS).where(AUDITS.c.outcome.is_not(None), AUDITS.c.index > after)
        if outcome is not None:
            query = query.where(AUDITS.c.outcome == outcome)
        with self._transaction() as db:
            return [_audit(row) for row in db.execute(query.order_by(AUDITS.c.index).limit(most)).mappings()]

    # What is left to tell the world.

    def unpublished_checkpoints(self) -> list[tuple[int, bytes]]:
        """Size and note, oldest first."""
        query = select(CHECKPOINTS.c.size, CHECKPOINTS.c.note).where(CHECKPOINTS.c.published.is_(False))
        with self._transaction() as db:
            return [(row.size, row.note) for row in db.execute(query.order_by(CHECKPOINTS.c.size).limit(PAGE))]

    def unpublished_verdicts(self) -> list[Audit]:
        """Decided and not yet out, in the order of the log."""
        query = select(AUDITS).where(AUDITS.c.published.is_(False), AUDITS.c.outcome.is_not(None))
        with self._transaction() as db:
            return [_audit(row) for row in db.execute(query.order_by(AUDITS.c.index).limit(PAGE)).mappings()]

    def unpublished_conflicts(self) -> list[tuple[bytes, bytes]]:
        """SHA-256 and evidence."""
        query = select(CONFLICTS.c.sha256, CONFLICTS.c.evidence).where(CONFLICTS.c.published.is_(False))
        with self._transaction() as db:
            return [(row.sha256, row.evidence) for row in db.execute(query.limit(PAGE))]

    def published_checkpoint(self, size: int, note: bytes) -> None:
        """This note is out."""
        mine = CHECKPOINTS.c.size == size, CHECKPOINTS.c.note == note
        with self._transaction() as db:
            db.execute(update(CHECKPOINTS).where(*mine).values(published=True))

    def published_verdict(self, index: int) -> None:
        with self._transaction() as db:
            db.execute(update(AUDITS).where(AUDITS.c.index == index).values(published=True))

    def published_conflict(self, sha256: bytes) -> None:
        with self._transaction() as db:
            db.execute(update(CONFLICTS).where(CONFLICTS.c.sha256 == sha256).values(published=True))

    # Other logs.

    def last_seen(self, origin: str) -> bytes | None:
        """The largest checkpoint of a log that was found consistent with all before it."""
        with self._transaction() as db:
            return db.execute(select(LAST_SEEN.c.note).where(LAST_SEEN.c.origin == origin)).scalar_one_or_none()

    def saw(self, origin: str, before: bytes | None, note: bytes) -> bool:
        """Puts ``note`` in the place of ``before`` (None: nothing); False where something else stands there by now."""
        if before is None:
            return self._new(insert(LAST_SEEN).values(origin=origin, note=note))
        mine = LAST_SEEN.c.origin == origin, LAST_SEEN.c.note == before
        with self._transaction() as db:
            return db.execute(update(LAST_SEEN).where(*mine).values(note=note)).rowcount == 1

    def keep(self, conflict: Equivocation, origin: str, evidence: bytes, now_ms: int) -> bool:
        """Evidence against a log, once, and not without end (``MOST_EVIDENCE``); whether it is new.

        ``evidence``: the signed statement of ``conflict``.
        """
        if len(self.conflicts(origin)) >= MOST_EVIDENCE:
            return False
        sha256 = conflict.digest()
        row = {"sha256": sha256, "origin": origin, "evidence": evidence, "at_unix_ms": now_ms, "published": False}
        return self._new(insert(CONFLICTS).values(row))

    def conflicts(self, origin: str | None = None) -> list[bytes]:
        """The evidence that was kept, oldest first: at most 1000."""
        query = select(CONFLICTS.c.evidence).order_by(CONFLICTS.c.at_unix_ms).limit(PAGE)
        if origin is not None:
            query = query.where(CONFLICTS.c.origin == origin)
        with self._transaction() as db:
            return list(db.execute(query).scalars())

    def counts(self) -> Counts:
        """How far everything is."""
        grouped = select(AUDITS.c.outcome, func.count()).group_by(AUDITS.c.outcome)
        with self._transaction() as db:
            outcomes = {row[0]: int(row[1]) for row in db.execute(grouped)}
            receipts, refused, conflicts = (
                int(db.execute(select(func.count()).select_from(table)).scalar_one())
                for table in (RECEIPTS, REFUSED, CONFLICTS)
            )
        waiting = outcomes.pop(None, 0)
        return Counts(receipts, refused, waiting, outcomes, conflicts)

    def _prepare(self) -> None:
        """Makes the tables, or refuses those of a newer release."""
        with self._engine.begin() as db:
            METADATA.create_all(db)
            version = db.execute(select(VERSIONS.c.version)).scalar_one_or_none()
            if version is None:
                db.execute(insert(VERSIONS).values(version=SCHEMA))
        if version is not None and version != SCHEMA:
            raise FailedPrecondition(
                f"the ledger has tables of version {version}, this release knows {SCHEMA}",
                reason="LEDGER_UNUSABLE",
                help="run the release that wrote it: verdicts and what was seen of other logs are in there alone",
            )

    def _new(self, row: Insert) -> bool:
        """Puts a row in; False where one of its key is there, whichever thread was first."""
        try:
            with self._transaction() as db:
                db.execute(row)
        except IntegrityError:
            return False
        return True

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Connection]:
        try:
            with self._engine.begin() as db:
                yield db
        except IntegrityError:
            raise
        except SQLAlchemyError as error:
            raise Unavailable(
                f"the ledger {_shown(self._engine.url)} does not answer: {_first_line(error)}",
                reason="LEDGER_UNAVAILABLE",
                help="is the database up, and the disk not full?",
            ) from error


def _audit(row: RowMapping) -> Audit:
    return Audit(row["index"], row["digest"], row["checkpoint"], row["attempts"], row["outcome"], row["verdict"])


def _configure_sqlite(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
    """Readers beside a writer, and every commit on the disk before it is acknowledged."""
    cursor = connection.cursor()
    for setting in ("journal_mode=WAL", "synchronous=FULL", f"busy_timeout={_BUSY_MS}"):
        cursor.execute(f"PRAGMA {setting}")
    cursor.close()


def _shown(url: URL | str) -> str:
    """Without its password."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return "(no URL)"


def _first_line(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error).strip().split("\n")[0]
