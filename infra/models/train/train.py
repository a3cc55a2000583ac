"""Train the demo pair; every step can be interrupted and goes on where it stopped.

    python infra/models/train/train.py tokenizer
    python infra/models/train/train.py target --steps 3000
    python infra/models/train/train.py draft  --steps 3000     # distilled from the target
    python infra/models/train/train.py card                    # measures both, writes the model cards

The schedule is warm-up, stable, linear decay over the last fifth. A checkpoint in the stable part can be continued with
another ``--steps``. Hidden matrices are trained by Muon, embeddings and norms by AdamW.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import corpus
import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent
MODELS = HERE.parent
WORK = HERE.parents[2] / "build" / "train"
VOCABULARY = 4096
CONTEXT = 2048
END_OF_TEXT = "<|endoftext|>"
# An identifier with its leading space, a line break with its indentation, one digit, a run of operators, other space.
SPLIT = r"\n[ \t]*| ?[\p{L}_]+| ?\p{N}| ?[^\s\p{L}\p{N}_]+|\s+"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What one model is and how it is trained; lengths in tokens."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    learning_rate: float
    batch: int = 16
    length: int = 512
    seed: int = 20261120

    def model(self) -> LlamaForCausalLM:
        torch.manual_seed(self.seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=self.hidden,
                intermediate_size=self.intermediate,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                num_key_value_heads=self.kv_heads,
                head_dim=self.head_dim,
                max_position_embeddings=CONTEXT,
                tie_word_embeddings=True,
                bos_token_id=0,
                eos_token_id=0,
                rms_norm_eps=1e-5,
            )
        )


RECIPES = {
    "target": Recipe("demo-target", 256, 6, 4, 2, 64, 768, 3e-3),
    "draft": Recipe("demo-draft", 96, 3, 3, 1, 32, 288, 5e-3, batch=8),
}


def train_tokenizer() -> None:
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    documents, summary = corpus.training()
    tokenizer.train_from_iterator((document.text for document in documents[::2]), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
    )
    WORK.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(WORK / "tokenizer.json"))
    (WORK / "sources.json").write_text(json.dumps(summary))
    for name, texts in (("train", documents), ("heldout", corpus.heldout())):
        encoded = tokenizer.encode_batch([document.text for document in texts])
        ids = np.concatenate([np.asarray(item.ids, dtype=np.uint16) for item in encoded])
        np.save(WORK / f"{name}.npy", ids)
        size = sum(len(document.text.encode()) for document in texts)
        print(f"{name}: {len(texts)} files, {ids.size} tokens, {size / ids.size:.2f} bytes/token")


def batches(recipe: Recipe, step: int, steps: int, ids: np.ndarray) -> Iterator[torch.Tensor]:
    """Batches from ``step`` on; the last tenth of training sees the whole context at the same tokens a step."""
    span = recipe.batch * recipe.length
    epoch_steps = (ids.size - CONTEXT - 1) // span
    while True:
        long = step >= 0.9 * steps
        length = CONTEXT if long else recipe.length
        epoch, index = divmod(step, epoch_steps)
        rng = np.random.default_rng((recipe.seed, epoch))
        # Rows are whole spans of the shuffled epoch; a new offset each epoch moves the cuts.
        starts = rng.permutation((ids.size - CONTEXT - 1) // CONTEXT)
        offset = int(rng.integers(CONTEXT))
        per_row = CONTEXT // length
        rows = []
        for row in range(span // length):
            flat = index * (span // length) + row
            start = min(int(starts[(flat // per_row) % starts.size]) * CONTEXT + offset, ids.size - CONTEXT - 1)
            start += (flat % per_row) * length
            rows.append(ids[start : start + length + 1].astype(np.int64))
        yield torch.from_numpy(np.stack(rows))
        step += 1


def rate(step: int, steps: int) -> float:
    """The schedule's factor at a step: warm-up 2 %, stable, linear decay over the last fifth."""
    warm, decay = max(1, steps // 50), steps // 5
    return min(1.0, (step + 1) / warm, (steps - step) / decay)


def optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=recipe.learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def loss_of(model: LlamaForCausalLM, teacher: LlamaForCausalLM | None, rows: torch.Tensor) -> torch.Tensor:
    """Cross-entropy; with a teacher, a fifth of it plus four fifths of the KL to the teacher's distribution."""
    inputs, labels = rows[:, :-1], rows[:, 1:].reshape(-1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(inputs).logits.flatten(0, 1)
    loss = F.cross_entropy(logits.float(), labels)
    if teacher is None:
        return loss
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        target = teacher(inputs).logits.flatten(0, 1)
    ours, wanted = logits.float().log_softmax(-1), target.float().log_softmax(-1)
    return 0.2 * loss + 0.8 * F.kl_div(ours, wanted, log_target=True, reduction="batchmean")


@dataclass(slots=True)
class Run:
    """A model in training; ``seconds`` is the time spent so far, over all its sessions."""

    role: str
    recipe: Recipe
    model: LlamaForCausalLM
    optims: list[torch.optim.Optimizer]
    step: int = 0
    seconds: float = 0.0

    @classmethod
    def resumed(cls, role: str) -> Run:
        """From the checkpoint, or from the start."""
        recipe = RECIPES[role]
        model = recipe.model()
        run = cls(role, recipe, model, optimizers(model, recipe))
        if run.checkpoint.exists():
            state = torch.load(run.checkpoint, weights_only=True)
            model.load_state_dict(state["model"])
            for optim, saved in zip(run.optims, state["optims"], strict=True):
                optim.load_state_dict(saved)
            run.step, run.seconds = state["step"], state["seconds"]
        return run

    @property
    def checkpoint(self) -> Path:
        return WORK / f"{self.role}.pt"

    @property
    def tokens(self) -> int:
        return self.step * self.recipe.batch * self.recipe.length

    def save(self, steps: int) -> None:
        """Checkpoint, Hugging Face folder, and the facts for the model card."""
        optims = [optim.state_dict() for optim in self.optims]
        state = {"model": self.model.state_dict(), "optims": optims, "step": self.step, "seconds": self.seconds}
        fresh = self.checkpoint.with_suffix(".tmp")
        torch.save(state, fresh)
        fresh.replace(self.checkpoint)
        export(self.model, self.recipe)
        facts = {"recipe": asdict(self.recipe), "steps": self.step, "of": steps, "tokens": self.tokens}
        (WORK / f"{self.role}.json").write_text(json.dumps({**facts, "seconds": round(self.seconds)}))
        print(f"{self.role} step {self.step}: held-out {heldout_loss(self.model):.4f} nats/token", flush=True)


def train(role: str, steps: int, save_every: int, compiled: bool) -> None:
    """Train ``role`` up to ``steps``; saves every so many steps and at the end."""
    run = Run.resumed(role)
    teacher = None
    if role == "draft":
        teacher = LlamaForCausalLM.from_pretrained(MODELS / RECIPES["target"].name, dtype=torch.float32).eval()
    measure = torch.compile(loss_of, dynamic=False) if compiled else loss_of
    source = batches(run.recipe, run.step, steps, np.load(WORK / "train.npy", mmap_mode="r"))
    mean = 0.0
    while run.step < steps:
        began = time.perf_counter()
        loss = take_step(run, measure, teacher, next(source), rate(run.step, steps))
        run.step, run.seconds = run.step + 1, run.seconds + time.perf_counter() - began
        mean = loss if mean == 0.0 else 0.95 * mean + 0.05 * loss
        if run.step % 20 == 0:
            speed = run.tokens / run.seconds
            print(f"{role} step {run.step}/{steps} loss {mean:.4f} {run.seconds:.0f} s {speed:.0f} tok/s", flush=True)
        if run.step % save_every == 0 or run.step == steps:
            run.save(steps)


def take_step(
    run: Run,
    measure: Callable[..., torch.Tensor],
    teacher: LlamaForCausalLM | None,
    rows: torch.Tensor,
    factor: float,
) -> float:
    """One optimizer step over a batch, in two halves; its loss."""
    for optim in run.optims:
        for group in optim.param_groups:
            group["lr"] = run.recipe.learning_rate * factor
    total = 0.0
    halves = rows.chunk(2)
    for half in halves:
        loss = measure(run.model, teacher, half) / len(halves)
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    for optim in run.optims:
        optim.step()
        optim.zero_grad(set_to_none=True)
    return total


def export(model: LlamaForCausalLM, recipe: Recipe) -> None:
    """An ordinary Hugging Face folder in bf16."""
    folder = MODELS / recipe.name
    copy = recipe.model().bfloat16()
    copy.load_state_dict({k: v.to(torch.bfloat16) for k, v in model.state_dict().items()})
    copy.save_pretrained(folder)
    (folder / "tokenizer.json").write_text((WORK / "tokenizer.json").read_text())
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


@torch.no_grad()
def heldout_loss(model: LlamaForCausalLM, rows: int = 64) -> float:
    """Mean nats per token over ``rows`` windows of 512 held-out tokens, evenly spread."""
    ids = np.load(WORK / "heldout.npy")
    starts = np.linspace(0, ids.size - 514, rows).astype(int)
    model.eval()
    losses = []
    for chunk in np.array_split(starts, max(1, rows // 8)):
        data = torch.from_numpy(np.stack([ids[s : s + 513].astype(np.int64) for s in chunk]))
        logits = model(data[:, :-1]).logits
        losses.append(F.cross_entropy(logits.flatten(0, 1).float(), data[:, 1:].reshape(-1), reduction="none"))
    model.train()
    return float(torch.cat(losses).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tokenizer", "target", "draft", "card"])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="torch.compile: faster; needs a C++ compiler")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.what == "tokenizer":
        train_tokenizer()
    elif options.what == "card":
        import card

        card.write()
    else:
        train(options.what, options.steps, options.save_every, options.compile)


if __name__ == "__main__":
    main()
