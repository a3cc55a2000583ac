"""Proposals as the target asks for them: what it looks up itself, and what it leaves to the draft service."""

from __future__ import annotations

import logging
from typing import Any, cast

import pytest

from countersign.services.engine.generation import Generation
from countersign.services.engine.speculation import Draft
from countersign.services.runtime.config import DraftConfig
from countersign.services.runtime.errors import Unavailable
from countersign.services.target.drafts import Drafts
from countersign.services.target.session import Session
from countersign.v1.commit_pb2 import Opened
from countersign.v1.draft_pb2 import Proposal, ProposedTokens, ProposeRequest, ProposeResponse
from countersign.v1.sampling_pb2 import Drafting, SamplingParams

REPEATED, NEW = [1, 2, 3, 4, 5, 1, 2, 3], [1, 2, 3, 4, 5]


class DraftService:
    """Answers every ask with token 9, or not at all."""

    def __init__(self, *, dead: bool = False) -> None:
        self.asked: list[str] = []
        self._dead = dead

    async def call(self, service: str, method: str, request: Any, response: Any, **_: float) -> Any:
        if self._dead:
            raise Unavailable("nobody listens", reason="NO_RESPONDERS")
        if not isinstance(request, ProposeRequest):
            return response()
        self.asked += [sequence.request_id for sequence in request.sequences]
        return ProposeResponse(
            proposals=[
                Proposal(request_id=sequence.request_id, tokens=ProposedTokens(ids=[9] * sequence.count))
                for sequence in request.sequences
            ]
        )


def drafts_of(bus: DraftService, config: DraftConfig | None = None) -> Drafts:
    return Drafts(cast("Any", bus), config or DraftConfig(), 100, lambda: 0.0, logging.getLogger("test"))


def session(name: str, tokens: list[int], *, left: int = 50, drafting: int = Drafting.DRAFTING_UNSPECIFIED) -> Session:
    opened = Opened(prompt_token_ids=tokens, sampling=SamplingParams(max_tokens=left), drafting=cast("Any", drafting))
    generation = Generation(name, list(tokens), left)
    return Session(name, opened, cast("Any", None), cast("Any", None), generation)


async def test_what_repeats_is_looked_up_and_only_the_rest_is_asked_of_the_draft() -> None:
    bus = DraftService()
    found = await drafts_of(bus).propose([session("repeated", REPEATED), session("new", NEW)])
    assert found == {"repeated": Draft((4, 5, 1, 2, 3)), "new": Draft((9, 9, 9, 9))}
    assert bus.asked == ["new"]


async def test_a_dead_draft_service_leaves_what_is_looked_up() -> None:
    found = await drafts_of(DraftService(dead=True)).propose([session("repeated", REPEATED), session("new", NEW)])
    assert set(found) == {"repeated"}


async def test_lookups_can_be_turned_off() -> None:
    bus = DraftService()
    found = await drafts_of(bus, DraftConfig(lookup=0)).propose([session("repeated", REPEATED)])
    assert found == {"repeated": Draft((9, 9, 9, 9))}


async def test_a_request_without_drafting_gets_no_proposals_of_either_kind() -> None:
    bus = DraftService()
    off = session("repeated", REPEATED, drafting=Drafting.DRAFTING_OFF)
    assert await drafts_of(bus).propose([off]) == {}
    assert bus.asked == []


@pytest.mark.parametrize(("left", "most"), [(1, 0), (2, 1), (3, 2), (50, 5)])
async def test_no_more_is_proposed_than_can_still_be_answered(left: int, most: int) -> None:
    found = await drafts_of(DraftService()).propose([session("repeated", REPEATED, left=left)])
    assert len(found.get("repeated", Draft())) == most


async def test_a_request_that_ended_is_forgotten() -> None:
    drafts = drafts_of(DraftService())
    await drafts.propose([session("one", REPEATED)])
    await drafts.forget("one")
    other = [7, 7, 8, 8, 6, 1, 2, 3]
    assert await drafts.propose([session("one", other)]) == {"one": Draft((9, 9, 9, 9))}
