"""Measures the demo pair and writes both model cards: ``python infra/models/train/train.py card``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import corpus
import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from countersign.cli.prompts import heldout_prompts
from countersign.services.draft.proposer import Ask, Proposer
from countersign.services.engine.kv import PagedCache
from countersign.services.engine.model import Model, Span, load_model
from countersign.services.engine.runner import Runner, Work
from countersign.services.engine.sampling import Sampling
from countersign.services.engine.speculation import Draft
from countersign.services.engine.text import Tokenizer

MODELS = Path(__file__).resolve().parents[1]
WORK = Path(__file__).resolve().parents[3] / "build" / "train"
PROMPTS = 100
TOKENS = 64
DRAFTS = 4


@dataclass(frozen=True, slots=True)
class Speculation:
    """Tokens per target pass and share of proposals accepted."""

    tokens_per_pass: float
    accepted: float


def write() -> None:
    """Measure, then write ``README.md`` into both folders."""
    losses = {role: heldout_loss(MODELS / f"demo-{role}") for role in ("target", "draft")}
    bytes_per_token = heldout_bytes_per_token()
    runs = {temperature: speculate(temperature) for temperature in (0.0, 0.8)}
    for role in ("target", "draft"):
        (MODELS / f"demo-{role}" / "README.md").write_text(_card(role, losses, bytes_per_token, runs))
    print(
        json.dumps(
            {"loss": losses, "bytes_per_token": bytes_per_token, "runs": {str(k): str(v) for k, v in runs.items()}}
        )
    )


@torch.no_grad()
def heldout_loss(folder: Path, length: int = 512) -> float:
    """Nats per token over all held-out tokens, in windows of ``length``, from the saved weights in fp32."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.from_numpy(np.load(WORK / "heldout.npy").astype(np.int64))
    rows = ids[: (len(ids) - 1) // length * length]
    inputs, labels = rows.view(-1, length), ids[1 : len(rows) + 1].view(-1, length)
    total = 0.0
    for part, wanted in zip(inputs.split(16), labels.split(16), strict=True):
        total += F.cross_entropy(model(part).logits.flatten(0, 1), wanted.flatten(), reduction="sum").item()
    return total / labels.numel()


def heldout_bytes_per_token() -> float:
    documents = corpus.heldout()
    return sum(len(document.text.encode()) for document in documents) / np.load(WORK / "heldout.npy").size


def speculate(temperature: float) -> Speculation:
    """Continue held-out prompts with drafts of 4, as the services do."""
    target, draft = load_model(MODELS / "demo-target"), load_model(MODELS / "demo-draft")
    proposer = Proposer(draft, PagedCache(draft.config, "fp32", tokens=4096))
    tokenizer = Tokenizer(MODELS / "demo-target")
    passes = tokens = drafted = accepted = 0
    for index, prompt in enumerate(heldout_prompts(MODELS, PROMPTS)):
        sampling = Sampling(temperature=temperature, top_k=0, top_p=1.0, seed=index)
        for proposals, emitted in _answer(target, proposer, tokenizer.encode(prompt.text), sampling, str(index)):
            passes, tokens = passes + 1, tokens + len(emitted)
            drafted, accepted = drafted + len(proposals), accepted + len(emitted) - 1
        proposer.forget(str(index))
    return Speculation(tokens / passes, accepted / drafted)


def _answer(
    target: Model, proposer: Proposer, prompt: Sequence[int], sampling: Sampling, name: str
) -> list[tuple[Sequence[int], Sequence[int]]]:
    """(proposals, tokens) of each pass until ``TOKENS`` tokens are there."""
    cache = PagedCache(target.config, "fp32", tokens=4096)
    runner, sequence, ids = Runner(target, cache), cache.sequence(), list(prompt)
    target.forward(cache, [Span(sequence, ids[:-1], 0)])
    rounds: list[tuple[Sequence[int], Sequence[int]]] = []
    while len(ids) < len(prompt) + TOKENS:
        result = proposer.propose([Ask(name, 0, tuple(ids), DRAFTS, sampling)])[0]
        proposals = () if isinstance(result, int) else result
        [outcome] = runner.run([Work(sequence, ids[-1:], sampling, Draft(proposals))])
        ids += outcome.token_ids
        rounds.append((proposals, outcome.token_ids))
    return rounds


def _card(role: str, losses: dict[str, float], bytes_per_token: float, runs: dict[float, Speculation]) -> str:
    facts = json.loads((WORK / f"{role}.json").read_text())
    sources = json.loads((WORK / "sources.json").read_text())
    config = json.loads((MODELS / f"demo-{role}" / "config.json").read_text())
    model = LlamaForCausalLM.from_pretrained(MODELS / f"demo-{role}")
    size = sum(parameter.numel() for parameter in model.parameters())
    how = "cross-entropy" if role == "target" else "0.2 cross-entropy + 0.8 KL to the target (distilled)"
    other = "draft" if role == "target" else "target"
    shape = f"{config['num_hidden_layers']} layers, d {config['hidden_size']}, vocabulary {config['vocab_size']}"
    batch = facts["recipe"]["batch"] * facts["recipe"]["length"]
    amount = f"{facts['steps']} steps of {batch} tokens ({facts['tokens'] / 1e6:.1f} M)"
    figures = {
        "held-out loss": f"{losses[role]:.4f} nats/token",
        "held-out bits per byte": f"{losses[role] / bytes_per_token / np.log(2):.4f}",
        f"loss of the {other}": f"{losses[other]:.4f} nats/token (gap {losses['draft'] - losses['target']:.4f})",
        **{_SPECULATION.format(DRAFTS, t): _speculated(run) for t, run in runs.items()},
        "training": f"{amount}, {how}, seed {facts['recipe']['seed']}",
        "time": f"{facts['seconds'] / 60:.0f} minutes on 2 shared CPU cores",
        "weights": "bf16",
    }
    return _CARD.format(
        role=role,
        size=size / 1e6,
        shape=shape,
        context=config["max_position_embeddings"],
        figures="\n".join(f"| {name} | {value} |" for name, value in figures.items()),
        prompts=PROMPTS,
        tokens=TOKENS,
        sources=", ".join(source.removesuffix(": 0.0 MB") for source in sources),
    )


def _speculated(run: Speculation) -> str:
    return f"{run.tokens_per_pass:.3f} ({run.accepted:.1%} of proposals accepted)"


_SPECULATION = "tokens per target pass, drafts of {}, temperature {:g}"
_CARD = """---
license: apache-2.0
language: [code]
library_name: transformers
---
# demo-{role}

A Llama of {size:.2f} M parameters ({shape}, context {context}) that continues Python source: the {role} of
Countersign's demo pair. It exists to be small and auditable, not to be good.

| | |
|---|---|
{figures}

Acceptance is over {prompts} prompts of held-out files, {tokens} tokens each. Held out are the standard-library modules
in `infra/models/heldout.txt` and every file that repeats them.

## Data

Source code that the training machine held: the Python standard library (PSF licence) and installed packages whose own
metadata declares a permissive licence: {sources}.
"""
