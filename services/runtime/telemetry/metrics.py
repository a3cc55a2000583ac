"""Every number that a process tells of itself: one table, and what makes an instrument of a row.

Unless the process serves metrics (endpoint.py), all of this does nothing. The table is also the bound on cardinality: a
row names all attributes that its series may have, none of which can hold a request, a tenant or a text.
docs/telemetry.md is written from it, and a test holds that.
"""

from __future__ import annotations

from countersign.services.runtime.telemetry import attributes as names
from countersign.services.runtime.telemetry.instruments import NOTHING, Counter, Histogram, Instrument, Meter, Read

# OpenTelemetry's attribute names: those of its conventions where there is one, else ours.
OPERATION, PROVIDER, MODEL = names.OPERATION, names.PROVIDER, names.REQUEST_MODEL
TOKEN_TYPE = "gen_ai.token.type"  # noqa: S105  the conventions' name, no secret
ERROR = "error.type"
FINISH = "countersign.finish_reason"
STATE = "countersign.state"
OUTCOME = "countersign.outcome"
LEVEL = "countersign.audit.level"
TIER = "countersign.tier"
DIRECTION = "countersign.ring.direction"
PROPERTY = "countersign.property"
SOURCE = "countersign.source"
CONSTRAINT = "countersign.constraint"


# Boundaries that fit a model of a few million parameters on two cores, and one of many billions on GPUs: those that
# the conventions give for gen_ai.server.*, and more of them at both ends.
_FIRST = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 30, 60, 120)
_TOKEN = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
_WHOLE = (
    0.01,
    0.02,
    0.04,
    0.08,
    0.16,
    0.32,
    0.64,
    1.28,
    2.56,
    5.12,
    10.24,
    20.48,
    40.96,
    81.92,
    163.84,
    327.68,
    655.36,
)
_STEP = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_LENGTH = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
_BATCH = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024)
_RUN = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32)
_SHARE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.5, 2, 5, 10)

_ASKED = (OPERATION, PROVIDER, MODEL)

# What clients see, at the router.
REQUEST_DURATION = Instrument(
    "gen_ai.server.request.duration", "histogram", "s", "router",
    "a request, from its arrival to its last event; error.type where it failed", (*_ASKED, ERROR), _WHOLE,
)  # fmt: skip
TIME_TO_FIRST_TOKEN = Instrument(
    "gen_ai.server.time_to_first_token", "histogram", "s", "router",
    "from a request's arrival to its first token", _ASKED, _FIRST,
)  # fmt: skip
TIME_PER_OUTPUT_TOKEN = Instrument(
    "gen_ai.server.time_per_output_token", "histogram", "s", "router",
    "between two tokens after the first, on average over an answer", _ASKED, _TOKEN,
)  # fmt: skip
REQUEST_TOKENS = Instrument(
    "countersign.request.tokens", "histogram", "{token}", "router",
    "tokens of a prompt (input) and of its answer (output)", (MODEL, TOKEN_TYPE), _LENGTH,
)  # fmt: skip
REQUESTS = Instrument(
    "countersign.requests", "counter", "{request}", "router",
    "requests by how they ended: stop, length, cancelled, deadline, error, refused, failed, left (by their client)",
    (MODEL, FINISH),
)  # fmt: skip
REQUESTS_OPEN = Instrument(
    "countersign.router.requests.open", "gauge", "{request}", "router", "requests whose client waits"
)
REQUESTS_LIMIT = Instrument(
    "countersign.router.requests.limit", "gauge", "{request}", "router", "how many may be open at once"
)
TAKEOVERS = Instrument(
    "countersign.takeovers", "counter", "{request}", "router", "requests moved past a target that is gone or silent"
)

