"""Debian's Prometheus with this repository's configuration and rules, on a port of its own."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest

INFRA = Path(__file__).resolve().parents[2] / "infra"
_START_S = 60.0
# Ours for people who look at minutes; a test has seconds.
_FASTER = {
    "scrape_interval: 5s": "scrape_interval: 1s",
    "scrape_timeout: 4s": "scrape_timeout: 1s",
    "evaluation_interval: 15s": "evaluation_interval: 1s",
    "refresh_interval: 5s": "refresh_interval: 1s",
}


@dataclass(frozen=True, slots=True)
class Prometheus:
    """One that runs."""

    url: str

    def ask(self, what: str, **parameters: object) -> Any:
        """Of its HTTP API, ``data``; an expression that it refuses is a failure."""
        try:
            with urlopen(f"{self.url}/api/v1/{what}?{urlencode(parameters)}", timeout=30) as reply:
                return json.load(reply)["data"]
        except HTTPError as error:
            pytest.fail(f"{what} {parameters}: {error.read().decode()}")

    def now(self, expression: str) -> list[tuple[Mapping[str, str], float]]:
        """The series of an expression, with their values."""
        found = self.ask("query", query=expression)["result"]
        return [(each["metric"], float(each["value"][1])) for each in found]

    def over(self, expression: str, seconds: float) -> list[list[float]]:
        """The values of each series until now, second by second."""
        now = time.time()
        found = self.ask("query_range", query=expression, start=now - seconds, end=now, step=1)["result"]
        return [[float(value) for _, value in each["values"]] for each in found]


def promtool(*arguments: object) -> tuple[int, str]:
    """Exit code, and what it says."""
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("no promtool here: apt-get install prometheus")
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout + done.stderr


@contextlib.contextmanager
def prometheus(folder: Path, discovery: str) -> Iterator[Prometheus]:
    """One that asks ``discovery`` whom to scrape, every second, and runs inside."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("no Prometheus here: apt-get install prometheus")
    text = (INFRA / "prometheus" / "prometheus.yml").read_text()
    for ours, faster in {**_FASTER, "http://127.0.0.1:9464/targets": discovery}.items():
        assert ours in text
        text = text.replace(ours, faster)
    folder.mkdir()
    shutil.copy(INFRA / "prometheus" / "rules.yml", folder)
    config, log = folder / "prometheus.yml", folder / "log"
    config.write_text(text)
    command = [program, f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}",
               "--web.listen-address=127.0.0.1:0", "--enable-feature=exemplar-storage"]  # fmt: skip
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
        try:
            yield Prometheus(f"http://{_address(process, log)}")
        finally:
            process.terminate()
            process.wait(30)


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    """Once it answers."""
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and process.poll() is None:
        found = re.search(r'"Listening on" address=(\S+)', log.read_text())
        if found and _is_ready(found[1]):
            return found[1]
        time.sleep(0.05)
    pytest.fail(f"Prometheus did not start:\n{log.read_text()}")


def _is_ready(address: str) -> bool:
    try:
        with urlopen(f"http://{address}/-/ready", timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:  # it says 503 until its storage is open
        return False
