"""What a token log says of its own receipt."""

from __future__ import annotations

from countersign.services.protocol.commit import LogState
from countersign.verify.errors import NotCheckable
from countersign.verify.receipt import Openings


def openings_of(log: LogState) -> Openings:
    """All that the receipt over ``log`` hides. Raises NotCheckable when the log has not been opened."""
    if log.opened is None:
        raise NotCheckable(f"the log of request {log.request_id} does not begin with Opened")
    opened = log.opened
    return Openings(opened.salt_key, tuple(opened.prompt_token_ids), log.token_ids, tuple(opened.sampling.stop))
