"""The tables of the auditor's ledger; ``ledger`` says what they are for."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, Index, LargeBinary, MetaData, String, Table

METADATA = MetaData()
VERSIONS = Table("schema", METADATA, Column("version", BigInteger, primary_key=True, autoincrement=False))
RECEIPTS = Table(
    "receipts",
    METADATA,
    Column("index", BigInteger, primary_key=True, autoincrement=False),
    Column("digest", LargeBinary(32), nullable=False, unique=True),
    Column("request_id", String(64), nullable=False, index=True),
)
REFUSED = Table(
    "refused",
    METADATA,
    Column("sha256", LargeBinary(32), primary_key=True),
    Column("reason", String(400), nullable=False),
    Column("at_unix_ms", BigInteger, nullable=False),
)
CHECKPOINTS = Table(
    "checkpoints",
    METADATA,
    Column("size", BigInteger, primary_key=True, autoincrement=False),
    Column("note", LargeBinary, nullable=False),
    Column("published", Boolean, nullable=False),
    Index("checkpoints_outbox", "published", "size"),
)
AUDITS = Table(
    "audits",
    METADATA,
    Column("index", BigInteger, primary_key=True, autoincrement=False),
    Column("digest", LargeBinary(32), nullable=False, unique=True),
    Column("checkpoint", BigInteger, nullable=False),
    Column("attempts", BigInteger, nullable=False),
    Column("due_unix_ms", BigInteger, nullable=False),
    Column("outcome", String(16)),
    Column("verdict", LargeBinary),
    Column("published", Boolean, nullable=False),
    Index("audits_due", "outcome", "due_unix_ms"),
    Index("audits_outbox", "published", "outcome"),
)
LAST_SEEN = Table(
    "last_seen",
    METADATA,
    Column("origin", String(255), primary_key=True),
    Column("note", LargeBinary, nullable=False),
)
CONFLICTS = Table(
    "conflicts",
    METADATA,
    Column("sha256", LargeBinary(32), primary_key=True),
    Column("origin", String(255), nullable=False),
    Column("evidence", LargeBinary, nullable=False),
    Column("at_unix_ms", BigInteger, nullable=False),
    Column("published", Boolean, nullable=False),
)
