"""CoIn's two matching heads (arXiv 2505.13778): does what is hidden mean what it should? For triage, never a verdict.

    tokens-to-block    do drawn tokens of a block, one by one, fit the block's text
    block-to-answer    does the block fit the answer that the client sees

A head projects both sides from MiniLM's space and compares them by cosine: logit = scale cos(W x, V y) + bias. A
block's score is the sum of both logits, an answer's the mean over its blocks. Below ``limit``, where one honest answer
in a hundred lies, it is worth a closer look. Whoever knows the heads can write nonsense that they like.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from countersign.services.engine.text import Tokenizer
from countersign.verify.coin.embedding import SIZE, Embedder

WIDTH = 128
BLOCK_TOKENS = 32
DRAWN_TOKENS = 16
WEIGHTS = Path(__file__).parent / "heads.safetensors"


class Head(nn.Module):
    """(n, 384) and (n, 384) to logits (n,): high where the two sides fit."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(SIZE, WIDTH)
        self.right = nn.Linear(SIZE, WIDTH)
        self.scale = nn.Parameter(torch.tensor(5.0))
        self.bias = nn.Parameter(torch.tensor(0.0))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.scale * F.cosine_similarity(self.left(left), self.right(right), dim=-1) + self.bias


class Heads(nn.Module):
    """Both heads, and where honest answers end."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens_to_block = Head()
        self.block_to_answer = Head()
        self.register_buffer("limit", torch.tensor(0.0))
        self.limit: Tensor

    @staticmethod
    def load(file: Path = WEIGHTS) -> Heads:
        """The trained heads."""
        heads = Heads()
        with safe_open(file, framework="pt") as stored:
            heads.load_state_dict({name: stored.get_tensor(name).float() for name in stored.keys()})  # noqa: SIM118
        return heads.eval()

    def save(self, file: Path = WEIGHTS) -> None:
        """As half-precision safetensors."""
        save_file({name: tensor.half().contiguous() for name, tensor in self.state_dict().items()}, file)


@dataclass(frozen=True, slots=True)
class Meaning:
    """An answer's score, that of each of its blocks, and whether it is worth a closer look."""

    score: float
    blocks: tuple[float, ...]
    doubtful: bool


class Judge:
    """The heads applied to tokens."""

    def __init__(self, tokenizer: Tokenizer, embedder: Embedder, heads: Heads) -> None:
        self._tokenizer, self._embedder, self._heads = tokenizer, embedder, heads
        self._tokens: dict[int, Tensor] = {}

    def meaning(self, blocks: Sequence[Sequence[int]], answer: Sequence[int], random: Random) -> Meaning:
        """Of hidden blocks, at least one, and the visible answer; ``random`` draws the tokens of each block."""
        pairs = self.embedded(blocks, answer, random)
        with torch.inference_mode():
            scores = self._heads.tokens_to_block(*pairs[:2]) + self._heads.block_to_answer(*pairs[1:])
        mean = float(scores.mean())
        return Meaning(mean, tuple(scores.tolist()), mean < self.limit)

    @property
    def limit(self) -> float:
        """Below it an answer is worth a closer look."""
        return float(self._heads.limit)

    def embedded(
        self, blocks: Sequence[Sequence[int]], answer: Sequence[int], random: Random
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(blocks, 384) each: the mean of drawn tokens, the block, the answer."""
        texts = self._embedder.embed([self._tokenizer.decode(block) for block in [*blocks, answer]])
        bags = torch.stack([self._bag(block, random) for block in blocks])
        return bags, texts[:-1], texts[-1:].expand(len(blocks), -1)

    def _bag(self, block: Sequence[int], random: Random) -> Tensor:
        drawn = random.sample(list(block), min(DRAWN_TOKENS, len(block)))
        missing = sorted({token for token in drawn if token not in self._tokens})
        if missing:
            vectors = self._embedder.embed([self._tokenizer.decode([token]) for token in missing])
            self._tokens.update(zip(missing, vectors, strict=True))
        return torch.stack([self._tokens[token] for token in drawn]).mean(0)


def blocks_of(hidden: Sequence[int], size: int = BLOCK_TOKENS) -> list[Sequence[int]]:
    """Hidden tokens in blocks; a last one of less than half the size belongs to the one before it."""
    starts = list(range(0, len(hidden), size))
    if len(starts) > 1 and len(hidden) - starts[-1] < size // 2:
        starts.pop()
    return [hidden[start:stop] for start, stop in zip(starts, [*starts[1:], len(hidden)], strict=True)]
