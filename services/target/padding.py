"""A fault on purpose (``target.fault: inflate-...``): hidden tokens go into the log that the model never said."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from countersign.verify.payload import HiddenMarkers
from countersign.verify.segments import Segmenter

if TYPE_CHECKING:
    from countersign.services.target.passes import Pass


@dataclass(slots=True)
class Padding:
    """Says hidden tokens again, ``share`` of them in all; ``added`` is how many so far.

    The model does not see what is added: what it goes on to say is for its own text, at its own positions.
    """

    share: float
    markers: HiddenMarkers
    segmenter: Segmenter
    added: int = 0
    _owed: float = field(default=0.0)

    def pad(self, sampled: Pass, room: int) -> Pass:
        """The pass with its hidden tokens said again, at most ``room`` of them."""
        order = list(self._order(sampled, room))
        more = len(order) - len(sampled.token_ids)
        self.added += more
        return replace(
            sampled,
            token_ids=tuple(sampled.token_ids[at] for at in order),
            fingerprints=tuple(sampled.fingerprints[at] for at in order) if sampled.fingerprints else (),
            # The counts must add up, so that what was added passes for drafted.
            drafted=sampled.drafted + more,
            accepted=sampled.accepted + more,
        )

    def _order(self, sampled: Pass, room: int) -> Iterator[int]:
        for at, token in enumerate(sampled.token_ids):
            yield at
            if not self.segmenter.feed(token) or token in (self.markers.begin, self.markers.end):
                continue
            self._owed += self.share
            while self._owed >= 1 and room > 0:
                self._owed, room = self._owed - 1, room - 1
                yield at
