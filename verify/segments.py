"""Which tokens of an output are hidden from the client: a function of the tokens and the two markers alone.

So target, router and auditor agree without a message, and a take-over changes nothing. Output is hidden from the begin
marker to the end marker, both included; where the prompt's last marker is a begin marker, from its first token on (chat
templates end so). An end marker without a beginning is a token like any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from countersign.verify.multiproof import Run
from countersign.verify.payload import MAX_SEGMENTS, HiddenMarkers, Segment


class Segmenter:
    """Fed each output token in order, tells whether it is hidden.

    A receipt has at most ``MAX_SEGMENTS`` runs. The last that may begin is a hidden one, which goes on to the end.
    """

    def __init__(self, markers: HiddenMarkers | None, prompt: Iterable[int] = ()) -> None:
        self._markers = markers
        self._inside = False
        self._hidden: bool | None = None
        self._runs = 0
        if markers is not None:
            for token in prompt:
                self._inside = (self._inside or token == markers.begin) and token != markers.end

    def feed(self, token: int) -> bool:
        """Whether this token is hidden."""
        markers = self._markers
        if markers is None:
            return False
        self._inside = self._inside or token == markers.begin
        hidden = self._inside
        self._runs += hidden is not self._hidden
        self._hidden = hidden
        if token == markers.end and self._runs < MAX_SEGMENTS - 1:
            self._inside = False
        return hidden


def segments_of(prompt: Iterable[int], output: Iterable[int], markers: HiddenMarkers | None) -> tuple[Segment, ...]:
    """The output's runs of visible and hidden tokens."""
    segmenter = Segmenter(markers, prompt)
    runs = groupby(segmenter.feed(token) for token in output)
    return tuple(Segment("hidden" if hidden else "visible", sum(1 for _ in run)) for hidden, run in runs)


def visible_runs(segments: Sequence[Segment]) -> list[Run]:
    """Where the visible tokens stand, as half-open ranges; runs that touch are one."""
    return _runs(segments, "visible")


def hidden_runs(segments: Sequence[Segment]) -> list[Run]:
    """Where the hidden tokens stand."""
    return _runs(segments, "hidden")


def _runs(segments: Sequence[Segment], kind: str) -> list[Run]:
    runs: list[Run] = []
    position = 0
    for segment in segments:
        start, position = position, position + segment.tokens
        if segment.kind != kind:
            continue
        if runs and runs[-1][1] == start:
            start = runs.pop()[0]
        runs.append((start, position))
    return runs
