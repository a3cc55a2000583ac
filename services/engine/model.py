"""A decoder of the Llama family over a paged KV cache, for the new tokens of several sequences at once.

    h = embed(token)
    h += output(attention(qkv(norm(h))));  h += down(swiglu(gate_up(norm(h))))      in each layer
    logits = head(norm(h))

In fp32 the logits of a token are the same bits whether its sequence runs alone or in a batch, in whatever pieces its
prefix was computed, and whether its prefix's KV was imported: every operation treats a row on its own (:mod:`linear`,
:mod:`countersign.kernels.attention`, :mod:`countersign.kernels.swiglu`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from countersign.kernels import attention
from countersign.kernels.rotary import rotate
from countersign.kernels.swiglu import swiglu
from countersign.services.engine.checkpoint import Digests, check_tensors, digests, read_tensors
from countersign.services.engine.config import TORCH_DTYPES, Dtype, ModelConfig
from countersign.services.engine.kv import PagedCache
from countersign.services.engine.linear import Linear, LinearMode, LinearPacker
from countersign.services.engine.rope import RotaryTable
from countersign.services.engine.step import Group, Span, Step, check_spans, plan

__all__ = ["Digests", "Model", "Paths", "Span", "load_model"]


@dataclass(frozen=True, slots=True)
class Paths:
    """Which way each operation is computed here: the mode of each linear shape (out, in), and attention's path."""

    linear: Mapping[tuple[int, int], LinearMode]
    attention: attention.Path


@dataclass(frozen=True, slots=True)
class _Layer:
    """``qk_norm``: (heads + kv_heads, head_dim), the query norm's weight for each head, then the key norm's."""

    attention_norm: Tensor
    qkv: Linear
    qk_norm: Tensor | None
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


class Model:
    """Weights ready to run. Made by :func:`load_model`."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Tensor], named: Digests, dtype: Dtype) -> None:
        self.config, self.digests, self.dtype = config, named, dtype
        kind = TORCH_DTYPES[dtype]
        packer = LinearPacker()
        weights = _Weights(config, tensors, kind)
        self._embedding = weights.tensor("model.embed_tokens.weight")
        self._layers = [weights.layer(i, packer) for i in range(config.layers)]
        self._norm = weights.tensor("model.norm.weight")
        self._head = packer.pack(self._embedding if config.tied else weights.tensor("lm_head.weight"))
        self._rotary = RotaryTable(config.rope, config.head_dim, kind)
        path = attention.select_path(config.heads, config.kv_heads, config.head_dim, kind)
        self.paths = Paths(packer.modes, path)

    @torch.inference_mode()
    def forward(self, cache: PagedCache, spans: Sequence[Span]) -> Tensor:
        """Computes the spans' tokens, writes their K and V, and advances the sequences.

        Returns:
            (sum of ``span.logits``, vocabulary) fp32, spans in the order given.

        Raises:
            InvalidSpan, ContextExceeded: see :func:`check_spans`; nothing changed.
            OutOfPages: the cache is full; nothing changed.
        """
        check_spans(self.config, cache, spans)
        cache.reserve({span.sequence: span.sequence.length + len(span.token_ids) for span in spans})
        step = plan(spans, self.config.sliding_window, cache.dtype)
        hidden = self._embedding.index_select(0, step.token_ids)
        angles = self._rotary.rows(step.positions, step.end)
        for layer, kv in zip(self._layers, cache.pool, strict=True):
            hidden = hidden + layer.output(self._attend(layer, hidden, step, angles, kv))
            hidden = hidden + layer.down(swiglu(layer.gate_up(self._normalised(hidden, layer.mlp_norm))))
        logits = self._logits(hidden, step)
        for span in spans:
            span.sequence.length += len(span.token_ids)
        return logits

    def _attend(self, layer: _Layer, hidden: Tensor, step: Step, angles: tuple[Tensor, Tensor], kv: Tensor) -> Tensor:
        """(M', hidden) to (M', heads head_dim); ``kv`` is the layer's part of the pool."""
        heads, kv_heads, size = self.config.heads, self.config.kv_heads, self.config.head_dim
        qkv = layer.qkv(self._normalised(hidden, layer.attention_norm))[: step.rows].view(step.rows, -1, size)
        qk = qkv[:, : heads + kv_heads]
        if layer.qk_norm is not None:
            qk = F.rms_norm(qk, (size,), None, self.config.rms_eps) * layer.qk_norm
        qk = rotate(qk, *angles)
        slots = kv.view(2, -1, kv_heads, size)
        slots[0].index_copy_(0, step.slots, qk[:, heads:])
        slots[1].index_copy_(0, step.slots, qkv[:, heads + kv_heads :])
        results = [self._attend_group(qk, group, kv) for group in step.groups]
        return (results[0] if len(results) == 1 else torch.cat(results)).index_select(0, step.take)

    def _attend_group(self, qk: Tensor, group: Group, kv: Tensor) -> Tensor:
        """(B T, heads head_dim)."""
        heads, kv_heads, size = self.config.heads, self.config.kv_heads, self.config.head_dim
        q = qk[:, :heads].index_select(0, group.rows).view(group.batch, -1, heads, size).transpose(1, 2)
        keys = kv.index_select(1, group.pages).view(2, group.batch, group.keys, kv_heads, size).transpose(2, 3)
        out, _ = attention.attend(q, keys[0], keys[1], group.mask, scale=size**-0.5, path=self.paths.attention)
        return out.transpose(1, 2).reshape(-1, heads * size)

    def _normalised(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.config.rms_eps)

    def _logits(self, hidden: Tensor, step: Step) -> Tensor:
        if not step.logits:
            return torch.empty(0, self.config.vocabulary_size)
        wanted = self._normalised(hidden.index_select(0, step.logit_rows), self._norm)
        return self._head(wanted)[: step.logits].float()