# The model's passes, at the target.
TARGET_REQUESTS = Instrument(
    "countersign.target.requests", "gauge", "{request}", "target",
    "requests here: running ones have pages of KV, waiting ones are the queue", (STATE,),
)  # fmt: skip
TARGET_LIMIT = Instrument(
    "countersign.target.requests.limit", "gauge", "{request}", "target", "how many may be here at once"
)
PENDING_PROMPT = Instrument(
    "countersign.target.prompt.pending", "gauge", "{token}", "target", "tokens of prompts that have no KV yet"
)
QUEUE_DURATION = Instrument(
    "countersign.target.queue.duration", "histogram", "s", "target",
    "from a request's arrival at the target to its admission", (), _FIRST,
)  # fmt: skip
PASS_DURATION = Instrument(
    "countersign.pass.duration", "histogram", "s", "target", "one forward pass over a batch", (), _STEP
)
PASS_REQUESTS = Instrument(
    "countersign.pass.requests", "histogram", "{request}", "target", "requests of a pass: the batch size", (), _BATCH
)
PASS_FED = Instrument(
    "countersign.pass.fed", "histogram", "{token}", "target",
    "tokens that a pass computed: of prompts, known ones, proposals", (), _LENGTH,
)  # fmt: skip
ROUNDS = Instrument(
    "countersign.rounds", "counter", "{round}", "target",
    "turns of requests in passes that gave them tokens; output tokens over rounds are tokens per pass",
)  # fmt: skip
ROUND_ACCEPTED = Instrument(
    "countersign.round.accepted", "histogram", "{token}", "target",
    "proposals that a pass accepted of a request that had any", (), _RUN,
)  # fmt: skip
TOKENS_DRAFTED = Instrument(
    "countersign.draft.proposed", "counter", "{token}", "target", "proposals that were verified"
)
TOKENS_ACCEPTED = Instrument(
    "countersign.draft.accepted", "counter", "{token}", "target", "proposals that were the target's own tokens"
)
TOKENS = Instrument(
    "countersign.target.tokens", "counter", "{token}", "target",
    "tokens: prompt ones computed (input), and sampled ones (output)", (TOKEN_TYPE,), values=("input", "output"),
)  # fmt: skip
PREEMPTIONS = Instrument(
    "countersign.target.preemptions", "counter", "{request}", "target",
    "requests that gave their pages back, to be computed again",
)  # fmt: skip
DRAFT_DURATION = Instrument(
    "countersign.draft.call.duration", "histogram", "s", "target",
    "a call for proposals to the draft; error.type where it failed", (ERROR,), _STEP,
)  # fmt: skip
PREFIX_QUERIED = Instrument(
    "countersign.prefix.queried", "counter", "{token}", "target", "prompt tokens whose KV was looked for"
)
PREFIX_FOUND = Instrument(
    "countersign.prefix.found", "counter", "{token}", "target",
    "prompt tokens whose KV was found, here or in a store, and not computed",
)  # fmt: skip
PAGES = Instrument(
    "countersign.kv.pages", "gauge", "{page}", "target",
    "pages of KV: held by requests (used), kept for the next ones (cached), free; their sum is all", (STATE,),
)  # fmt: skip
PAGES_EVICTED = Instrument(
    "countersign.kv.pages.evicted", "observed counter", "{page}", "target", "cached pages given up for room"
)
COMMIT_DURATION = Instrument(
    "countersign.commit.duration", "histogram", "s", "target",
    "from an append to the log to its acknowledgement, retries included", (), _STEP,
)  # fmt: skip
COMMIT_CONFLICTS = Instrument(
    "countersign.commit.conflicts", "counter", "{append}", "target",
    "appends that the log refused, by what was there: fenced, cancelled, closed", (OUTCOME,),
    values=("fenced", "cancelled", "closed"),
)  # fmt: skip
RECEIPTS_MADE = Instrument("countersign.receipts.made", "counter", "{receipt}", "target", "receipts signed and stored")
RING_BYTES = Instrument(
    "countersign.ring.sent", "observed counter", "By", "target",
    "bytes between ranks: queries passed on (forward), partials sent home (back)", (DIRECTION,),
)  # fmt: skip

# The draft.
DRAFT_SEQUENCES = Instrument(
    "countersign.draft.sequences", "gauge", "{request}", "draft", "requests whose KV the draft holds"
)
DRAFT_BATCH_DURATION = Instrument(
    "countersign.draft.batch.duration", "histogram", "s", "draft", "proposals for one batch", (), _STEP
)
DRAFT_REUSED = Instrument(
    "countersign.draft.reused", "observed counter", "{token}", "draft", "tokens whose KV was taken of ended requests"
)

# The store of KV blocks.
STORE_BYTES = Instrument("countersign.store.bytes", "gauge", "By", "kv", "bytes of blocks", (TIER,))
STORE_CAPACITY = Instrument("countersign.store.capacity", "gauge", "By", "kv", "bytes that fit", (TIER,))
STORE_BLOCKS = Instrument("countersign.store.blocks", "gauge", "{block}", "kv", "blocks that are known")
STORE_EVICTIONS = Instrument(
    "countersign.store.evictions", "observed counter", "{block}", "kv", "blocks given up for room", (TIER,)
)
STORE_LOOKUPS = Instrument(
    "countersign.store.lookups", "observed counter", "{block}", "kv", "blocks that were looked for"
)
STORE_HITS = Instrument("countersign.store.hits", "observed counter", "{block}", "kv", "blocks that were found")
STORE_SEALED = Instrument("countersign.store.sealed", "observed counter", "{block}", "kv", "blocks that were put")
STORE_DAMAGED = Instrument(
    "countersign.store.damaged", "observed counter", "{block}", "kv", "blocks on disk that were not what was written"
)

