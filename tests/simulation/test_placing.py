"""What a request meets that comes while targets restart: a router, targets and a client in virtual time, no noise."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from tests.simulation.clients import Ask
from tests.simulation.network import TTL_S, Noise
from tests.simulation.world import Fault, Plan, World

from countersign.services.router.placing import REPLACED_S

TARGET = 1  # of the processes there are, the first that is no router
ASK = Ask(at=1.2, prompt=5, max_tokens=8, drafting=False, seeded=True)
# From a target's start to the end of such an answer.
SOON = 0.5


class Story(World):
    """Remembers what its one client was told, and when."""

    def __init__(self, plan: Plan) -> None:
        self.told: list[tuple[float, str]] = []
        super().__init__(plan)

    def note(self, text: str) -> None:
        super().note(text)
        if told := re.fullmatch(r"client r0: ([a-z]+|\w+ [A-Z_]+)", text):
            self.told.append((self.loop.now, told[1]))


def story(ask: Ask, *faults: Fault, targets: int = 1) -> list[tuple[float, str]]:
    """What the client was told other than tokens: that it was refused, and why; how its answer ended."""
    plan = Plan(
        seed=1,
        targets=targets,
        routers=1,
        pages=40,
        pending=4096,
        pace=0.02,
        noise=Noise(),
        asks=(ask,),
        faults=faults,
        calm_at=30.0,  # until then nobody mends what the test broke
    )
    world = Story(plan)
    world.run()
    return world.told


def gone(at: float, back: float, kind: str = "crash") -> Fault:
    """A target is dead, and still in the registry for a while; ``back`` is when the next one starts."""
    return Fault(at, kind, TARGET, back - at)


def test_a_request_waits_for_the_next_target_where_the_only_one_has_just_gone() -> None:
    [(at, what)] = story(ASK, gone(at=1.0, back=3.0))
    assert what == "length"
    assert 3 < at < 3 + SOON


def test_a_request_in_a_rolling_restart_waits_for_whoever_is_back_first() -> None:
    [(at, what)] = story(ASK, gone(at=0.9, back=5.0), gone(at=1.0, back=3.5), targets=2)
    assert what == "length"
    assert 3.5 < at < 3.5 + SOON


def test_a_request_that_finds_the_next_target_gone_too_waits_on() -> None:
    [(at, what)] = story(ASK, gone(at=1.0, back=1.6), gone(at=1.6001, back=3.0))
    assert what == "length"
    assert 3 < at < 3 + SOON


def test_nobody_waits_longer_than_the_bound() -> None:
    at, what = story(ASK, gone(at=1.0, back=9.0))[0]
    assert what == "Unavailable NO_RESPONDERS"
    assert ASK.at + REPLACED_S < at < ASK.at + REPLACED_S + 0.1


def test_nobody_waits_longer_than_the_deadline() -> None:
    [(at, what)] = story(replace(ASK, timeout=1.5), gone(at=1.0, back=9.0))
    assert what == "deadline"
    assert ASK.at + 1.5 - 0.1 < at < ASK.at + 1.5 + 0.1


def test_a_cluster_without_targets_says_so_at_once() -> None:
    asked = 1.0 + TTL_S + 1
    at, what = story(replace(ASK, at=asked), gone(at=1.0, back=8.0))[0]
    assert what == "Unavailable NO_TARGET"
    assert at < asked + 0.1


@pytest.mark.parametrize("back", [6.0, 20.0], ids=["another comes", "nobody comes"])
def test_a_cancel_is_heard_while_the_request_waits(back: float) -> None:
    [(at, what)] = story(replace(ASK, cancel_at=2.0), gone(at=1.0, back=back))
    assert what == "cancelled"
    assert 2 < at < 2 + 2.5  # a router asks the dead target after a second of silence


def test_a_request_whose_client_went_away_while_it_waited_is_placed_when_it_is_asked_for_again() -> None:
    hang_up = Fault(2.0, "hang up", 0, 0.0)
    (_, first), (at, last) = story(ASK, gone(at=1.0, back=3.0), hang_up)  # in the end it looks for what is left over
    assert (first, last) == ("Unavailable UNREACHABLE", "length")
    assert 3 < at < 3 + SOON
