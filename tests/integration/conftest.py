"""One real stack for all integration tests, with the demo pair."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from stacks import Running, start_stack, stop_stack


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = start_stack(tmp_path_factory.mktemp("stack") / "data")
    yield running
    assert stop_stack(running) == 0
