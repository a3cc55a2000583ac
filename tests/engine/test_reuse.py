"""KV at other positions: exact where it can be, and nearer to a prefill the more is computed again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from countersign.services.engine.config import LinearScaling, Rope, YarnScaling
from countersign.services.engine.kv import CachedSequence, PagedCache
from countersign.services.engine.model import Backend, Model, Span, load_model
from countersign.services.engine.reuse import CHUNK, Library, Piece, Reuse, move, turn
from countersign.services.engine.rope import RotaryTable

ROPES = [
    Rope(10_000.0),
    Rope(500_000.0, LinearScaling(4.0)),
    Rope(10_000.0, YarnScaling(4.0, 32.0, 1.0, 1.3, 256, truncate=True)),
]


def text(seed: int, length: int) -> list[int]:
    return torch.randint(0, 96, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


BEFORE, BODY, TAIL = text(1, 40), text(2, 150), text(3, 20)
EDITED = text(4, 21)


def new_cache(model: Model) -> PagedCache:
    return PagedCache(model.config, model.dtype, 2048)


def prefilled(model: Model, cache: PagedCache, tokens: Sequence[int]) -> CachedSequence:
    sequence = cache.sequence()
    model.forward(cache, [Span(sequence, tokens, 0)])
    return sequence


def kv(cache: PagedCache, sequence: CachedSequence) -> torch.Tensor:
    """(tokens, layers, 2, kv_heads, head_dim)."""
    pages, slots = zip(*(sequence.place(slot) for slot in range(sequence.length)), strict=True)
    layers = range(cache.pool.shape[1])
    k = torch.stack([cache.keys(layer)[pages, :, :, slots] for layer in layers], dim=1)
    v = torch.stack([cache.values(layer)[pages, :, slots] for layer in layers], dim=1)
    return torch.stack((k, v), dim=2).float()


def next_logits(model: Model, cache: PagedCache, sequence: CachedSequence) -> torch.Tensor:
    return model.forward(cache, [Span(sequence, [7])])[0]


def filled(model: Model, cache: PagedCache, tokens: Sequence[int], share: float) -> tuple[CachedSequence, Reuse]:
    """A sequence made from one that held the same text behind another beginning."""
    reuse = Reuse(model, cache, share)
    reuse.keep(prefilled(model, cache, [*BEFORE, *BODY]), [*BEFORE, *BODY], len(BEFORE) + len(BODY))
    sequence = cache.sequence()
    reuse.fill(sequence, tokens)
    return sequence, reuse


@pytest.fixture(scope="module")
def one_layer(build_model: Any, tmp_path_factory: pytest.TempPathFactory, backend: Backend) -> Model:
    folder = tmp_path_factory.mktemp("one_layer")
    build_model("qwen3", 5, num_hidden_layers=1).save_pretrained(folder)
    return load_model(folder, backend=backend)


@pytest.fixture(scope="module")
def deep(build_model: Any, tmp_path_factory: pytest.TempPathFactory, backend: Backend) -> Model:
    folder = tmp_path_factory.mktemp("deep")
    build_model("llama", 6, num_hidden_layers=4).save_pretrained(folder)
    return load_model(folder, backend=backend)


@pytest.mark.parametrize("rope", ROPES, ids=["plain", "linear", "yarn"])
def test_a_key_that_is_turned_is_the_key_of_its_new_position(rope: Rope) -> None:
    table, old, new = RotaryTable(rope, 16), torch.tensor([0, 3, 700, 1999]), torch.tensor([5, 3, 12, 2040])
    key = torch.randn(4, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def at(positions: torch.Tensor) -> torch.Tensor:
        cos, sin = table.rows(positions, 2048, torch.float64)
        return key * cos + torch.cat((key[..., 8:], key[..., :8]), dim=-1) * sin

    cos, sin = turn(table, old, new)
    first, second = at(old).chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    torch.testing.assert_close(turned, at(new), rtol=0, atol=1e-6)
    assert bool((cos[1] == 1).all())
    assert bool((sin[1] == 0).all())


def test_a_piece_that_stays_where_it_was_is_moved_bit_for_bit(model: Model) -> None:
    cache = new_cache(model)
    source, target = prefilled(model, cache, BODY), cache.sequence()
    cache.reserve({target: len(BODY)})
    move(cache, model.config, RotaryTable(model.config.rope, model.config.head_dim), target, Piece(source, 0, 0, 150))
    target.length = len(BODY)
    assert torch.equal(kv(cache, target), kv(cache, source))
    assert torch.equal(next_logits(model, cache, target), next_logits(model, cache, source))
    cache.check_integrity()


@pytest.mark.parametrize("share", [0.0, 0.15])
def test_one_layer_is_exact_at_any_position(one_layer: Model, share: float) -> None:
    cache, tokens = new_cache(one_layer), [*EDITED, *BODY[11:], *TAIL]
    sequence, reuse = filled(one_layer, cache, tokens, share)
    assert reuse.reused == len(BODY) - 11
    whole = prefilled(one_layer, cache, tokens)
    torch.testing.assert_close(kv(cache, sequence), kv(cache, whole), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        next_logits(one_layer, cache, sequence), next_logits(one_layer, cache, whole), rtol=1e-4, atol=1e-4
    )


def test_all_computed_again_is_a_prefill(deep: Model) -> None:
    cache, tokens = new_cache(deep), [*EDITED, *BODY, *TAIL]
    sequence, reuse = filled(deep, cache, tokens, 1.0)
    assert reuse.reused == reuse.recomputed == len(BODY)
    whole = prefilled(deep, cache, tokens)
    torch.testing.assert_close(kv(cache, sequence), kv(cache, whole), rtol=1e-5, atol=1e-5)
    cache.check_integrity()


def test_the_more_is_computed_again_the_nearer_it_is_to_a_prefill(deep: Model) -> None:
    cache, tokens = new_cache(deep), [*EDITED, *BODY, *TAIL]
    whole = kv(cache, prefilled(deep, cache, tokens))
    distances = []
    for share in (0.0, 0.15, 0.5, 1.0):
        sequence, _ = filled(deep, cache, tokens, share)
        distances.append(float((kv(cache, sequence) - whole).square().sum()))
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 1.3 * distances[1] > 0


def test_tokens_whose_values_change_most_are_better_computed_again_than_others(deep: Model) -> None:
    cache, tokens = new_cache(deep), [*EDITED, *BODY, *TAIL]
    whole = kv(cache, prefilled(deep, cache, tokens))

    def distance(reuse_class: type[Reuse]) -> float:
        reuse = reuse_class(deep, cache, 0.2)
        reuse.keep(prefilled(deep, cache, [*BEFORE, *BODY]), [*BEFORE, *BODY], 190)
        sequence = cache.sequence()
        reuse.fill(sequence, tokens)
        assert reuse.recomputed == 30
        return float((kv(cache, sequence) - whole).square().sum())

    class Last(Reuse):
        def _differing(self, sequence: CachedSequence, tokens: Sequence[int], moved: Any) -> Any:
            super()._differing(sequence, tokens, moved)
            return moved.nonzero()[0][-30:]

    assert distance(Reuse) < distance(Last)


def test_a_beginning_that_stays_is_exact_and_is_not_computed_again(deep: Model) -> None:
    """Only what stands behind the edit is approximate."""
    cache, tokens = new_cache(deep), [*BEFORE, *BODY[:60], *EDITED, *BODY[60:]]
    reuse = Reuse(deep, cache, 0.5)
    reuse.keep(prefilled(deep, cache, [*BEFORE, *BODY]), [*BEFORE, *BODY], 190)
    sequence = cache.sequence()
    assert reuse.fill(sequence, tokens) == 100
    assert (reuse.reused, reuse.recomputed) == (190, 45)
    ours, whole = kv(cache, sequence), kv(cache, prefilled(deep, cache, tokens))
    torch.testing.assert_close(ours[: 100 + len(EDITED)], whole[: 100 + len(EDITED)], rtol=1e-5, atol=1e-5)
    # What is made of it is known to be exact no further than that.
    reuse.keep(sequence, tokens, 100)
    again = cache.sequence()
    assert reuse.fill(again, tokens) == 100
    # And where all is as it was, all is exact.
    other = Reuse(deep, cache)
    other.keep(prefilled(deep, cache, tokens), tokens, len(tokens))
    third = cache.sequence()
    assert other.fill(third, tokens) is None
    assert torch.equal(kv(cache, third), whole)


def test_pieces_of_several_texts_are_put_together_in_a_new_order(deep: Model) -> None:
    cache = new_cache(deep)
    reuse = Reuse(deep, cache, 1.0)
    for seed in (10, 11, 12):
        reuse.keep(prefilled(deep, cache, text(seed, 70)), text(seed, 70), 70)
    tokens = [*text(12, 70), *text(20, 9), *text(10, 70)[20:], *text(11, 70)]
    sequence = cache.sequence()
    reuse.fill(sequence, tokens)
    assert reuse.reused == len(tokens) - 9
    whole = prefilled(deep, cache, tokens)
    torch.testing.assert_close(kv(cache, sequence), kv(cache, whole), rtol=1e-5, atol=1e-5)
    cache.check_integrity()


def test_where_nothing_is_known_the_sequence_stays_empty(deep: Model) -> None:
    cache = new_cache(deep)
    sequence, reuse = filled(deep, cache, text(30, 200), 0.15)
    assert (sequence.length, sequence.pages, reuse.reused) == (0, [], 0)


def test_the_oldest_are_given_up_and_their_pages_come_back(model: Model) -> None:
    cache = new_cache(model)
    reuse = Reuse(model, cache, most=2)
    for seed in (10, 11, 12):
        reuse.keep(prefilled(model, cache, text(seed, 64)), text(seed, 64), 64)
    assert cache.free_tokens == 2048 - 2 * 64
    fresh = cache.sequence()
    reuse.fill(fresh, text(10, 64))
    assert reuse.reused == 0
    assert [reuse.drop(), reuse.drop(), reuse.drop()] == [True, True, False]
    fresh.close()
    assert cache.free_tokens == 2048


@given(
    texts=st.lists(st.lists(st.integers(0, 2), max_size=3 * CHUNK), max_size=4),
    cuts=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 90), st.integers(1, 90)), max_size=5),
    drops=st.integers(0, 2),
)
def test_a_piece_is_the_same_text_and_pieces_stand_in_order(
    texts: list[list[int]], cuts: list[tuple[int, int, int]], drops: int
) -> None:
    library, kept = Library(), {}
    for each in texts:
        sequence: Any = object()
        library.add(sequence, each, len(each))
        kept[sequence] = each
    for _ in range(drops):
        kept.pop(library.drop(), None)
    tokens = [t for which, start, count in cuts if texts for t in texts[which % len(texts)][start : start + count]]
    done = 0
    for piece in library.pieces(tokens):
        assert piece.length >= CHUNK
        assert piece.at >= done
        done = piece.end
        assert tokens[piece.at : piece.end] == kept[piece.source][piece.start : piece.start + piece.length]
    assert done <= len(tokens)
