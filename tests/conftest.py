"""What every test shares: profiles, and the rule that CI leaves nothing out but GPU tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# Tests run beside each other and beside whole stacks: one thread a process is faster than two that wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Triton reads it once, when anything first imports it. Without a GPU its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parent.parent

# A shell that starts this in the background may leave SIGINT ignored, and children inherit that; tests send it to them.
signal.signal(signal.SIGINT, signal.default_int_handler)

LEFT_OUT = pytest.StashKey[list[str]]()

# Timings on shared machines are noisy: no example fails for being slow.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if os.environ.get("LEAVE_NOTHING_OUT") and report.skipped and "gpu" not in item.keywords:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was left out in CI: {report.longrepr}"
    return report


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("long"):
            item.config.stash.setdefault(LEFT_OUT, []).append(item.nodeid)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name what was left to another run, so that nothing is left out unseen."""
    names: list[str] = terminalreporter.config.stash.get(LEFT_OUT, list[str]())
    for name in sorted(names):
        terminalreporter.write_line(f"left to `make test-long`: {name}")


@pytest.fixture(scope="session")
def demo_models(root: Path) -> dict[str, Path]:
    """Folders of the demo pair, by role."""
    return {role: root / "infra" / "models" / f"demo-{role}" for role in ("target", "draft")}
