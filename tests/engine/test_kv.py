"""The page pool against a perfect model, blocks as bytes, and what stale pages may not do."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from countersign.services.engine.config import ModelConfig, Rope
from countersign.services.engine.errors import EngineError, InvalidBlock, InvalidSpan, OutOfPages
from countersign.services.engine.kv import CachedSequence, PagedCache
from countersign.services.engine.model import Model, Span, load_model

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
PAGES = 12


class PageMachine(RuleBasedStateMachine):
    """Sequences grow, shrink, import and close; each keeps the numbers written into it."""

    sequences: Bundle[CachedSequence] = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.cache = PagedCache(CONFIG, "fp32", PAGES * 16)
        self.expected: dict[CachedSequence, list[int]] = {}
        self.written = 0

    def pages_held(self) -> int:
        return sum(math.ceil(len(values) / 16) for values in self.expected.values())

    @initialize(target=sequences)
    def begin(self) -> MultipleResults[CachedSequence]:
        return multiple(*(self.opened() for _ in range(2)))

    @rule(target=sequences)
    def create(self) -> CachedSequence:
        return self.opened()

    def opened(self) -> CachedSequence:
        sequence = self.cache.sequence()
        self.expected[sequence] = []
        return sequence

    @precondition(lambda self: self.expected)
    @rule(
        grown=st.lists(st.tuples(sequences, st.integers(1, 50)), min_size=1, max_size=3, unique_by=lambda g: id(g[0]))
    )
    def grow(self, grown: list[tuple[CachedSequence, int]]) -> None:
        lengths = {sequence: sequence.length + more for sequence, more in grown}
        needed = sum(math.ceil(length / 16) - math.ceil(s.length / 16) for s, length in lengths.items())
        if needed > PAGES - self.pages_held():
            with pytest.raises(OutOfPages) as full:
                self.cache.reserve(lengths)
            assert (full.value.needed, full.value.free) == (needed, PAGES - self.pages_held())
            return
        self.cache.reserve(lengths)
        for sequence, more in grown:
            for _ in range(more):
                self.written += 1
                self.slot(sequence, sequence.length).fill_(self.written)
                sequence.length += 1
                self.expected[sequence].append(self.written)

    @rule(sequence=sequences, share=st.floats(0, 1))
    def truncate(self, sequence: CachedSequence, share: float) -> None:
        length = int(share * sequence.length)
        sequence.truncate(length)
        del self.expected[sequence][length:]

    @rule(source=sequences, receiver=sequences)
    def copy_first_block(self, source: CachedSequence, receiver: CachedSequence) -> None:
        if source.length < 16 or receiver.length % 16 or self.pages_held() == PAGES:
            return
        receiver.import_block(source.export_block(0))
        self.expected[receiver].extend(self.expected[source][:16])

    @rule(sequence=consumes(sequences))
    def close(self, sequence: CachedSequence) -> None:
        sequence.close()
        sequence.close()
        del self.expected[sequence]
        with pytest.raises(InvalidSpan):
            sequence.truncate(0)

    @invariant()
    def every_page_has_one_owner_and_every_token_its_values(self) -> None:
        self.cache.check_integrity()
        assert self.cache.free_tokens == 16 * (PAGES - self.pages_held())
        for sequence, values in self.expected.items():
            assert sequence.length == len(values)
            for position, value in enumerate(values):
                assert (self.slot(sequence, position) == value).all()

    def slot(self, sequence: CachedSequence, position: int) -> torch.Tensor:
        return self.cache.pool[:, :, sequence.pages[position // 16], position % 16]


TestPages = PageMachine.TestCase
TestPages.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


def test_a_block_is_layers_then_k_and_v_then_tokens_then_heads_little_endian() -> None:
    cache = PagedCache(CONFIG, "fp32", 32)
    sequence = cache.sequence()
    cache.reserve({sequence: 16})
    sequence.length = 16
    values = torch.arange(2 * 2 * 16 * 1 * 2, dtype=torch.float32)
    cache.pool[:, :, sequence.pages[0]] = values.view(2, 2, 16, 1, 2)
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


def test_integrity_names_a_lost_page_and_a_written_page_of_zeros() -> None:
    cache = PagedCache(CONFIG, "fp32", 64)
    sequence = cache.sequence()
    cache.reserve({sequence: 40})
    sequence.length = 40
    cache.check_integrity()
    page = sequence.pages.pop()
    with pytest.raises(EngineError, match="lost"):
        cache.check_integrity()
    sequence.pages.append(page)
    cache.pool[0, 0, 0, 0] = 1
    with pytest.raises(EngineError, match="zeros was written"):
        cache.check_integrity()


def test_nan_left_in_a_page_reaches_neither_its_next_owner_nor_the_tokens_after_a_truncation(model: Model) -> None:
    prompt = list(range(1, 25))
    clean = PagedCache(model.config, "fp32", 64)
    expected = model.forward(clean, [Span(clean.sequence(), prompt)])

    cache = PagedCache(model.config, "fp32", 64)
    broken = cache.sequence()
    model.forward(cache, [Span(broken, prompt)])
    cache.pool[:, :, broken.pages] = math.nan
    broken.close()
    heir = cache.sequence()
    assert torch.equal(model.forward(cache, [Span(heir, prompt)]), expected)

    cache.pool[:, :, heir.pages[1], 7] = math.nan
    heir.truncate(20)
    short = model.forward(clean, [Span(clean.sequence(), prompt[:22])])
    assert torch.equal(model.forward(cache, [Span(heir, prompt[20:22])]), short)


def test_blocks_move_between_models_of_one_checkpoint(checkpoint: Path, model: Model) -> None:
    prompt = list(range(40))
    there, here = PagedCache(model.config, "fp32", 64), PagedCache(model.config, "fp32", 64)
    source, target = there.sequence(), here.sequence()
    expected = model.forward(there, [Span(source, prompt)])
    for index in range(2):
        target.import_block(source.export_block(index))
    assert torch.equal(load_model(checkpoint).forward(here, [Span(target, prompt[32:])]), expected)
