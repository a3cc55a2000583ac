"""Hidden tokens that are drawn are opened without keeping those waiting whose answers are streamed."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from countersign.services.protocol.commit import LogState
from countersign.services.router import drawing
from countersign.services.router.drawing import Draws
from countersign.verify.coin import challenge
from countersign.verify.coin.challenge import Challenge, Demand
from countersign.verify.openings import Openings
from countersign.verify.partial import LeafOpenings
from countersign.verify.receipt import HiddenMarkers, parse, sign
from countersign.verify.testing import example_receipt, signing_key

BEACON = bytes(range(32))


@dataclass
class OneJournal:
    """Keeps what is appended."""

    kept: dict[str, bytes] = field(default_factory=dict)

    async def append(self, subject: str, data: bytes, **_: object) -> None:
        self.kept[subject] = data


async def test_leaves_are_hashed_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    receipt, openings = example_receipt(output=(1, *range(10, 70), 2, 7), hidden=HiddenMarkers(1, 2))
    data, threads, respond = sign(receipt, openings, signing_key()), list[int](), challenge.respond

    def watched(request_id: str, opened: Openings, asked: Challenge) -> LeafOpenings:
        threads.append(threading.get_ident())
        return respond(request_id, opened, asked)

    monkeypatch.setattr(challenge, "respond", watched)
    monkeypatch.setattr(drawing, "openings_of", lambda _: openings)
    journal = OneJournal()
    leaves, opened = await Draws(cast(Any, journal), 8).opened(LogState("example-1"), data, BEACON)
    assert list(journal.kept.values()) == [BEACON]
    signed = parse(data)
    asked = challenge.draw(signed, BEACON, Demand(leaves=leaves))
    assert len(challenge.check(signed, asked, challenge.decode(opened))) >= leaves == 8
    assert threads
    assert threads[0] != threading.get_ident()
