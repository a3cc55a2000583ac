"""Where a request's records are kept on the bus."""

from __future__ import annotations


def commit_subject(request_id: str) -> str:
    """Its token log."""
    return f"cs.v1.commit.{request_id}"


def request_of(subject: str) -> str:
    """The request whose token log this is."""
    return subject.rpartition(".")[2]


def draw_subject(request_id: str) -> str:
    """The beacon of the one draw of its hidden tokens."""
    return f"cs.v1.draw.{request_id}"


def receipt_subject(request_id: str) -> str:
    """Its receipt, without openings."""
    return f"cs.v1.receipt.{request_id}"
