"""What ``countersign audit`` asks of the provider, and what it got no answer to."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from countersign.cli.generate import router_address
from countersign.services.runtime.errors import CountersignError

if TYPE_CHECKING:
    from countersign.client import Client
    from countersign.verify.audit import AuditReport, Level
    from countersign.verify.coin.counting import Drawn
    from countersign.verify.fingerprints import Challenge
    from countersign.verify.receipt import SignedReceipt

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Provider:
    """Draws here and now, and asks. A refusal ends no audit: what the receipt alone gives away is still to be said.

    ``router``: its address, else the one of the stack in ``data_dir``.
    """

    data: bytes
    router: str
    data_dir: Path | None
    _refused: dict[Level, str] = field(default_factory=dict)

    def challenge(self, count: int) -> Challenge | None:
        """Fingerprints at ``count`` positions; None where there is no receipt, or no answer."""
        from countersign.verify import sampling
        from countersign.verify.fingerprints import Challenge

        signed = self._signed()
        if signed is None:
            return None  # the form level says so
        if signed.receipt.evidence.activations is None:
            return Challenge((), None)
        beacon, population = os.urandom(sampling.DIGEST_SIZE), signed.receipt.output.tokens
        drawn = sampling.positions("activations", beacon, signed.digest, population, count)
        request_id = signed.receipt.request_id
        answer = self._ask("activations", "its fingerprints", lambda client: client.activations(request_id, drawn))
        return None if answer is None else Challenge(drawn, answer)

    def drawn(self) -> Drawn | None:
        """Some of its hidden tokens; None where none are left to open, or no answer came."""
        from countersign.verify import sampling
        from countersign.verify.coin.challenge import Demand
        from countersign.verify.coin.counting import Drawn
        from countersign.verify.receipt import PartialOpenings

        signed = self._signed()
        if signed is None or not isinstance(signed.openings, PartialOpenings):
            return None
        beacon, request_id = os.urandom(sampling.DIGEST_SIZE), signed.receipt.request_id
        opened = self._ask("count", "its hidden tokens", lambda client: client.open_hidden(request_id, beacon))
        return None if opened is None else Drawn(beacon, Demand(leaves=opened[0]), opened[1])

    def explained(self, report: AuditReport) -> AuditReport:
        """The report, with what was refused at the levels that could not be checked for it."""
        levels = tuple(
            replace(level, summary=f"{level.summary}; {self._refused[level.level]}")
            if level.outcome == "inconclusive" and level.level in self._refused
            else level
            for level in report.levels
        )
        return replace(report, levels=levels)

    def _signed(self) -> SignedReceipt | None:
        from countersign.verify.errors import VerificationError
        from countersign.verify.receipt import parse

        try:
            return parse(self.data)
        except VerificationError:
            return None

    def _ask(self, level: Level, what: str, question: Callable[[Client], Awaitable[T]]) -> T | None:
        from countersign.client import Client

        async def ask() -> T:
            async with Client(self.router or router_address(self.data_dir)) as client:
                return await question(client)

        try:
            return asyncio.run(ask())
        except CountersignError as error:
            self._refused[level] = f"the provider did not open {what}: {error}"
            return None
