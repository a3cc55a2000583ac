from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from countersign.verify.payload import MAX_SEGMENTS, HiddenMarkers, Segment
from countersign.verify.segments import Segmenter, hidden_runs, segments_of, visible_runs

BEGIN, END = 1, 2
MARKERS = HiddenMarkers(BEGIN, END)
TOKENS = st.lists(st.integers(0, 4), max_size=60)


def kinds(prompt: list[int], output: list[int]) -> str:
    return "".join(
        "h" if s.kind == "hidden" else "v" for s in segments_of(prompt, output, MARKERS) for _ in range(s.tokens)
    )


@pytest.mark.parametrize(
    ("prompt", "output", "expected"),
    [
        ([], [5, BEGIN, 6, END, 7], "vhhhv"),
        ([], [BEGIN, END, 7], "hhv"),
        ([], [BEGIN, 6, BEGIN, END, 7], "hhhhv"),
        ([], [5, END, 7], "vvv"),
        ([], [5, BEGIN, 6], "vhh"),
        ([], [BEGIN, 5, END, BEGIN, 6, END, 7], "hhhhhhv"),
        ([9, BEGIN], [6, END, 7], "hhv"),
        ([BEGIN, 9, END], [6, END, 7], "vvv"),
        ([], [], ""),
    ],
)
def test_output_is_hidden_from_marker_to_marker(prompt: list[int], output: list[int], expected: str) -> None:
    assert kinds(prompt, output) == expected


@given(TOKENS, TOKENS)
def test_without_markers_all_is_visible(prompt: list[int], output: list[int]) -> None:
    assert segments_of(prompt, output, None) == ((Segment("visible", len(output)),) if output else ())


@given(TOKENS, TOKENS, st.data())
def test_a_committed_beginning_is_never_segmented_anew(
    prompt: list[int], output: list[int], data: st.DataObject
) -> None:
    """So a router may stream what is committed, and a take-over goes on as the first target would have."""
    cut = data.draw(st.integers(0, len(output)))
    assert kinds(prompt, output).startswith(kinds(prompt, output[:cut]))


@given(TOKENS, TOKENS)
def test_visible_and_hidden_runs_share_out_the_output(prompt: list[int], output: list[int]) -> None:
    segments = segments_of(prompt, output, MARKERS)
    marks = kinds(prompt, output)
    for kind, runs in (("v", visible_runs(segments)), ("h", hidden_runs(segments))):
        assert [i for start, stop in runs for i in range(start, stop)] == [i for i, k in enumerate(marks) if k == kind]


def test_a_model_that_flickers_ends_in_one_hidden_segment() -> None:
    segments = segments_of([], [BEGIN, END, 7] * MAX_SEGMENTS, MARKERS)
    assert len(segments) <= MAX_SEGMENTS
    assert segments[-1].kind == "hidden"
    assert segments[-1].tokens > MAX_SEGMENTS
    assert Segmenter(MARKERS).feed(BEGIN)
