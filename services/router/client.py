"""What a router tells the sidecar of one client that it serves."""

from __future__ import annotations

from dataclasses import dataclass

from countersign.services.protocol.commit import LogState
from countersign.services.runtime.announcer import Announcer, Party
from countersign.v1.event_pb2 import Delivered, Followed
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
            token_ids = [token.id for token in event.tokens.tokens]
            sent = Delivered(position=event.tokens.position, token_ids=token_ids)
            what.append(self.party.says(log.sequence, delivered=sent))
            self.position = event.tokens.position + len(token_ids)
        elif event.HasField("finished"):
            what.append(self.party.says(log.sequence, finished=Delivered(position=self.position)))
        self.announcer.soon(*what)
