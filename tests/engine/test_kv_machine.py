"""The paged cache against plain lists of tokens: whatever is shared, evicted, moved or refused, each keeps its own."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from countersign.services.engine.config import ModelConfig, Rope
from countersign.services.engine.errors import InvalidBlock, InvalidSpan, OutOfPages
from countersign.services.engine.kv import CachedSequence, PagedCache
from countersign.services.protocol.keys import chain_keys

LAYERS, HEADS, SIZE = 2, 2, 3
CONFIG = ModelConfig(
    family="llama",
    vocabulary_size=10,
    context_length=4096,
    hidden_size=8,
    layers=LAYERS,
    heads=HEADS,
    kv_heads=HEADS,
    head_dim=SIZE,
    intermediate_size=8,
    rms_eps=1e-5,
    rope=Rope(1e4),
    qkv_bias=False,
    qk_norm=False,
    sliding_window=None,
    tied=True,
    end_token_ids=frozenset(),
)
# The number of each element within one token's K and V: (layers, 2, heads, size), from 1 on, since 0 is what is empty.
ELEMENTS = 1 + torch.arange(LAYERS * 2 * HEADS * SIZE, dtype=torch.float32).view(LAYERS, 2, HEADS, SIZE)
ROOT = bytes(32)


# Sequences are picked by number, modulo how many there are, so that every step does something.
numbers_of_sequences = st.integers(0, 5)
steps = st.sampled_from((1, 5, 16, 17, 32))
texts = st.sampled_from((0, 0, 1))


class CacheMachine(RuleBasedStateMachine):
    """Sequences grow along two texts, so that prefixes meet, and off them with tokens seen nowhere else."""

    @initialize(pages=st.integers(4, 12))
    def begin(self, pages: int) -> None:
        self.pages = pages
        self.cache = PagedCache(CONFIG, "fp32", pages * 16)
        self.expected: dict[CachedSequence, list[int]] = {}
        self.texts: list[list[int]] = [[]]
        self.indexed: set[bytes] = set()
        self.evicted = 0
        self.fresh_token = 10_000
        self.known(self.cache.sequence(), [])

    @precondition(lambda self: len(self.expected) < 6)
    @rule(more=steps, text=texts, published=st.booleans())
    def create(self, more: int, text: int, published: bool) -> None:
        self.known(self.cache.sequence(), [])
        newest = len(self.expected) - 1
        self.grow({newest: (more, 0)}, text)
        if published:
            self.publish(newest, 1.0)

    @rule(
        grown=st.dictionaries(
            numbers_of_sequences, st.tuples(steps, st.sampled_from((0, 0, 3, 20))), min_size=1, max_size=2
        ),
        text=texts,
    )
    def grow(self, grown: dict[int, tuple[int, int]], text: int) -> None:
        """Appends tokens of a text; some slots more were asked for, and hold NaN, as after a pass that failed."""
        mores = {self.pick(number): more for number, more in grown.items()}
        if not self.reserved({sequence: sequence.length + more + vain for sequence, (more, vain) in mores.items()}):
            return
        for sequence, (more, vain) in mores.items():
            start, stop = sequence.length, sequence.length + more
            tokens = [position + 1000 * text for position in range(start, stop)]
            self.put(sequence, range(start, stop), numbers(tokens))
            self.put(sequence, range(stop, stop + vain), numbers([0] * vain) * math.nan)
            sequence.length += more
            self.expected[sequence] += tokens

    @rule(
        number=numbers_of_sequences,
        nodes=st.integers(1, 24),
        chosen=st.sets(st.integers(0, 23)),
        read=st.booleans(),
    )
    def speculate(self, number: int, nodes: int, chosen: set[int], read: bool) -> None:
        """Writes tokens that no other sequence has and keeps some of them; the others are gone at the next step."""
        sequence, path = self.pick(number), sorted(node for node in chosen if node < nodes)
        base = sequence.length
        if not self.reserved({sequence: base + nodes}):
            return
        tokens = [self.fresh_token + node for node in range(nodes)]
        self.fresh_token += nodes
        self.put(sequence, range(base, base + nodes), numbers(tokens))
        sequence.length += nodes
        with pytest.raises(InvalidSpan):
            sequence.compact(base, [*path, nodes])
        sequence.compact(base, path)
        self.expected[sequence] += [tokens[node] for node in path]
        if read:
            self.reserved({sequence: sequence.length})

    @rule(number=numbers_of_sequences, share=st.floats(0, 1))
    def truncate(self, number: int, share: float) -> None:
        sequence = self.pick(number)
        length = int(share * sequence.length)
        sequence.truncate(length)
        del self.expected[sequence][length:]

    @precondition(lambda self: len(self.expected) < 6)
    @rule(number=numbers_of_sequences)
    def fork(self, number: int) -> None:
        source = self.pick(number)
        self.known(source.fork(), list(self.expected[source]))

    @rule(number=numbers_of_sequences, share=st.sampled_from((0.5, 1.0, 1.0)))
    def publish(self, number: int, share: float) -> None:
        # What `create` has evicted may come back at once.
        self.the_index_loses_a_page_by_eviction_only()
        sequence = self.pick(number)
        tokens = self.expected[sequence]
        keys = chain_keys(ROOT, tokens)
        with pytest.raises(InvalidBlock):
            self.cache.publish(sequence, [*keys, bytes(32)])
        keys = keys[: math.ceil(share * len(keys))]
        self.cache.publish(sequence, keys)
        self.indexed |= set(keys)
        self.texts.append(tokens[: len(keys) * 16])

    @precondition(lambda self: len(self.expected) < 6)
    @rule(text=st.integers(0, 20), more=st.integers(0, 2))
    def adopt(self, text: int, more: int) -> None:
        """Finds just the pages that were published and not evicted since."""
        tokens = [*self.texts[text % len(self.texts)], *([7] * 16 * more)]
        keys = chain_keys(ROOT, tokens)
        run = next((i for i, key in enumerate(keys) if key not in self.indexed), len(keys))
        before, sequence = self.cache.stats(), self.cache.sequence()
        assert self.cache.adopt(sequence, keys) == sequence.length == 16 * run
        after = self.cache.stats()
        assert (after.hits - before.hits, after.misses - before.misses) == (run, len(keys) - run)
        self.known(sequence, tokens[: 16 * run])

    @rule(number=numbers_of_sequences, text=st.integers(0, 20), publishes=st.booleans())
    def adopt_more(self, number: int, text: int, publishes: bool) -> None:
        """Behind its own pages if these are the index's, as they are once published."""
        self.the_index_loses_a_page_by_eviction_only()
        sequence, tokens = self.pick(number), self.texts[text % len(self.texts)]
        own = self.expected[sequence]
        if len(own) % 16 or own != tokens[: len(own)]:
            return
        keys = chain_keys(ROOT, tokens)
        if publishes:
            self.cache.publish(sequence, keys[: len(own) // 16])
            self.indexed |= set(keys[: len(own) // 16])
        run = next((i for i, key in enumerate(keys) if key not in self.indexed), len(keys))
        got = self.cache.adopt(sequence, keys)
        assert got == 16 * run if publishes else got in {16 * run, len(own)}
        self.expected[sequence] = tokens[:got]

    @rule(number=numbers_of_sequences, other=numbers_of_sequences, index=st.integers(0, 3))
    def copy_block(self, number: int, other: int, index: int) -> None:
        source, receiver = self.pick(number), self.pick(other)
        if source.length < 16 * (index + 1) or receiver.length % 16:
            return
        block = source.export_block(index)
        if self.needed({receiver: receiver.length + 16}) * 16 > self.cache.free_tokens:
            with pytest.raises(OutOfPages):
                receiver.import_block(block)
            return
        receiver.import_block(block)
        self.expected[receiver] += self.expected[source][16 * index : 16 * index + 16]

    @precondition(lambda self: len(self.expected) > 1)
    @rule(number=numbers_of_sequences)
    def close(self, number: int) -> None:
        self.finish(self.pick(number))

    @precondition(lambda self: self.cache.free_tokens < 32)
    @rule(kept=numbers_of_sequences)
    def close_all_but_one(self, kept: int) -> None:
        keep = self.pick(kept)
        for sequence in [sequence for sequence in self.expected if sequence is not keep]:
            self.finish(sequence)

    def finish(self, sequence: CachedSequence) -> None:
        sequence.close()
        sequence.close()
        del self.expected[sequence]
        with pytest.raises(InvalidSpan):
            sequence.truncate(0)

    @invariant()
    def all_is_accounted_for(self) -> None:
        self.cache.check_integrity()
        held, stats = {page for sequence in self.expected for page in sequence.pages}, self.cache.stats()
        assert self.cache.free_tokens == 16 * (self.pages - len(held))
        assert (stats.used, stats.free + stats.cached) == (len(held), self.pages - len(held))

    @invariant()
    def the_index_loses_a_page_by_eviction_only(self) -> None:
        found = self.cache._allocator._index.keys()
        lost = self.indexed - found
        assert found <= self.indexed
        assert len(lost) == self.cache.stats().evictions - self.evicted
        self.evicted += len(lost)
        self.indexed -= lost

    @invariant()
    def every_sequence_reads_back_its_tokens(self) -> None:
        for sequence, tokens in self.expected.items():
            assert sequence.length == len(tokens)
            pages = self.cache.tables[sequence.row, : math.ceil(len(tokens) / 16)].tolist()
            assert torch.equal(self.read(pages)[: len(tokens)], numbers(tokens))

    def pick(self, number: int) -> CachedSequence:
        return list(self.expected)[number % len(self.expected)]

    def known(self, sequence: CachedSequence, tokens: list[int]) -> None:
        self.expected[sequence] = tokens

    def needed(self, lengths: Mapping[CachedSequence, int]) -> int:
        """Pages that reserving takes, read off who holds what."""
        holders = Counter(page for sequence in self.expected for page in sequence.pages)
        needed = 0
        for sequence, length in lengths.items():
            needed += max(0, math.ceil(length / 16) - len(sequence.pages))
            for page in sequence.pages[sequence.length // 16 :][:1]:
                if page in self.cache._allocator._indexed or holders[page] > 1:
                    holders[page] -= 1
                    needed += 1
        return needed

    def reserved(self, lengths: dict[CachedSequence, int]) -> bool:
        """Reserves, and what is behind is zero; or there is no room, and nothing changed."""
        needed, tables, stats = self.needed(lengths), self.cache.tables.copy(), self.cache.stats()
        if needed > stats.free + stats.cached:
            with pytest.raises(OutOfPages) as full:
                self.cache.reserve(lengths)
            assert (full.value.needed, full.value.free) == (needed, stats.free + stats.cached)
            assert (self.cache.tables == tables).all()
            assert self.cache.stats() == stats
            return False
        self.cache.reserve(lengths)
        for sequence, length in lengths.items():
            assert not self.read(sequence.pages)[length:].any()
        return True

    def read(self, pages: Sequence[int]) -> torch.Tensor:
        """(tokens, layers, 2, heads, size)."""
        keys = [self.cache.keys(layer)[pages].permute(0, 3, 1, 2).flatten(0, 1) for layer in range(LAYERS)]
        values = [self.cache.values(layer)[pages].transpose(1, 2).flatten(0, 1) for layer in range(LAYERS)]
        return torch.stack([torch.stack(keys, 1), torch.stack(values, 1)], 2)

    def put(self, sequence: CachedSequence, slots: range, values: torch.Tensor) -> None:
        """Writes as an executor does, by the table."""
        table = self.cache.tables[sequence.row].tolist()
        pages, places = torch.tensor([table[slot // 16] for slot in slots]), torch.tensor(slots) % 16
        if not len(slots):
            return
        for layer in range(LAYERS):
            self.cache.keys(layer)[pages, :, :, places] = values[:, layer, 0]
            self.cache.values(layer)[pages, :, places] = values[:, layer, 1]


def numbers(tokens: Sequence[int]) -> torch.Tensor:
    """What each token's K and V hold: (tokens, layers, 2, heads, size), all different, exact in fp32."""
    return torch.tensor(tokens, dtype=torch.float32).view(-1, 1, 1, 1, 1) * ELEMENTS.numel() + ELEMENTS


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=250, stateful_step_count=50, deadline=None)
