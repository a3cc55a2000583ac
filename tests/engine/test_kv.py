"""Pages shared, copied, evicted and moved, blocks as bytes, and what stale pages may not do."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from countersign.services.engine.config import ModelConfig, Rope
from countersign.services.engine.errors import EngineError, InvalidBlock, InvalidSpan, OutOfPages
from countersign.services.engine.kv import CachedSequence, PagedCache
from countersign.services.engine.model import Backend, Model, Span, load_model
from countersign.services.engine.pages import CacheStats

CONFIG = ModelConfig(
    family="llama",
    vocabulary_size=10,
    context_length=4096,
    hidden_size=8,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=2,
    intermediate_size=8,
    rms_eps=1e-5,
    rope=Rope(1e4),
    qkv_bias=False,
    qk_norm=False,
    sliding_window=None,
    tied=True,
    end_token_ids=frozenset(),
)
KEYS = [bytes([number]) * 32 for number in range(8)]


def filled(cache: PagedCache, tokens: int, first: int = 1) -> CachedSequence:
    """A sequence whose tokens' K and V are all ``first``, ``first + 1`` and so on."""
    sequence = cache.sequence()
    cache.reserve({sequence: tokens})
    for slot in range(tokens):
        write(cache, sequence, slot, first + slot)
    sequence.length = tokens
    return sequence


def write(cache: PagedCache, sequence: CachedSequence, slot: int, value: float) -> None:
    page, place = sequence.place(slot)
    for layer in range(CONFIG.layers):
        cache.keys(layer)[page, :, :, place] = value
        cache.values(layer)[page, :, place] = value


def read(cache: PagedCache, sequence: CachedSequence) -> list[float]:
    """Each token's value, which must be the same in all its K and V."""
    values = []
    for slot in range(sequence.length):
        page, place = sequence.place(slot)
        parts = [[cache.keys(i)[page, :, :, place], cache.values(i)[page, :, place]] for i in range(CONFIG.layers)]
        (value,) = set(torch.stack([part for pair in parts for part in pair]).flatten().tolist())
        values.append(value)
    return values


def count(first: int, stop: int) -> list[float]:
    return [float(value) for value in range(first, stop)]


def test_a_page_is_layers_then_k_transposed_and_v_and_so_is_a_block() -> None:
    cache = PagedCache(CONFIG, "fp32", 32)
    sequence = cache.sequence()
    cache.reserve({sequence: 16})
    sequence.length = 16
    (page,) = sequence.pages
    values = torch.arange(2 * 2 * 16 * 1 * 2, dtype=torch.float32)
    cache.pool[page] = values.view(2, 2, 1, 32)
    assert torch.equal(cache.keys(1)[page, 0], values[64:96].view(2, 16))
    assert torch.equal(cache.values(1)[page, 0], values[96:].view(16, 2))
    block = sequence.export_block(0)
    assert len(block) == cache.block_bytes == 4 * len(values)
    assert block == values.numpy().astype("<f4").tobytes()


def test_a_block_that_is_not_full_or_does_not_fit_is_refused() -> None:
    cache = PagedCache(CONFIG, "bf16", 32)
    sequence = cache.sequence()
    data = bytes(cache.block_bytes)
    with pytest.raises(InvalidBlock, match="has 256 bytes, not 255"):
        sequence.import_block(data[1:])
    sequence.import_block(data)
    with pytest.raises(InvalidBlock, match="block 1 of a sequence of 16 tokens is not full"):
        sequence.export_block(1)
    sequence.truncate(9)
    with pytest.raises(InvalidBlock, match="block 0 of a sequence of 9"):
        sequence.export_block(0)
    with pytest.raises(InvalidBlock, match="cannot follow 9 tokens"):
        sequence.import_block(data)
    sequence.close()
    with pytest.raises(InvalidSpan, match="closed"):
        sequence.import_block(data)


def test_a_block_that_finds_no_page_is_refused_and_changes_nothing() -> None:
    cache = PagedCache(CONFIG, "fp32", 16)
    sequence = cache.sequence()
    sequence.import_block(bytes(cache.block_bytes))
    with pytest.raises(OutOfPages):
        sequence.import_block(bytes(cache.block_bytes))
    assert sequence.length == 16
    cache.check_integrity()


def test_a_fork_costs_a_page_once_it_is_written_and_the_last_holder_writes_in_place() -> None:
    cache = PagedCache(CONFIG, "fp32", 64)
    source = filled(cache, 20)
    forks = [source.fork(), source.fork()]
    shared, own = source.pages
    assert cache.free_tokens == 32
    cache.reserve(dict.fromkeys([source, *forks], 21))
    assert cache.free_tokens == 0
    assert [sequence.pages[0] for sequence in (source, *forks)] == [shared] * 3
    assert forks[1].pages[1] == own
    for value, sequence in enumerate((source, *forks), start=100):
        write(cache, sequence, 20, value)
        sequence.length = 21
        assert read(cache, sequence) == [*count(1, 21), value]
    cache.check_integrity()


