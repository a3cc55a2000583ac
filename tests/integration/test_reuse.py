"""A draft that takes KV of other requests to other positions: approximate there, and no token of an answer changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from stacks import Running, running_stack

from countersign.client import Client, GenerateOptions
from countersign.services.runtime.config import Reuse

HEAD = "import math\nimport os\n\n\n"
BODY = "".join(f"def area_{k}(radius, height):\n    return math.pi * radius * height * {k}\n\n\n" for k in range(12))
EDIT = "import json\nimport sys\nfrom pathlib import Path\n\n\n"
TAKEN = "KV of ended requests was taken"


@pytest.fixture(params=["off", "pie", "blend"])
def reuse(request: pytest.FixtureRequest) -> Reuse:
    mode: Reuse = request.param
    return mode


@pytest.fixture
def stack(reuse: Reuse, tmp_path: Path) -> Iterator[Running]:
    # Without lookup every proposal is the draft's.
    with running_stack(tmp_path / "data", f"draft.reuse={reuse}", "draft.lookup=0") as running:
        yield running


async def test_edited_prompts_get_the_tokens_that_they_get_without_a_draft(stack: Running, reuse: Reuse) -> None:
    accepted = 0
    async with Client(stack.router) as client:
        for number, prompt in enumerate((HEAD + BODY, EDIT + BODY, HEAD + BODY[300:] + EDIT + BODY[:300])):
            options: GenerateOptions = {
                "max_tokens": 32,
                "temperature": number % 2 * 0.8,
                "seed": number,
                "ignore_eos": True,
            }
            asked = prompt + "def volume(radius, "
            drafted = await client.complete(asked, **options)
            options["drafting"] = "off"
            alone = await client.complete(asked, **options)
            assert [token.id for token in drafted.tokens] == [token.id for token in alone.tokens]
            assert alone.usage.drafted_tokens == 0
            accepted += drafted.usage.accepted_tokens
    assert accepted > 10
    said = "".join(log.read_text() for log in (stack.data_dir / "logs").glob("draft*"))
    assert said.count(TAKEN) == (0 if reuse == "off" else 2)
