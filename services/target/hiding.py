"""The tokens between which a deployment hides output, from their names in the configuration."""

from __future__ import annotations

from countersign.services.engine.text import Tokenizer
from countersign.services.runtime.errors import FailedPrecondition
from countersign.v1.sampling_pb2 import HiddenMarkers


def markers(setting: str, tokenizer: Tokenizer) -> HiddenMarkers | None:
    """Of ``target.hidden_markers``: two texts that are one token each, or ids; None of an empty setting.

    Raises:
        FailedPrecondition: reason BAD_HIDDEN_MARKERS.
    """
    if not setting:
        return None
    begin, end = (_token(text, tokenizer) for text in setting.split())
    if begin == end:
        raise _bad(f"target.hidden_markers = {setting!r} names one token twice")
    return HiddenMarkers(begin=begin, end=end)


def _token(text: str, tokenizer: Tokenizer) -> int:
    ids = [int(text)] if text.isascii() and text.isdigit() else tokenizer.encode(text, plain=True)
    if len(ids) != 1 or ids[0] >= tokenizer.vocabulary_size:
        raise _bad(f"target.hidden_markers: {text!r} is not one token of the model's vocabulary")
    return ids[0]


def _bad(message: str) -> FailedPrecondition:
    return FailedPrecondition(
        message,
        reason="BAD_HIDDEN_MARKERS",
        help='name two tokens as tokenizer.json has them, such as "<think> </think>", or their ids',
    )
