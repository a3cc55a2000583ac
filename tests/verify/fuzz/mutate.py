"""Changes real objects at random and hands them to the verifier: python mutate.py [--runs N] [--seed S] [TARGET ...].

Exits 1 at the first input that lets another error out than ``VerificationError``, needs more than 50 ms of processor
time (the best of five), or more than 50 MB of address space beyond what the process had; the input is printed.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "support"))

from fuzz_targets import MAX_INPUT_BYTES, SEEDS, TARGETS, survives
from mutations import mutated

MAX_SECONDS = 0.05
HEADROOM = 50 * 1024 * 1024


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("targets", nargs="*", default=sorted(TARGETS))
    options = parser.parse_args()
    draw, slowest = random.Random(options.seed), 0.0
    for name in options.targets:
        survives(name, TARGETS[name].seeds[0])
    for run in range(options.runs):
        if run % 1000 == 0:
            _limit_memory()
        name = options.targets[run % len(options.targets)]
        data = mutated(draw.choice(TARGETS[name].seeds), draw, SEEDS, MAX_INPUT_BYTES)
        try:
            seconds = _seconds(name, data)
            if seconds > MAX_SECONDS:
                seconds = min(_seconds(name, data) for _ in range(5))
        except Exception as error:  # noqa: BLE001  that is what is looked for
            print(f"run {run}, {name}: {error!r} for {data.hex()}")
            return 1
        slowest = max(slowest, seconds)
        if seconds > MAX_SECONDS:
            print(f"run {run}, {name}: {seconds * 1e3:.0f} ms for {data.hex()}")
            return 1
    print(f"{options.runs} inputs survived, the slowest in {slowest * 1e3:.1f} ms")
    return 0


def _seconds(name: str, data: bytes) -> float:
    begin = time.thread_time()
    survives(name, data)
    return time.thread_time() - begin


def _limit_memory() -> None:
    """From here on the process may grow by the headroom; more is a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + HEADROOM, hard))


if __name__ == "__main__":
    sys.exit(main())