def test_a_copy_that_finds_no_page_is_refused_and_changes_nothing() -> None:
    cache = PagedCache(CONFIG, "fp32", 32)
    source = filled(cache, 20)
    fork = source.fork()
    with pytest.raises(OutOfPages) as full:
        cache.reserve({fork: 21})
    assert (full.value.needed, full.value.free) == (1, 0)
    assert fork.pages == source.pages
    source.close()
    cache.reserve({fork: 21})
    assert read(cache, fork) == count(1, 21)


def test_a_decode_step_that_needs_no_page_does_no_more_than_compare() -> None:
    cache = PagedCache(CONFIG, "fp32", 64)
    sequences = [filled(cache, 10), filled(cache, 12)]
    cache._prepare = None  # type: ignore[method-assign, assignment]
    for _ in range(3):
        cache.reserve({sequence: sequence.length + 1 for sequence in sequences})
        for sequence in sequences:
            sequence.length += 1


def test_reserving_no_more_than_there_is_changes_nothing_but_what_lies_behind() -> None:
    cache = PagedCache(CONFIG, "fp32", 64)
    sequence = filled(cache, 20)
    cache.reserve({sequence: 40})
    write(cache, sequence, 35, math.nan)
    cache.reserve({sequence: 3})
    assert read(cache, sequence) == count(1, 21)
    assert not cache.pool[sequence.pages[2]].any()
    cache.check_integrity()


def test_tables_follow_the_pages_and_grow_both_ways() -> None:
    cache = PagedCache(CONFIG, "fp32", 16 * 100)
    sequences = [filled(cache, 40)] + [cache.sequence() for _ in range(19)]
    assert len({sequence.row for sequence in sequences}) == 20
    cache.reserve({sequences[19]: 16 * 80})
    assert cache.tables.shape[0] >= 20
    assert cache.tables.dtype == np.int32
    assert cache.tables.flags.c_contiguous
    assert cache.tables[sequences[19].row, :81].tolist() == [*sequences[19].pages, 0]
    sequences[19].truncate(0)
    row = sequences[3].row
    sequences[3].close()
    heir = filled(cache, 17)
    assert heir.row == row
    assert cache.tables[row, :3].tolist() == [*heir.pages, 0]
    cache.check_integrity()


def test_the_least_recently_used_prefix_is_evicted_first_and_from_its_end() -> None:
    cache = PagedCache(CONFIG, "fp32", 16 * 6)
    old, new = filled(cache, 48), filled(cache, 48, first=100)
    cache.publish(old, KEYS[:3])
    cache.publish(new, KEYS[3:6])
    new.close()
    old.close()
    assert cache.free_tokens == 96
    assert cache.adopt(cache.sequence(), KEYS[3:4]) == 16  # A use, though of its first page only.

    filled(cache, 16)
    other = cache.sequence()
    assert cache.adopt(other, KEYS[3:6]) == 32
    other.close()
    filled(cache, 32)
    assert cache.stats() == CacheStats(free=0, used=4, cached=2, hits=3, misses=1, evictions=3)
    rest = cache.sequence()
    assert cache.adopt(rest, KEYS[:3]) == 16
    assert cache.adopt(cache.sequence(), KEYS[3:6]) == 32
    assert read(cache, rest) == count(1, 17)
    cache.check_integrity()


def test_a_second_writer_of_a_prefix_moves_to_the_first_ones_pages() -> None:
    cache = PagedCache(CONFIG, "fp32", 16 * 8)
    first, second = filled(cache, 32), filled(cache, 50)
    fork = second.fork()
    cache.publish(first, KEYS[:2])
    assert cache.free_tokens == 32
    cache.publish(second, KEYS[:3])
    assert cache.free_tokens == 64
    assert first.pages == second.pages[:2] == fork.pages[:2]
    assert read(cache, second) == read(cache, fork) == count(1, 51)
    fork.close()
    second.close()
    first.close()
    assert cache.adopt(cache.sequence(), KEYS) == 48
    cache.check_integrity()


