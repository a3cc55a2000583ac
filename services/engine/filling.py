"""Blocks as a pass fills them, told to whoever wants them: layer by layer while the next is computed, or whole."""

from __future__ import annotations

from dataclasses import dataclass

from countersign.services.engine.generation import Filled
from countersign.services.engine.kv import CachedSequence
from countersign.services.engine.pages import PAGE_TOKENS
from countersign.services.engine.runner import Work


@dataclass(frozen=True, slots=True)
class Filling:
    """Blocks of a sequence that a pass fills."""

    tell: Filled
    sequence: CachedSequence
    blocks: range

    def layer(self, layer: int) -> None:
        self.tell(layer, self.blocks.start, [self.sequence.export_layer(block, layer) for block in self.blocks])

    def whole(self, layers: int) -> None:
        """All layers of blocks that are full."""
        blocks = [self.sequence.export_block(block) for block in self.blocks]
        size = len(blocks[0]) // layers
        for layer in range(layers):
            self.tell(layer, self.blocks.start, [block[layer * size : (layer + 1) * size] for block in blocks])


def filling_of(tell: Filled | None, work: Work) -> Filling | None:
    """Proposals fill nothing: they may be rejected."""
    before = work.sequence.length
    blocks = range(before // PAGE_TOKENS, (before + len(work.token_ids)) // PAGE_TOKENS)
    return Filling(tell, work.sequence, blocks) if tell is not None and blocks else None
