"""A log whose process is killed in the middle of appends."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from log_appender import __file__ as appender
from log_appender import entry

from countersign.verify import merkle
from countersign.verify.log.store import TileLog


def killed_again_and_again(folder: Path, times: int) -> None:
    """Never a lost acknowledged entry, never a bad root."""
    generator, frontier, known = random.Random(times), merkle.Frontier(), 0
    for number in range(times):
        acknowledged = _killed(folder, number, acks=generator.randrange(1, 12), delay=generator.random() * 0.004)
        with TileLog.open(folder) as log:
            assert log.size >= acknowledged > known
            for index in range(known, log.size):
                assert log.entry(index) == entry(index)
                frontier.append(merkle.leaf_hash(entry(index)))
            assert log.root() == frontier.root()
            assert merkle.verify_consistency(known, log.size, log.root(known), log.root(), log.consistency(known))
            for index in {0, known, log.size - 1, generator.randrange(log.size)}:
                leaf = merkle.leaf_hash(entry(index))
                assert merkle.verify_inclusion(leaf, index, log.size, log.inclusion(index), log.root())
            known = log.size


def _killed(folder: Path, seed: int, *, acks: int, delay: float) -> int:
    """The last size that the process acknowledged before it was killed with SIGKILL."""
    command = [sys.executable, appender, str(folder), str(seed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        lines = [process.stdout.readline() for _ in range(acks)]
        try:
            process.wait(delay)  # into the middle of an append
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        lines += process.stdout.readlines()
    assert process.returncode == -signal.SIGKILL
    return int([line for line in lines if line.endswith("\n")][-1])


def test_a_log_killed_ten_times_loses_nothing_acknowledged(tmp_path: Path) -> None:
    killed_again_and_again(tmp_path, 10)


@pytest.mark.long
def test_a_log_killed_a_hundred_times_loses_nothing_acknowledged(tmp_path: Path) -> None:
    killed_again_and_again(tmp_path, 100)
