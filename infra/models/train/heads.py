"""Trains CoIn's two heads on answers of the demo pair: ``python infra/models/train/heads.py``; minutes on one core.

Honest blocks against blocks of the same length that half consist of something else: drawn ids, the prompt, the answer,
another answer's reasoning, the draft model. Focal loss, batches of 128 and seed 42 as in the paper; MiniLM stays as it
is, so Adam goes at 1e-3 for 4 epochs (the paper tunes MiniLM too, at 2e-5 for 3).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from random import Random

import corpus
import torch
import torch.nn.functional as F

from countersign.services.engine.model import Model, load_model
from countersign.services.engine.sampling import Sampling
from countersign.services.engine.text import Tokenizer
from countersign.verify.coin.answers import Ask, continued
from countersign.verify.coin.attacks import Name, Thought, Tools, inflate
from countersign.verify.coin.embedding import Embedder
from countersign.verify.coin.heads import BLOCK_TOKENS, WEIGHTS, Heads, Judge, blocks_of

MODELS = Path(__file__).resolve().parents[1]
PROMPT, HIDDEN, VISIBLE = 64, 160, 48
KINDS: Sequence[Name] = ("random", "prompt", "answer", "resample")
SEED, BATCH, EPOCHS, RATE, GAMMA, HONEST = 42, 128, 4, 1e-3, 2.0, 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--answers", type=int, default=1600)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    options = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    tokenizer, heads = Tokenizer(MODELS / "demo-target"), Heads()
    judge = Judge(tokenizer, Embedder(), heads)
    thoughts = think(load_model(MODELS / "demo-target", dtype="fp32"), tokenizer, options.answers)
    draft = load_model(MODELS / "demo-draft", dtype="fp32")
    kept = len(thoughts) // 10  # to find the limit with, and to look at
    train(heads, pairs(judge, thoughts[kept:], draft, Random(SEED)))
    heads.limit.fill_(limit(judge, thoughts[:kept]))
    held = pairs(judge, thoughts[:kept], draft, Random(SEED + 1))
    for name, head, left in (
        ("tokens-to-block", heads.tokens_to_block, 0),
        ("block-to-answer", heads.block_to_answer, 1),
    ):
        print(f"{name}: AUC {auc(head(held[left], held[left + 1]), held[3]):.3f} on blocks held back")
    heads.save(options.out)
    print(f"limit {float(heads.limit):.3f}, {options.out.stat().st_size / 1e6:.2f} MB")


def think(model: Model, tokenizer: Tokenizer, count: int) -> list[Thought]:
    """Answers to pieces of the training corpus, the first part of each taken for its reasoning."""
    random = Random(SEED)
    documents, _ = corpus.training()
    prompts: list[tuple[int, ...]] = []
    while len(prompts) < count:
        ids = tokenizer.encode(random.choice(documents).text[:20_000])
        if len(ids) > 2 * PROMPT:
            start = random.randrange(len(ids) - PROMPT)
            prompts.append(tuple(ids[start : start + PROMPT]))
    asks = [Ask(prompt, Sampling(0.8, 50, 0.95, seed)) for seed, prompt in enumerate(prompts)]
    answers = continued(model, asks, HIDDEN + VISIBLE)
    return [
        Thought(prompt, tuple(answer[:HIDDEN]), tuple(answer[HIDDEN:]))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def pairs(judge: Judge, thoughts: Sequence[Thought], draft: Model, random: Random) -> tuple[torch.Tensor, ...]:
    """Bags, blocks, answers (n, 384) and labels (n,): each honest block, and one of half its tokens."""

    def say(prefix: Sequence[int], count: int) -> Sequence[int]:
        return continued(draft, [Ask(prefix, Sampling(0.8, 50, 0.95, random.getrandbits(32)))], count)[0]

    found: list[tuple[torch.Tensor, ...]] = []
    for thought in thoughts:
        tools = Tools(4096, {}, say, lambda *_: 0.0, lambda one, _: one)
        blocks = blocks_of(thought.hidden)
        false = [_adulterated(thought, block, thoughts, tools, random) for block in blocks]
        labels = torch.tensor([1.0] * len(blocks) + [0.0] * len(false))
        found.append((*judge.embedded([*blocks, *false], thought.visible, random), labels))
    return tuple(torch.cat(part) for part in zip(*found, strict=True))


def _adulterated(
    thought: Thought, block: Sequence[int], others: Sequence[Thought], tools: Tools, random: Random
) -> Sequence[int]:
    half = tuple(block[: BLOCK_TOKENS // 2])
    if random.random() < 1 / (1 + len(KINDS)):
        return (*half, *random.choice(others).hidden[: len(half)])
    kind = random.choice(KINDS)
    return inflate(kind, Thought(thought.prompt, half, thought.visible), 1.0, tools, random).hidden


def train(heads: Heads, data: tuple[torch.Tensor, ...]) -> None:
    bags, blocks, answers, labels = (part.clone() for part in data)
    optimiser = torch.optim.Adam(heads.parameters(), lr=RATE)
    for epoch in range(EPOCHS):
        total = 0.0
        for chosen in torch.randperm(len(labels)).split(BATCH):
            logits = (
                heads.tokens_to_block(bags[chosen], blocks[chosen]),
                heads.block_to_answer(blocks[chosen], answers[chosen]),
            )
            loss = torch.stack([focal(one, labels[chosen]) for one in logits]).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += float(loss.detach()) * len(chosen)
        print(f"epoch {epoch + 1}: loss {total / len(labels):.4f} over {len(labels)} blocks")


def focal(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(1 - p)^gamma (-log p), p the chance given to the right label (arXiv 1708.02002)."""
    cross = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return ((1 - torch.exp(-cross)) ** GAMMA * cross).mean()


def limit(judge: Judge, thoughts: Sequence[Thought]) -> float:
    """Below it lies one honest answer in a hundred."""
    random = Random(SEED)
    scores = [judge.meaning(blocks_of(one.hidden), one.visible, random).score for one in thoughts]
    return float(torch.tensor(scores).quantile(HONEST))


def auc(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """The chance that an honest block scores above another."""
    good, bad = scores[labels == 1].detach(), scores[labels == 0].detach()
    return float((good[:, None] > bad[None, :]).float().mean())


if __name__ == "__main__":
    main()
