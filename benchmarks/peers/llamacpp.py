"""llama.cpp through llama-cpp-python as a worker: an fp32 GGUF of our own writing, ``llama_decode`` and its drafters.

The loop here calls ``llama_decode`` itself: ``Llama.generate`` takes one stream only, and copies every row of logits
when it speculates.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gguf  # type: ignore[import-not-found]
import llama_cpp as c  # type: ignore[import-not-found]
import numpy as np
import torch
from llama_cpp.llama_speculative import (  # type: ignore[import-not-found]
    LlamaDraftModel,
    LlamaPromptLookupDecoding,
)
from safetensors.torch import load_file

from .protocol import Load, Speculation, Tokens, Unsupported, keep, serve

CONTEXT = 2048
STREAMS = 16


class Row(NamedTuple):
    """One token to compute."""

    token: int
    position: int
    stream: int
    logits: bool


class Context:
    """A model and its KV cache, fp32, for so many streams of ``CONTEXT`` tokens."""

    def __init__(self, model: Any, threads: int, streams: int) -> None:
        params = c.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_seq_max = CONTEXT * streams, CONTEXT * streams, streams
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = c.GGML_TYPE_F32
        self._context = c.llama_init_from_model(model, params)
        self._batch = c.llama_batch_init(CONTEXT * streams, 0, 1)
        self._vocabulary = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))

    def clear(self) -> None:
        """Forgets every stream."""
        c.llama_memory_clear(c.llama_get_memory(self._context), False)

    def truncate(self, length: int) -> None:
        """Keeps the first ``length`` tokens of every stream."""
        c.llama_memory_seq_rm(c.llama_get_memory(self._context), -1, length, -1)

    def argmax(self, rows: Sequence[Row]) -> list[int]:
        """The likeliest next token after each row that wants logits."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, row in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = row.token, row.position, row.logits
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row.stream
        if c.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        shape = (sum(row.logits for row in rows), self._vocabulary)
        found: list[int] = np.ctypeslib.as_array(c.llama_get_logits(self._context), shape).argmax(axis=1).tolist()
        return found


class Draft(LlamaDraftModel):  # type: ignore[misc]
    """A second model behind llama-cpp-python's interface for drafters; keeps the KV of what still agrees."""

    def __init__(self, context: Context, count: int) -> None:
        self._context, self._count, self._held = context, count, list[int]()

    def __call__(self, input_ids: Any, /, **_kwargs: Any) -> Any:
        """The next ``count`` tokens after ``input_ids``."""
        tokens = input_ids.tolist()
        same = next((i for i, (a, b) in enumerate(zip(self._held, tokens, strict=False)) if a != b), len(self._held))
        start = min(same, len(tokens) - 1)
        self._context.truncate(start)
        for _ in range(self._count):
            rows = [Row(t, start + i, 0, False) for i, t in enumerate(tokens[start:])]
            start = len(tokens)
            tokens += self._context.argmax([*rows[:-1], rows[-1]._replace(logits=True)])
        self._held = tokens[:-1]
        return np.array(tokens[-self._count :], dtype=np.intc)


class LlamaCpp:
    """fp32 weights and fp32 KV cache (its own default is fp16)."""

    version = c.__version__

    def __init__(self, load: Load) -> None:
        if load.precision != "fp32":
            raise Unsupported("llama.cpp is measured in fp32 only")
        self._threads = load.threads
        self._model = _read(load, load.model)
        self._draft = _read(load, load.draft) if load.draft else None
        self._contexts: dict[str, Context] = {}

    def generate(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, speculation: Speculation | None, drafted: int
    ) -> Tokens:
        """Several prompts run as parallel sequences of one context, without speculation."""
        if speculation is None:
            streams = 1 if len(prompts) == 1 else STREAMS
            return _decode(self._context("target", self._model, streams), prompts, new_tokens)
        if len(prompts) > 1:
            raise Unsupported("llama.cpp is measured with speculation on one stream only")
        drafter: LlamaDraftModel = LlamaPromptLookupDecoding(3, drafted)
        if speculation == "draft":
            drafter = Draft(self._context("draft", self._draft, 1), drafted)
        return [_speculate(self._context("target", self._model, 1), drafter, prompts[0], new_tokens)]

    def _context(self, role: str, model: Any, streams: int) -> Context:
        key = f"{role} {streams}"
        if key not in self._contexts:
            self._contexts[key] = Context(model, self._threads, streams)
        self._contexts[key].clear()
        return self._contexts[key]


def _decode(context: Context, prompts: Sequence[Sequence[int]], new_tokens: int) -> Tokens:
    rows = [Row(t, i, s, i == len(prompt) - 1) for s, prompt in enumerate(prompts) for i, t in enumerate(prompt)]
    out = [[token] for token in context.argmax(rows)]
    for step in range(new_tokens - 1):
        rows = [
            Row(row[-1], len(prompt) + step, s, True) for s, (prompt, row) in enumerate(zip(prompts, out, strict=True))
        ]
        for row, token in zip(out, context.argmax(rows), strict=True):
            row.append(token)
    return out


def _speculate(context: Context, drafter: LlamaDraftModel, prompt: Sequence[int], new_tokens: int) -> list[int]:
    rows = [Row(t, i, 0, i == len(prompt) - 1) for i, t in enumerate(prompt)]
    tokens = [*prompt, *context.argmax(rows)]
    while len(tokens) < len(prompt) + new_tokens:
        base = len(tokens) - 1
        drafts = drafter(np.array(tokens, dtype=np.intc)).tolist()
        found = context.argmax([Row(t, base + i, 0, True) for i, t in enumerate([tokens[-1], *drafts])])
        accepted = next((i for i, draft in enumerate(drafts) if draft != found[i]), len(drafts))
        tokens += found[: accepted + 1]
        context.truncate(len(tokens) - 1)
    return tokens[len(prompt) : len(prompt) + new_tokens]


def _read(load: Load, folder: Path) -> Any:
    file = keep(load.cache / "llamacpp" / folder.name, lambda out: write_gguf(folder, out)) / "model.gguf"
    return c.llama_model_load_from_file(str(file).encode(), c.llama_model_default_params())


def write_gguf(folder: Path, out: Path) -> None:
    """A Hugging Face Llama checkpoint as ``out/model.gguf``: fp32, no vocabulary, since it is fed token ids."""
    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(out / "model.gguf", "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        count = {"q_proj": heads, "k_proj": kv_heads}.get(name.split(".")[-2])
        array = tensor.float() if count is None else _interleaved(tensor.float(), count)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), array.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """(heads head_dim, in): llama.cpp rotates neighbours 2i and 2i + 1, Hugging Face i and i + head_dim / 2."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape).contiguous()


if __name__ == "__main__":
    serve(LlamaCpp)
