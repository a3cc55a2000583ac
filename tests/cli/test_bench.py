"""Benchmarks are found by name, and a row says what DESIGN.md section 12 asks for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from countersign.cli import bench
from countersign.cli.bench import Row
from countersign.services.runtime.errors import NotFound


def test_every_benchmark_of_the_checkout_loads(root: Path) -> None:
    names = [path.stem for path in (root / "benchmarks").glob("*.py")]
    assert names
    for name in names:
        assert callable(bench.load(name).run)


@pytest.mark.parametrize("name", ["hause", "../setup", "", "results"])
def test_an_unknown_benchmark_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(NotFound) as caught:
        bench.load(name)
    assert "house" in caught.value.help


def test_the_rows_kept_so_far_have_every_field_and_no_missed_bar_is_hidden(root: Path) -> None:
    needed = {"bench", "case", "metric", "value", "unit", "n", "commit", "machine", "when"}
    for file in (root / "benchmarks" / "results").glob("*.jsonl"):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            assert needed <= set(row)
            assert ("bar" in row) == ("met" in row)
            assert row["bench"] == file.stem


def test_a_row_without_a_peer_or_a_bar_leaves_them_out() -> None:
    row = bench.stamped(Row("house", "case", "metric", 1.0, "s", 3))
    assert {"peer", "ratio", "bar", "met"}.isdisjoint(row)
    assert row["n"] == 3
