"""A checkpoint's tensors in the order in which a decoder uses them, whatever its family calls them.

H is the hidden size, D the head size, Hq and Hkv the numbers of query and key-value heads, I the inner size of an MLP,
E the number of experts, V the vocabulary. Products are x W^T, as stored. Elements keep the type they have on disk: an
executor converts and packs them as it needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from countersign.services.engine.checkpoint import expert_names
from countersign.services.engine.config import Experts, ModelConfig


@dataclass(frozen=True, slots=True)
class DenseMlp:
    """gate_up: (2 I, H), gate before up. down: (H, I)."""

    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True, slots=True)
class RoutedExperts:
    """router: (E, H). gate_up: (E, 2 I, H), gate before up. down: (E, H, I).

    A row goes to the ``per_token`` experts of the largest softmax(router x), ties to the lower expert, and their
    outputs are added with these shares, which ``normalised`` divides by their sum.
    """

    router: Tensor
    gate_up: Tensor
    down: Tensor
    per_token: int
    normalised: bool


Mlp: TypeAlias = DenseMlp | RoutedExperts


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """attention_norm, mlp_norm: (H). qkv: ((Hq + 2 Hkv) D, H), query heads first, and its bias. q_norm, k_norm: (D).
    output: (H, Hq D).
    """

    attention_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Tensor
    mlp_norm: Tensor
    mlp: Mlp


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """embedding: (V, H). norm: (H). head: (V, H), the embedding itself in a tied model."""

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Tensor


def decoder_weights(config: ModelConfig, tensors: Mapping[str, Tensor]) -> DecoderWeights:
    """The weights of a checkpoint that :func:`countersign.services.engine.checkpoint.check_tensors` accepted."""
    embedding = tensors["model.embed_tokens.weight"]
    return DecoderWeights(
        embedding=embedding,
        layers=tuple(_layer(config, tensors, index) for index in range(config.layers)),
        norm=tensors["model.norm.weight"],
        head=embedding if config.tied else tensors["lm_head.weight"],
    )


def _layer(config: ModelConfig, tensors: Mapping[str, Tensor], index: int) -> LayerWeights:
    prefix = f"model.layers.{index}."

    def joined(kind: str) -> Tensor:
        return torch.cat([tensors[f"{prefix}self_attn.{part}_proj.{kind}"] for part in "qkv"])

    experts = config.experts_of(index)
    return LayerWeights(
        attention_norm=tensors[prefix + "input_layernorm.weight"],
        qkv=joined("weight"),
        qkv_bias=joined("bias") if config.qkv_bias else None,
        q_norm=tensors[prefix + "self_attn.q_norm.weight"] if config.qk_norm else None,
        k_norm=tensors[prefix + "self_attn.k_norm.weight"] if config.qk_norm else None,
        output=tensors[prefix + "self_attn.o_proj.weight"],
        mlp_norm=tensors[prefix + "post_attention_layernorm.weight"],
        mlp=_dense(tensors, prefix) if experts is None else _routed(config.family, experts, tensors, prefix),
    )


def _dense(tensors: Mapping[str, Tensor], prefix: str) -> DenseMlp:
    gate, up, down = (tensors[f"{prefix}mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
    return DenseMlp(torch.cat((gate, up)), down)


def _routed(family: str, experts: Experts, tensors: Mapping[str, Tensor], prefix: str) -> RoutedExperts:
    names = expert_names(family)

    def joined(*parts: str) -> Tensor:
        matrices = [tensors[prefix + part.format(index)] for index in range(experts.count) for part in parts]
        return torch.cat(matrices).view(experts.count, -1, matrices[0].shape[1])

    return RoutedExperts(
        router=tensors[prefix + names.router],
        gate_up=joined(names.gate, names.up),
        down=joined(names.down),
        per_token=experts.per_token,
        normalised=experts.normalised,
    )
