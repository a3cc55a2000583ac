"""What can go wrong with a specification and its checking."""

from __future__ import annotations


class SpecError(Exception):
    """The specification, its manifest, a recorded run or TLC itself is not as it should be."""
