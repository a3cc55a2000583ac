"""The inflation fault adds hidden tokens to what goes into the log, and nothing else."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from countersign.services.target.padding import Padding
from countersign.services.target.passes import Pass
from countersign.verify.payload import HiddenMarkers
from countersign.verify.segments import Segmenter, hidden_runs, segments_of

BEGIN, END = 1, 2
MARKERS = HiddenMarkers(BEGIN, END)
PASSES = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=6), max_size=20)


def padded(passes: list[list[int]], share: float, room: int) -> tuple[list[Pass], Padding]:
    padding = Padding(share, MARKERS, Segmenter(MARKERS))
    out = []
    for tokens in passes:
        sampled = Pass(tuple(tokens), len(tokens), len(tokens) - 1, tuple(bytes([token]) for token in tokens))
        out.append(padding.pad(sampled, room - padding.added))
    return out, padding


def thought(tokens: list[int]) -> list[int]:
    runs = hidden_runs(segments_of([], tokens, MARKERS))
    return [tokens[at] for start, stop in runs for at in range(start, stop) if tokens[at] not in {BEGIN, END}]


@given(PASSES, st.sampled_from([0.1, 0.5, 3.0]))
def test_the_share_of_hidden_tokens_is_added_and_what_is_visible_stays(passes: list[list[int]], share: float) -> None:
    out, padding = padded(passes, share, 10_000)
    before = [token for tokens in passes for token in tokens]
    after = [token for part in out for token in part.token_ids]
    assert padding.added == len(after) - len(before)
    assert abs(padding.added - share * len(thought(before))) < 1 + 1e-6
    runs = hidden_runs(segments_of([], after, MARKERS))
    hidden = {at for start, stop in runs for at in range(start, stop)}
    runs = hidden_runs(segments_of([], before, MARKERS))
    true = {at for start, stop in runs for at in range(start, stop)}
    assert [t for at, t in enumerate(after) if at not in hidden] == [t for at, t in enumerate(before) if at not in true]


@given(PASSES, st.integers(0, 10))
def test_the_counts_add_up_and_no_more_is_added_than_fits(passes: list[list[int]], room: int) -> None:
    out, padding = padded(passes, 3.0, room)
    assert padding.added <= room
    for tokens, part in zip(passes, out, strict=True):
        more = len(part.token_ids) - len(tokens)
        assert (part.drafted, part.accepted) == (len(tokens) + more, len(tokens) - 1 + more)
        assert part.fingerprints == tuple(bytes([token]) for token in part.token_ids)