@dataclass(frozen=True, slots=True)
class _Weights:
    """A checkpoint's tensors by name, in the dtype that runs."""

    config: ModelConfig
    tensors: Mapping[str, Tensor]
    dtype: torch.dtype

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name].to(self.dtype)

    def layer(self, index: int, packer: LinearPacker) -> _Layer:
        """One decoder layer; q, k and v become one product, gate and up another."""
        prefix = f"model.layers.{index}."

        def joined(block: str, parts: tuple[str, ...], kind: str = "weight") -> Tensor:
            return torch.cat([self.tensor(f"{prefix}{block}.{part}_proj.{kind}") for part in parts])

        bias = joined("self_attn", ("q", "k", "v"), "bias") if self.config.qkv_bias else None
        return _Layer(
            attention_norm=self.tensor(prefix + "input_layernorm.weight"),
            qkv=packer.pack(joined("self_attn", ("q", "k", "v")), bias),
            qk_norm=self._qk_norm(prefix) if self.config.qk_norm else None,
            output=packer.pack(joined("self_attn", ("o",))),
            mlp_norm=self.tensor(prefix + "post_attention_layernorm.weight"),
            gate_up=packer.pack(joined("mlp", ("gate", "up"))),
            down=packer.pack(joined("mlp", ("down",))),
        )

    def _qk_norm(self, prefix: str) -> Tensor:
        counts = (("q", self.config.heads), ("k", self.config.kv_heads))
        return torch.cat(
            [self.tensor(f"{prefix}self_attn.{part}_norm.weight").repeat(count, 1) for part, count in counts]
        )


def load_model(folder: Path, *, dtype: Dtype = "fp32") -> Model:
    """Reads a Hugging Face folder of the Llama family.

    Raises:
        CheckpointError: the folder is not understood or not whole; the message says what is missing.
    """
    config = ModelConfig.from_folder(folder)
    tensors = read_tensors(folder)
    check_tensors(config, tensors, folder)
    return Model(config, tensors, digests(folder, config, tensors), dtype)
