"""What every test shares: profiles, and the rule that CI leaves nothing out but GPU tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent

# Timings on shared machines are noisy: no example fails for being slow.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if os.environ.get("COUNTERSIGN_CI") and report.skipped and "gpu" not in item.keywords:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was left out in CI: {report.longrepr}"
    return report  # type: ignore[return-value]  # a wrapper hook returns its result through the generator


@pytest.fixture(scope="session")
def demo_models(root: Path) -> dict[str, Path]:
    """Folders of the demo pair, by role."""
    return {role: root / "infra" / "models" / f"demo-{role}" for role in ("target", "draft")}
