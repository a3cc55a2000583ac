"""The tensors of a Hugging Face folder, checked against what the configuration needs, and the model's digests.

One ``model.safetensors``, or shards named by ``model.safetensors.index.json``; bf16, fp16 or fp32 on disk.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from countersign.services.engine.config import Experts, ModelConfig
from countersign.services.engine.errors import CheckpointError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# Old checkpoints store the rotary frequencies, which follow from the configuration.
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


@dataclass(frozen=True, slots=True)
class Digests:
    """32 bytes each, SHA-256.

    weights: see :func:`weights_digest`. tokenizer: of the bytes of tokenizer.json, of no bytes where there is none.
    config: :meth:`ModelConfig.digest`.
    """

    weights: bytes
    tokenizer: bytes
    config: bytes


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder by name.

    Raises:
        CheckpointError: no safetensors file, one that is named is missing, or one is truncated or no safetensors file.
    """
    tensors: dict[str, Tensor] = {}
    for file, names in _files(folder).items():
        found = _read_file(file)
        if names is not None and (wrong := names ^ found.keys()):
            raise CheckpointError(f"{file} and {_INDEX} do not hold the same tensors: {_listing(wrong)}")
        tensors.update(found)
    return tensors


def _files(folder: Path) -> dict[Path, set[str] | None]:
    """Each file, with the names that the index says it holds (None without an index)."""
    if (folder / _SINGLE).is_file():
        return {folder / _SINGLE: None}
    index = folder / _INDEX
    if not index.is_file():
        raise CheckpointError(f"{folder} has neither {_SINGLE} nor {_INDEX}")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards: dict[Path, set[str] | None] = {folder / Path(name).name: set() for name in weight_map.values()}
        for tensor, name in weight_map.items():
            names = shards[folder / Path(name).name]
            if names is not None:
                names.add(tensor)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f'{index} has no "weight_map" of tensor names to file names: {error!r}') from error
    return shards


def _read_file(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise CheckpointError(f"{file.parent} has no {file.name}, which {_INDEX} names")
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  it is no mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is no whole safetensors file: {error}") from error


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """What a family calls a routed layer's weights, after the layer's prefix; {} stands for the expert's index."""

    router: str
    gate: str
    up: str
    down: str


def expert_names(family: str) -> ExpertNames:
    """The names in a checkpoint of this family."""
    if family == "mixtral":
        block, parts = "block_sparse_moe", ("w1", "w3", "w2")
    else:
        block, parts = "mlp", ("gate_proj", "up_proj", "down_proj")
    return ExpertNames(f"{block}.gate.weight", *(f"{block}.experts.{{}}.{part}.weight" for part in parts))


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor that a model of this configuration has."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocabulary_size, config.hidden_size),
        "model.norm.weight": (config.hidden_size,),
    }
    attention = _attention_shapes(config)
    for i in range(config.layers):
        layer = attention | _mlp_shapes(config, config.experts_of(i))
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes if config.tied else shapes | {"lm_head.weight": (config.vocabulary_size, config.hidden_size)}


def _attention_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden = config.hidden_size
    query, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, query),
        "post_attention_layernorm.weight": (hidden,),
    }
    if config.qkv_bias:
        shapes |= {f"self_attn.{part}_proj.bias": (size,) for part, size in (("q", query), ("k", kv), ("v", kv))}
    if config.qk_norm:
        shapes |= {f"self_attn.{part}_norm.weight": (config.head_dim,) for part in ("q", "k")}
    return shapes


def _mlp_shapes(config: ModelConfig, experts: Experts | None) -> dict[str, tuple[int, ...]]:
    hidden = config.hidden_size
    if experts is None:
        into, out = (config.intermediate_size, hidden), (hidden, config.intermediate_size)
        return {"mlp.gate_proj.weight": into, "mlp.up_proj.weight": into, "mlp.down_proj.weight": out}
    names = expert_names(config.family)
    shapes: dict[str, tuple[int, ...]] = {names.router: (experts.count, hidden)}
    for i in range(experts.count):
        shapes |= {name.format(i): (experts.intermediate_size, hidden) for name in (names.gate, names.up)}
        shapes[names.down.format(i)] = (hidden, experts.intermediate_size)
    return shapes


def check_tensors(config: ModelConfig, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Refuses tensors that are not exactly those that the configuration needs.

    Raises:
        CheckpointError: names what is missing, unexpected, of the wrong shape or of an unknown type.
    """
    expected = expected_shapes(config)
    if missing := expected.keys() - tensors.keys():
        raise CheckpointError(f"{folder}: {len(missing)} tensors are missing: {_listing(missing)}")
    for name in sorted(tensors.keys() - expected.keys()):
        if not _is_redundant(config, tensors, name):
            raise CheckpointError(
                f"{folder}: tensor {name} is unexpected in a {config.family} model of this configuration"
            )
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise CheckpointError(
                f"{folder}: {name} has shape {tuple(tensors[name].shape)}, the configuration says {shape}"
            )
        if tensors[name].dtype not in _DTYPES:
            supported = ", ".join(_DTYPES.values())
            raise CheckpointError(f"{folder}: {name} is of type {tensors[name].dtype}; supported: {supported}")


def _is_redundant(config: ModelConfig, tensors: Mapping[str, Tensor], name: str) -> bool:
    if name == "lm_head.weight" and config.tied:
        return torch.equal(tensors[name], tensors["model.embed_tokens.weight"])
    return _DERIVED.fullmatch(name) is not None


def weights_digest(tensors: Mapping[str, Tensor]) -> bytes:
    """SHA-256 over the tensors in the order of their names, so that cutting a checkpoint into other shards keeps it.

    Each tensor adds the line of JSON ``[name,dtype,shape]`` (dtype in safetensors' words), a line feed, and its bytes
    in row-major little-endian order as stored.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        header = [name, _DTYPES.get(tensor.dtype, str(tensor.dtype)), list(tensor.shape)]
        digest.update(json.dumps(header, separators=(",", ":")).encode() + b"\n")
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def digests(folder: Path, config: ModelConfig, tensors: Mapping[str, Tensor]) -> Digests:
    """What a receipt says of the model."""
    tokenizer = folder / "tokenizer.json"
    data = tokenizer.read_bytes() if tokenizer.is_file() else b""
    return Digests(weights_digest(tensors), hashlib.sha256(data).digest(), config.digest())


def _listing(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:5]) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")