def test_a_published_page_is_not_written_again() -> None:
    cache = PagedCache(CONFIG, "fp32", 64)
    sequence = filled(cache, 32)
    cache.publish(sequence, KEYS[:2])
    sequence.truncate(20)
    cache.reserve({sequence: 21})
    write(cache, sequence, 20, 7)
    sequence.length = 21
    assert read(cache, sequence) == [*count(1, 21), 7]
    other = cache.sequence()
    assert cache.adopt(other, KEYS[:2]) == 32
    assert read(cache, other) == count(1, 33)
    cache.check_integrity()


def test_pages_that_are_not_full_or_belong_under_other_keys_are_not_published() -> None:
    cache = PagedCache(CONFIG, "fp32", 16 * 8)
    first, second = filled(cache, 40), filled(cache, 40)
    with pytest.raises(InvalidBlock, match="block 2 of a sequence of 40 tokens is not full"):
        cache.publish(first, KEYS[:3])
    with pytest.raises(InvalidBlock, match="under another key"):
        cache.publish(first, [KEYS[0], KEYS[0]])
    cache.publish(first, KEYS[:2])
    for wrong in (KEYS[2:4], [KEYS[0], KEYS[2]], KEYS[1:3]):
        with pytest.raises(InvalidBlock, match="under another key"):
            cache.publish(first, wrong)
    with pytest.raises(InvalidBlock, match="its key for another block"):
        cache.publish(second, KEYS[1:3])
    assert cache.free_tokens == 32
    cache.publish(first, KEYS[:2])
    cache.check_integrity()


def test_a_sequence_of_full_pages_adopts_what_follows_them() -> None:
    cache = PagedCache(CONFIG, "fp32", 16 * 16)
    first = filled(cache, 64)
    cache.publish(first, KEYS[:4])
    behind = cache.sequence()
    assert cache.adopt(behind, KEYS[:1]) == 16
    assert cache.adopt(behind, KEYS[:3]) == 48
    assert read(cache, behind) == count(1, 49)
    assert behind.pages == first.pages[:3]
    assert cache.adopt(behind, KEYS[:3]) == 48
    stats = cache.stats()
    assert (stats.hits, stats.misses) == (3, 0)
    cache.reserve({behind: 50})
    assert cache.adopt(behind, KEYS[:6]) == 64
    assert (cache.stats().hits, cache.stats().misses) == (4, 0)
    with_misses = cache.sequence()
    assert cache.adopt(with_misses, KEYS[:6]) == 64
    assert (cache.stats().hits, cache.stats().misses) == (8, 2)
    cache.check_integrity()


def test_behind_pages_of_its_own_that_the_index_does_not_have_a_sequence_adopts_nothing() -> None:
    cache = PagedCache(CONFIG, "fp32", 16 * 16)
    first, other = filled(cache, 64), filled(cache, 16)
    cache.publish(first, KEYS[:4])
    pages = list(other.pages)
    assert cache.adopt(other, KEYS[:4]) == 16
    assert other.pages == pages
    cache.publish(other, KEYS[:1])
    assert cache.adopt(other, KEYS[:4]) == 64
    cache.check_integrity()


def test_a_sequence_that_ends_inside_a_page_adopts_nothing_and_a_closed_one_does_nothing() -> None:
    cache = PagedCache(CONFIG, "fp32", 64)
    sequence = filled(cache, 3)
    with pytest.raises(InvalidSpan, match="a sequence of 3 tokens"):
        cache.adopt(sequence, KEYS)
    sequence.close()
    acts: list[Callable[[], object]] = [
        lambda: cache.adopt(sequence, KEYS),
        lambda: cache.publish(sequence, []),
        lambda: cache.reserve({sequence: 1}),
        lambda: sequence.compact(0, []),
        sequence.fork,
    ]
    for act in acts:
        with pytest.raises(InvalidSpan, match="closed"):
            act()
    cache.check_integrity()


def test_compaction_keeps_one_path_of_a_tree_across_pages() -> None:
    cache = PagedCache(CONFIG, "fp32", 16 * 8)
    one, two = filled(cache, 36), filled(cache, 20, first=100)
    cache.compact({one: (12, [0, 2, 3, 8, 22]), two: (18, [1])})
    assert read(cache, one) == [*count(1, 13), 13, 15, 16, 21, 35]
    assert read(cache, two) == [*count(100, 118), 119]
    assert len(one.pages) == 2
    cache.reserve({one: 18, two: 19})
    assert not cache.keys(0)[one.pages[1], :, :, 2:].any()
    assert not cache.values(1)[two.pages[1], :, 3:].any()
    cache.check_integrity()


