"""Whatever bytes the verifier is fed: only ``VerificationError`` escapes, soon, and in little memory."""

from __future__ import annotations

import random
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from fuzz_targets import MAX_INPUT_BYTES, OPENINGS, RECEIPT, RULES, SEEDS, SIGNED, TARGET, TARGETS, survives
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import mutated

from countersign.verify import envelope, payload
from countersign.verify.errors import Malformed, VerificationError
from countersign.verify.log import checkpoint as notes
from countersign.verify.log.tiles import pack_entries
from countersign.verify.partial import LeafOpenings, PartialOpenings
from countersign.verify.receipt import Openings

MAX_SECONDS = 0.05
MAX_BYTES = 50 * 1024 * 1024
NAMES = st.sampled_from(sorted(TARGETS))


def test_every_seed_is_taken_by_its_target() -> None:
    """A fuzzer that begins from refused inputs would find little behind the refusal."""
    for name, target in TARGETS.items():
        taken = 0
        for seed in target.seeds:
            with suppress(VerificationError):
                target.read(seed)
                taken += 1
        assert taken, name


@settings(max_examples=500)
@given(NAMES, st.binary(max_size=200))
def test_random_bytes_give_a_verification_error_at_most(name: str, data: bytes) -> None:
    survives(name, data)


@settings(max_examples=3000)
@given(NAMES, st.integers(0, 2**32))
def test_changed_objects_give_a_verification_error_at_most(name: str, seed: int) -> None:
    draw = random.Random(seed)
    survives(name, mutated(draw.choice(TARGETS[name].seeds), draw, SEEDS, MAX_INPUT_BYTES))


def _opened(openings: Openings | PartialOpenings) -> bytes:
    return envelope.seal(payload.encode(RECEIPT), openings, TARGET).encode()


def _full() -> bytes:
    ids = envelope.MAX_RECEIPT_BYTES // 4 - 1000
    return _opened(Openings(OPENINGS.salt_key, tuple(range(ids)), (), ()))


def _partial() -> bytes:
    count = envelope.MAX_RECEIPT_BYTES // 36 - 1000
    leaves = LeafOpenings(tuple(range(count)), (bytes(32),) * count, ())
    return _opened(PartialOpenings((), (), bytes(32), bytes(32), leaves))


def _note() -> bytes:
    line = notes.NoteSignature("log.example", b"abcd", bytes(700)).line()
    return b"log.example\n5\n" + b"A" * 43 + b"=\n\n" + (line * notes.MAX_SIGNATURES).encode()


ITEMS = envelope.MAX_RECEIPT_BYTES - 6

# The largest inputs that each reader takes up, and the worst that fits into them.
LARGEST: dict[str, tuple[Callable[[bytes], object], Callable[[], bytes]]] = {
    "openings": (RULES.form, _full),
    "partial openings": (RULES.form, _partial),
    "payload": (RULES.form, lambda: envelope.seal(b"\x80" * envelope.MAX_PAYLOAD_BYTES, None, TARGET).encode()),
    "many items": (RULES.form, lambda: b"\xd2\x9a" + ITEMS.to_bytes(4, "big") + b"\x80" * ITEMS),
    "deep": (RULES.form, lambda: b"\xd2" + b"\x81" * ITEMS + b"\x80"),
    "a huge length": (RULES.form, lambda: b"\xd2\x84\x5b\xff\xff\xff\xff\xff\xff\xff\xff" + SIGNED),
    "note": (RULES.checkpoint, _note),
    "tile": (TARGETS["tile"].read, lambda: b"tile/0/000\n" + pack_entries([bytes(65_535)] * 256)),
    "path": (TARGETS["proof"].read, lambda: bytes(16) + b"\x01" * 1024 * 1024),
}


@pytest.mark.parametrize("case", sorted(LARGEST))
def test_the_largest_inputs_take_less_than_50_mb(case: str) -> None:
    read, make = LARGEST[case]
    data = make()
    tracemalloc.start()
    with suppress(VerificationError):
        read(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MAX_BYTES


def test_one_byte_more_than_the_largest_is_refused_unread() -> None:
    with pytest.raises(Malformed, match="larger than any receipt"):
        RULES.form(bytes(envelope.MAX_RECEIPT_BYTES + 1))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_million_changed_objects_are_survived_each_within_50_ms_and_50_mb() -> None:
    """Processor time of this thread, so that others on the machine do not count; memory by address space."""
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("mutate.py")), "--runs", "1000000"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_million_inputs_that_follow_coverage_are_survived(tmp_path: Path) -> None:
    pytest.importorskip("atheris")  # its wheels are for x86-64 alone
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("cover.py")), str(tmp_path), "-runs=1000000"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.mark.long
def test_the_largest_inputs_take_less_than_50_ms() -> None:
    for case, (read, make) in LARGEST.items():
        data = make()
        best = min(_seconds(read, data) for _ in range(5))
        assert best < MAX_SECONDS, case


def _seconds(read: Callable[[bytes], object], data: bytes) -> float:
    begin = time.thread_time()
    with suppress(VerificationError):
        read(data)
    return time.thread_time() - begin
