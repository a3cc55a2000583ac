"""The transparency log and the form level: what a receipt costs to check, an entry to append, a proof to make.

    countersign bench log [--quick] [--json]

One core throughout. The form level reads a receipt of an answer of 64 tokens from bytes each time; the log is a folder
on the disk of the temporary files, durable after each batch.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pymerkle import InmemoryTree

from countersign.cli.bench import Row
from countersign.verify import cose_receipt, merkle
from countersign.verify.log.checkpoint import Checkpoint, KeyKind, NoteKey, cosign
from countersign.verify.log.checkpoint import sign as sign_checkpoint
from countersign.verify.log.store import TileLog
from countersign.verify.receipt import attach_proofs, sign, strip
from countersign.verify.testing import example_receipt, signing_key
from countersign.verify.trust import TrustPolicy, TrustRules

ORIGIN = "log.example/receipts"
TARGET, LOG, WITNESS = signing_key(1), signing_key(2), signing_key(3)
BATCH = 1024
PROOFS = 300


async def run(quick: bool) -> list[Row]:
    """Form level, appends, proofs."""
    rows = _form(300 if quick else 5000)
    with tempfile.TemporaryDirectory() as folder:
        rows += _appends(Path(folder) / "log", 50_000 if quick else 1_000_000)
        rows += _small_appends(Path(folder) / "small", 100 if quick else 1000)
        rows += _beside_pymerkle(Path(folder), 20_000 if quick else 100_000, 1 if quick else 3)
    return rows


def _form(count: int) -> list[Row]:
    """Milliseconds and receipts a second, bare and with a proof and a cosigned checkpoint to check too."""
    bare = sign(*example_receipt(range(100), range(64), stop=["\n\n"]), TARGET)
    rules = TrustRules(
        TrustPolicy(
            (TARGET.public_key(),),
            logs=(NoteKey(ORIGIN, LOG.public_key()),),
            witnesses=(NoteKey("witness.example", WITNESS.public_key(), KeyKind.WITNESS),),
            quorum=1,
            logged=True,
            now_unix_ms=1_800_000_000_000,
        )
    )
    plain = TrustRules(TrustPolicy((TARGET.public_key(),)))
    rows = []
    for case, data, check in (
        ("signature, schema, bounds", bare, plain.form),
        ("and inclusion in a log of 1 M, checkpoint, witness", _carrying(bare), rules.form),
    ):
        times = _times(lambda data=data, check=check: check(data), count)  # type: ignore[misc]
        worst, speed = statistics.quantiles(times, n=100)[98], len(times) / sum(times)
        median = statistics.median(times) * 1e3
        rows += [
            Row("log", case, "form level, p50", median, "ms", count, "<= 2", median <= 2),
            Row("log", case, "form level, p99", worst * 1e3, "ms", count),
            Row("log", case, "form level, one core", speed, "receipts/s", count, ">= 1000", speed >= 1000),
        ]
    return rows


def _carrying(data: bytes) -> bytes:
    """The receipt with a proof of 20 hashes, as in a log of a million, and the checkpoint of its tree."""
    index, size, leaf = 123_456, 1_000_000, merkle.leaf_hash(strip(data))
    path = [merkle.leaf_hash(b"%d" % step) for step, _ in enumerate(merkle.inclusion_ranges(index, size))]
    root = merkle.root_of_inclusion(leaf, index, size, path) or b""
    note = cosign(sign_checkpoint(Checkpoint(ORIGIN, size, root), LOG), WITNESS, "witness.example", time=1)
    return attach_proofs(data, [cose_receipt.prove_inclusion(root, size, index, path, LOG)], note)


def _appends(folder: Path, size: int) -> list[Row]:
    seconds = 0.0
    with TileLog.open(folder) as log:
        while log.size < size:
            entries = _entries(log.size, min(log.size + BATCH, size))
            begin = time.perf_counter()
            log.append(entries)
            seconds += time.perf_counter() - begin
        case = f"{size:,} entries of 976 bytes, {BATCH} a batch"
        speed = size / seconds
        rows = [Row("log", case, "durable appends", speed, "leaves/s", size, ">= 20000", speed >= 20_000)]
        rows += _proofs(log, _entries(7, 8)[0], case)
    begin = time.perf_counter()
    with TileLog.open(folder) as log:
        opened = time.perf_counter() - begin
        if log.size != size:
            raise RuntimeError(f"{log.size} of {size} entries are left")
    return [*rows, Row("log", case, "opening it again", opened, "s", 1)]


def _entries(begin: int, end: int) -> Sequence[bytes]:
    """Receipts that differ in eight bytes."""
    bare = strip(sign(*example_receipt(range(100), range(64)), TARGET))
    return [bare[:-8] + number.to_bytes(8, "big") for number in range(begin, end)]


def _proofs(log: TileLog, seventh: bytes, case: str) -> list[Row]:
    """Of random leaves and sizes, from the tiles."""
    draw, root = random.Random(1), log.root()
    inclusion = statistics.median(_times_of(log.inclusion, [draw.randrange(log.size) for _ in range(PROOFS)]))
    consistency = statistics.median(_times_of(log.consistency, [draw.randrange(1, log.size) for _ in range(PROOFS)]))
    leaf, path = merkle.leaf_hash(seventh), log.inclusion(7)
    check = statistics.median(_times(lambda: merkle.verify_inclusion(leaf, 7, log.size, path, root), PROOFS))
    return [
        Row("log", case, "inclusion proof", inclusion * 1e3, "ms", PROOFS),
        Row("log", case, "consistency proof", consistency * 1e3, "ms", PROOFS),
        Row("log", case, "checking an inclusion proof", check * 1e6, "us", PROOFS),
    ]


def _beside_pymerkle(folder: Path, size: int, turns: int) -> list[Row]:
    """The same entries in turns: ours durable in a folder, pymerkle's in memory."""
    entries = _entries(0, size)
    ours, theirs, draw = list[float](), list[float](), random.Random(2)
    indices = [draw.randrange(size) for _ in range(PROOFS)]
    for turn in range(turns):
        with TileLog.open(folder / str(turn)) as log:
            tree = InmemoryTree(algorithm="sha256")
            begin = time.perf_counter()
            for start in range(0, size, BATCH):
                log.append(entries[start : start + BATCH])
            middle = time.perf_counter()
            tree.append_entries(entries)
            ours.append(size / (middle - begin))
            theirs.append(size / (time.perf_counter() - middle))
            if log.root() != tree.get_root():
                raise RuntimeError("two roots for the same entries")
            proofs = [statistics.median(_times_of(log.inclusion, indices))]
            proofs.append(statistics.median(_times_of(tree.prove_inclusion, [index + 1 for index in indices])))
    case, peer = f"{size:,} entries of 976 bytes", "pymerkle in memory"
    speed, other = statistics.median(ours), statistics.median(theirs)
    return [
        Row("log", case, "durable appends", speed, "leaves/s", turns, peer=peer, ratio=speed / other),
        Row("log", case, "inclusion proof", proofs[0] * 1e3, "ms", PROOFS, peer=peer, ratio=proofs[0] / proofs[1]),
    ]


def _small_appends(folder: Path, count: int) -> list[Row]:
    """What one entry alone waits for: the disk."""
    entries = _entries(0, count)
    with TileLog.open(folder) as log:
        times = _times_of(lambda entry: log.append([entry]), entries)
    case = "one entry a batch"
    return [
        Row("log", case, "durable append, p50", statistics.median(times) * 1e3, "ms", count),
        Row("log", case, "durable append, p99", statistics.quantiles(times, n=100)[98] * 1e3, "ms", count),
    ]


def _times(action: Callable[[], object], count: int) -> list[float]:
    return _times_of(lambda _: action(), range(count))


def _times_of(action: Callable[[Any], object], values: Sequence[object]) -> list[float]:
    times = []
    for value in values:
        begin = time.perf_counter()
        action(value)
        times.append(time.perf_counter() - begin)
    return times
