"""One real stack for all integration tests, with the demo pair."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from stacks import Running, running_stack


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running_stack(tmp_path_factory.mktemp("stack") / "data") as running:
        yield running
