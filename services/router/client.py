"""What a router tells the sidecar of one client that it serves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from countersign.services.protocol.commit import LogState
from countersign.services.runtime.announcer import Announcer, Party
from countersign.v1.event_pb2 import Delivered, Followed, ProtocolEvent
from countersign.v1.router_pb2 import StreamEvent


@dataclass(slots=True)
class Client:
    """``position``: the number of output tokens that it has, which at first it says itself."""

    announcer: Announcer
    party: Party
    position: int
    introduced: bool = False

    def gets(self, log: LogState, event: StreamEvent) -> None:
        """Called before ``event`` is sent, with the log as far as it is read."""
        if self.position > len(log.tokens) and not self.introduced:
            return  # it says that it has more than there is
        what = []
        if not self.introduced:
            self.introduced = True
            what.append(self.party.says(log.sequence, followed=Followed(position=self.position)))
        if event.HasField("tokens"):
            what.append(self._given(log, event.tokens.position, [token.id for token in event.tokens.tokens]))
        elif event.HasField("hidden"):
            # The client has their number; which they are is in the log.
            start = event.hidden.position
            what.append(self._given(log, start, log.token_ids[start : start + event.hidden.tokens]))
        elif event.HasField("finished"):
            what.append(self.party.says(log.sequence, finished=Delivered(position=self.position)))
        self.announcer.soon(*what)

    def _given(self, log: LogState, position: int, token_ids: Sequence[int]) -> ProtocolEvent:
        self.position = position + len(token_ids)
        return self.party.says(log.sequence, delivered=Delivered(position=position, token_ids=token_ids))
