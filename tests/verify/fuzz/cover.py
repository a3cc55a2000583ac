"""Fuzzing that follows coverage, by atheris: python cover.py CORPUS [libFuzzer's options, such as -runs=1000000].

The first byte of an input picks the target, the rest is what it reads. CORPUS is a folder that is filled with the real
objects first and then with what reaches new code. ``VerificationError`` is survival; all else is a crash, and so is an
input that takes a second (libFuzzer counts whole ones; ``mutate.py`` measures 50 ms).
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "support"))

with atheris.instrument_imports(include=["countersign.verify"]):
    from fuzz_targets import MAX_INPUT_BYTES, TARGETS, survives

NAMES = sorted(TARGETS)


def one(data: bytes) -> None:
    if data:
        survives(NAMES[data[0] % len(NAMES)], data[1:])


def main() -> None:
    corpus = Path(sys.argv[1])
    corpus.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(NAMES):
        for seed in TARGETS[name].seeds:
            content = bytes([number]) + seed
            (corpus / hashlib.sha256(content).hexdigest()).write_bytes(content)
    atheris.Setup([*sys.argv, f"-max_len={MAX_INPUT_BYTES}", "-timeout=1", "-rss_limit_mb=2048"], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
