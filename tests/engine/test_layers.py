"""A pass that tells of its layers computes the same bits, and what it tells is the blocks, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from countersign.services.engine.engine import Engine, complete, kept_of
from countersign.services.engine.errors import EngineError, InvalidBlock
from countersign.services.engine.generation import Generation
from countersign.services.engine.kv import PagedCache
from countersign.services.engine.model import Model
from countersign.services.engine.pages import PAGE_TOKENS
from countersign.services.engine.step import AfterLayer, Computed, Span

PROMPT = [(7 * index) % 96 for index in range(75)]


def engine(model: Model, chunk: int = 24) -> Engine:
    return Engine.of(model, PagedCache(model.config, model.dtype, tokens=1024), chunk=chunk)


class Told:
    """Collects what passes tell; each block's layers must come in order, each once."""

    def __init__(self, layers: int) -> None:
        self.blocks: dict[int, list[bytes]] = {}
        self.order: list[tuple[int, int]] = []
        self._layers = layers

    def __call__(self, layer: int, first: int, slices: Sequence[bytes]) -> None:
        self.order.append((layer, first))
        for index, data in enumerate(slices, start=first):
            assert len(self.blocks.setdefault(index, [])) == layer
            self.blocks[index].append(data)

    def whole(self) -> list[bytes]:
        assert all(len(parts) == self._layers for parts in self.blocks.values())
        return [b"".join(self.blocks[index]) for index in range(len(self.blocks))]


@pytest.mark.parametrize("layered", [True, False])
def test_what_passes_tell_layer_by_layer_is_the_blocks_of_a_silent_prefill_and_no_token_changes(
    model: Model, layered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent, other = engine(model, chunk=256), Generation("other", PROMPT[::-1], 12)
    alone = Generation("alone", list(PROMPT), 12)
    complete(silent, [alone, other])

    monkeypatch.setattr(model.executor, "layered", layered)
    told = Told(model.config.layers)
    loud = engine(model)
    heard, beside = Generation("heard", list(PROMPT), 12, filled=told), Generation("beside", PROMPT[::-1], 12)
    loud.submit(heard)
    loud.submit(beside)
    while len(loud):
        ran = loud.run(loud.plan())
        loud.settle(ran, {result.generation.id: kept_of(result) for result in ran.results})
        for result in ran.results:
            if not result.generation.left:
                if result.generation is heard and heard.sequence is not None:
                    exported = [heard.sequence.export_block(index) for index in range(len(told.blocks))]
                loud.remove(result.generation.id)
    assert heard.generated == alone.generated
    assert beside.generated == other.generated
    assert told.whole() == exported
    assert len(exported) == (len(PROMPT) + 12 - 1) // PAGE_TOKENS
    assert len(told.order) > 3 * model.config.layers, "all came of one pass"


def test_a_layer_is_told_before_the_next_is_computed(model: Model) -> None:
    here = engine(model)
    seen: list[tuple[int, bool]] = []

    def look(layer: int, first: int, slices: Sequence[bytes]) -> None:
        later = layer + 1
        if later < model.config.layers and generation.sequence is not None:
            seen.append((layer, not any(generation.sequence.export_layer(first, later))))

    generation = Generation("r", PROMPT[:16], 1, filled=look)
    complete(here, [generation])
    assert seen == [(layer, True) for layer in range(model.config.layers - 1)]


def test_only_reserved_blocks_have_layers(model: Model) -> None:
    cache = PagedCache(model.config, model.dtype, tokens=64)
    sequence = cache.sequence()
    with pytest.raises(InvalidBlock, match="block 0 is not among the 0 slots"):
        sequence.export_layer(0, 0)


def test_what_computes_in_one_go_says_that_it_tells_of_no_layer() -> None:
    from countersign.services.engine.ranks.executor import RankedExecutor

    executor = RankedExecutor.__new__(RankedExecutor)
    assert not executor.layered
    with pytest.raises(EngineError, match="single layers"):
        executor.run(None, [], lambda layer: None)  # type: ignore[arg-type]


def test_who_adopts_what_a_pass_computed_for_another_is_told_of_those_blocks_too(model: Model) -> None:
    here = engine(model)
    keys = [bytes([index]) * 32 for index in range(len(PROMPT) // PAGE_TOKENS)]
    told = [Told(model.config.layers) for _ in range(2)]
    complete(here, [Generation(str(n), list(PROMPT), 1, keys=keys, filled=each) for n, each in enumerate(told)])
    assert here.sharing.joined > 0
    assert told[0].whole() == told[1].whole()
    assert len(told[0].blocks) == len(keys)


def test_blocks_whose_numbers_are_not_finite_are_never_told_whole(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, told = engine(model), Told(model.config.layers)
    compute = model.compute

    def broken(cache: PagedCache, spans: Sequence[Span], after_layer: AfterLayer | None = None) -> Computed:
        computed = compute(cache, spans, after_layer)
        return Computed(computed.logits * float("nan"), computed.states)

    monkeypatch.setattr(model, "compute", broken)
    keys = [bytes([index]) * 32 for index in range(len(PROMPT) // PAGE_TOKENS)]
    with pytest.raises(EngineError, match="not finite"):
        complete(here, [Generation("r", list(PROMPT), 1, keys=keys, filled=told)])
    assert told.blocks
    assert all(len(parts) == model.config.layers - 1 for parts in told.blocks.values())
