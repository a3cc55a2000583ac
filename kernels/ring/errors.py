"""What goes wrong between ranks.

RingError
├── LayoutError         the batch cannot be cut this way, or the ranks disagree about it
└── TransportError      the exchange failed; the transport is of no further use
    ├── PeerGone        a peer has left
    ├── PeerTimeout     a peer sent nothing in time
    └── MessageMismatch a peer sent something else than the plan says
"""

from __future__ import annotations


class RingError(Exception):
    """Anything that goes wrong between ranks."""


class LayoutError(RingError, ValueError):
    """The batch cannot be cut this way, or the ranks disagree about how it is cut."""


class TransportError(RingError):
    """An exchange failed. The ranks are no longer in step: end the group and start a new one."""

    def __init__(self, message: str, peer: int | None = None) -> None:
        super().__init__(message)
        self.peer = peer
        """The rank it was about, where one is known."""


class PeerGone(TransportError):
    """A peer has left, by its own error or by dying."""


class PeerTimeout(TransportError):
    """A peer sent nothing within the time given."""


class MessageMismatch(TransportError):
    """A peer sent a tensor of another shape, type or turn than the plan says."""
