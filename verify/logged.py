"""What a token log says of its own receipt."""

from __future__ import annotations

from countersign.services.protocol.commit import LogState
from countersign.v1.commit_pb2 import Opened
from countersign.verify.errors import NotCheckable
from countersign.verify.receipt import HiddenMarkers, Openings, Segment
from countersign.verify.segments import segments_of


def openings_of(log: LogState) -> Openings:
    """All that the receipt over ``log`` hides. Raises NotCheckable when the log has not been opened."""
    if log.opened is None:
        raise NotCheckable(f"the log of request {log.request_id} does not begin with Opened")
    opened = log.opened
    return Openings(opened.salt_key, tuple(opened.prompt_token_ids), log.token_ids, tuple(opened.sampling.stop))


def markers_of(opened: Opened) -> HiddenMarkers | None:
    """What of the output the client does not see."""
    return HiddenMarkers(opened.hidden.begin, opened.hidden.end) if opened.HasField("hidden") else None


def segments_in(log: LogState, opened: Opened) -> tuple[Segment, ...]:
    """The committed tokens as runs of visible and hidden ones."""
    return segments_of(opened.prompt_token_ids, log.token_ids, markers_of(opened))