@pytest.mark.parametrize(
    ("base", "path"), [(10, [1, 1]), (10, [2, 1]), (10, [10]), (10, [-1, 0]), (-1, [0]), (21, []), (19, [0, 1])]
)
def test_a_path_that_is_none_is_refused_and_changes_nothing(base: int, path: list[int]) -> None:
    cache = PagedCache(CONFIG, "fp32", 64)
    sequence, fine = filled(cache, 20), filled(cache, 20)
    with pytest.raises(InvalidSpan, match="of 20 tokens cannot keep"):
        cache.compact({fine: (10, [3]), sequence: (base, path)})
    assert read(cache, fine) == read(cache, sequence) == count(1, 21)


def test_shared_tokens_are_not_moved_but_a_chain_can_be_cut() -> None:
    cache = PagedCache(CONFIG, "fp32", 64)
    sequence = filled(cache, 20)
    fork = sequence.fork()
    with pytest.raises(InvalidSpan, match="shared"):
        sequence.compact(17, [1])
    sequence.compact(17, [0])
    assert (read(cache, sequence), read(cache, fork)) == (count(1, 19), count(1, 21))


def test_integrity_names_what_is_wrong() -> None:
    cache = PagedCache(CONFIG, "fp32", 16 * 8)
    sequence, other = filled(cache, 40), filled(cache, 16)
    cache.publish(sequence, KEYS[:2])
    cache.check_integrity()
    allocator, pages = cache._allocator, list(sequence.pages)

    def wrong(match: str, target: Any, name: str, value: object) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(target, name, value)
            with pytest.raises(EngineError, match=match):
                cache.check_integrity()
        cache.check_integrity()

    references = list(allocator._references)
    references[pages[0]] += 1
    wrong("lost", sequence, "pages", pages[:-1])
    wrong("more or fewer references", allocator, "_references", references)
    wrong("both free and held", allocator, "_free", [[*allocator._free[0], pages[0]]])
    wrong("index and its pages differ", allocator, "_index", {KEYS[0]: pages[0]})
    wrong("without those before", allocator, "_indexed", {**allocator._indexed, pages[1]: (KEYS[1], other.pages[0])})
    wrong("tables is not", cache, "tables", np.zeros_like(cache.tables))
    wrong("wrong bounds", sequence, "length", 60)
    wrong("could write", sequence, "length", 20)
    wrong("a row of", cache, "_free_rows", cache._free_rows[1:])
    sequence.close()
    wrong("evicted before its child", allocator, "_cached", OrderedDict.fromkeys(pages[:2]))
    cache.pool[0, 0, 0, 0] = 1
    with pytest.raises(EngineError, match="zeros was written"):
        cache.check_integrity()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_pool_on_a_gpu_shares_copies_moves_and_exports() -> None:
    cache, here = PagedCache(CONFIG, "bf16", 64, device="cuda"), PagedCache(CONFIG, "bf16", 64)
    sequence, receiver = filled(cache, 40), here.sequence()
    fork = sequence.fork()
    cache.reserve({fork: 41})
    fork.compact(33, [1, 3])
    assert read(cache, sequence) == count(1, 41)
    assert read(cache, fork) == [*count(1, 34), 35, 37]
    receiver.import_block(sequence.export_block(1))
    assert read(here, receiver) == count(17, 33)
    cache.check_integrity()


def test_nan_left_in_a_page_reaches_neither_its_next_owner_nor_the_tokens_after_a_truncation(model: Model) -> None:
    prompt = list(range(1, 25))
    clean = PagedCache(model.config, "fp32", 64)
    expected = model.forward(clean, [Span(clean.sequence(), prompt)])

    cache = PagedCache(model.config, "fp32", 64)
    broken = cache.sequence()
    model.forward(cache, [Span(broken, prompt)])
    cache.pool[broken.pages] = math.nan
    broken.close()
    heir = cache.sequence()
    assert torch.equal(model.forward(cache, [Span(heir, prompt)]), expected)

    for layer in range(model.config.layers):
        cache.keys(layer)[heir.pages[1], :, :, 7] = math.nan
        cache.values(layer)[heir.pages[1], :, 7] = math.nan
    heir.truncate(20)
    short = model.forward(clean, [Span(clean.sequence(), prompt[:22])])
    assert torch.equal(model.forward(cache, [Span(heir, prompt[20:22])]), short)


def test_blocks_move_between_models_of_one_checkpoint(checkpoint: Path, backend: Backend, model: Model) -> None:
    prompt = list(range(40))
    there, here = PagedCache(model.config, "fp32", 64), PagedCache(model.config, "fp32", 64)
    source, target = there.sequence(), here.sequence()
    expected = model.forward(there, [Span(source, prompt)])
    for index in range(2):
        target.import_block(source.export_block(index))
    again = load_model(checkpoint, backend=backend)
    assert torch.equal(again.forward(here, [Span(target, prompt[32:])]), expected)