# The auditor.
RECEIPTS_TAKEN = Instrument(
    "countersign.auditor.receipts", "counter", "{receipt}", "auditor",
    "receipts that came: logged, known, refused, later (no key yet)", (OUTCOME,),
    values=("logged", "known", "refused", "later"),
)  # fmt: skip
VERDICTS = Instrument(
    "countersign.auditor.verdicts", "counter", "{receipt}", "auditor",
    "audits by verdict: pass, fail, inconclusive", (OUTCOME,), values=("pass", "fail", "inconclusive"),
)  # fmt: skip
AUDIT_DURATION = Instrument(
    "countersign.audit.duration", "histogram", "s", "auditor", "one audit, all its levels", (), _WHOLE
)
AUDIT_DELAY = Instrument(
    "countersign.audit.delay", "histogram", "s", "auditor",
    "from a receipt's signature to its verdict", (), (*_WHOLE, 1310.72, 3600, 7200, 86400),
)  # fmt: skip
AUDIT_LIMIT_USED = Instrument(
    "countersign.audit.limit_used", "histogram", "1", "auditor",
    "a level's mean distance from the reference over its limit; what is left to 1 is the margin", (LEVEL,), _SHARE,
)  # fmt: skip
AUDITS_WAITING = Instrument(
    "countersign.auditor.audits.waiting", "gauge", "{receipt}", "auditor", "receipts that were drawn and wait"
)
LOG_SIZE = Instrument("countersign.log.size", "gauge", "{receipt}", "auditor", "entries of the transparency log")
EQUIVOCATIONS = Instrument(
    "countersign.log.equivocations", "gauge", "{log}", "auditor", "proofs that a log showed two histories"
)

# The sidecar.
VIOLATIONS = Instrument(
    "countersign.protocol.violations", "counter", "{violation}", "sidecar",
    "steps of the commit protocol that its specification does not allow", (PROPERTY,),
    values=(
        "Agreement", "AppendOnly", "BilledIsCommitted", "ClosedIsFinal", "ExactlyOnce", "Fenced", "Lawful",
        "OneReceipt", "OnlyVerified",
    ),
)  # fmt: skip
WATCHED = Instrument(
    "countersign.protocol.watched", "observed counter", "{request}", "sidecar", "requests whose steps were checked"
)

# Every process.
BUS_DROPPED = Instrument(
    "countersign.bus.dropped", "observed counter", "{message}", "all", "messages lost because they came too fast"
)

# What it takes, at the target.
ENERGY = Instrument(
    "countersign.energy", "observed counter", "J", "target",
    "energy of the devices that the target can read, whoever uses them", (SOURCE,),
)  # fmt: skip
ENERGY_AVAILABLE = Instrument(
    "countersign.energy.available", "gauge", "{source}", "target", "1 where energy is read, else 0", (SOURCE,)
)
UTILISATION = Instrument(
    "countersign.utilisation", "gauge", "1", "target",
    "how busy: processor (this process, of all cores), gpu, gpu_memory (the share of time it was read or written)",
    (SOURCE,),
)  # fmt: skip
CONSTRAINT_NOW = Instrument(
    "countersign.constraint", "gauge", "{state}", "target",
    "1 for what bounds the model's speed, as far as it can be told: compute, memory, unknown", (CONSTRAINT,),
)  # fmt: skip

TABLE: tuple[Instrument, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Instrument))
"""All rows, in the order above."""


class _Process:
    """Which meter makes instruments where no other is given; None: nobody looks."""

    meter: Meter | None = None


def start(meter: Meter) -> None:
    """Instruments of this process are this meter's. Those that were made before count nothing."""
    _Process.meter = meter


def counter(row: Instrument, meter: Meter | None = None) -> Counter:
    """See :meth:`Meter.counter`; of the process's meter when none is given."""
    meter = meter or _Process.meter
    return NOTHING if meter is None else meter.counter(row)


def histogram(row: Instrument, meter: Meter | None = None) -> Histogram:
    """See :meth:`Meter.histogram`; of the process's meter when none is given."""
    meter = meter or _Process.meter
    return NOTHING if meter is None else meter.histogram(row)


def observe(row: Instrument, read: Read, meter: Meter | None = None) -> None:
    """See :meth:`Meter.observe`; by the process's meter when none is given."""
    meter = meter or _Process.meter
    if meter is not None:
        meter.observe(row, read)
