"""What a token log says of its own receipt."""

from __future__ import annotations

from collections.abc import Sequence

from countersign.services.protocol.commit import LogState
from countersign.v1.commit_pb2 import Opened
from countersign.verify.errors import NotCheckable
from countersign.verify.fingerprints import commit, encode, open_positions
from countersign.verify.receipt import Activations, HiddenMarkers, Openings, Segment
from countersign.verify.segments import segments_of


def openings_of(log: LogState) -> Openings:
    """All that the receipt over ``log`` hides. Raises NotCheckable when the log has not been opened."""
    if log.opened is None:
        raise NotCheckable(f"the log of request {log.request_id} does not begin with Opened")
    opened = log.opened
    return Openings(opened.salt_key, tuple(opened.prompt_token_ids), log.token_ids, tuple(opened.sampling.stop))


def activations_of(log: LogState) -> Activations | None:
    """What the receipt over ``log`` says of its fingerprints; None where there are none. Raises as ``openings_of``."""
    return commit(log.request_id, log.fingerprints, openings_of(log).salt_key)


def opened_fingerprints(log: LogState, positions: Sequence[int]) -> bytes:
    """The answer to a challenge for these positions of the receipt over ``log``.

    Raises:
        NotCheckable: the log has no fingerprints there.
    """
    prints = log.fingerprints
    if not all(0 <= position < len(prints) for position in positions):
        raise NotCheckable("the log has no such fingerprints", tokens=len(log.tokens), fingerprints=len(prints))
    return encode(open_positions(log.request_id, prints, openings_of(log).salt_key, positions))


def markers_of(opened: Opened) -> HiddenMarkers | None:
    """What of the output the client does not see."""
    return HiddenMarkers(opened.hidden.begin, opened.hidden.end) if opened.HasField("hidden") else None


def segments_in(log: LogState, opened: Opened) -> tuple[Segment, ...]:
    """The committed tokens as runs of visible and hidden ones."""
    return segments_of(opened.prompt_token_ids, log.token_ids, markers_of(opened))
