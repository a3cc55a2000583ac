"""What a model is, read from a Hugging Face folder's config.json and generation_config.json.

Every field that changes what is computed is either supported or refused by name and value; a field of unknown meaning
is refused as well. Both ways of writing rotary parameters are read: ``rope_theta`` with ``rope_scaling``
(transformers 4) and ``rope_parameters`` (transformers 5).
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from countersign.services.engine.errors import CheckpointError

Dtype = Literal["fp32", "bf16", "int8"]
Numerics = Literal["invariant", "fast"]
# Of the KV cache, and of weights and activations where torch computes; int8 is of weights only.
TORCH_DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16}

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}

# Training, bookkeeping, or defaults of a generation that this engine takes from the request.
_NO_EFFECT = frozenset({
    "architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "initializer_range", "use_cache",
    "pretraining_tp", "attention_dropout", "bos_token_id", "pad_token_id", "unk_token_id", "sep_token_id",
    "decoder_start_token_id", "output_attentions", "output_hidden_states", "return_dict", "return_dict_in_generate",
    "output_scores", "id2label", "label2id", "problem_type", "chunk_size_feed_forward", "is_encoder_decoder",
    "max_window_layers", "do_sample", "temperature", "top_k", "top_p", "min_length", "max_length",
    "tokenizer_class", "finetuning_task", "task_specific_params", "torchscript",
    "output_router_logits", "router_aux_loss_coef", "router_jitter_noise",
})  # fmt: skip

_READ = frozenset({
    "vocab_size", "max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "intermediate_size", "rms_norm_eps", "tie_word_embeddings", "eos_token_id",
    "rope_theta", "rope_scaling", "rope_parameters", "sliding_window",
})  # fmt: skip

_READ_OF_FAMILY: dict[str, frozenset[str]] = {
    "mixtral": frozenset({"num_local_experts", "num_experts", "num_experts_per_tok"}),
    "qwen3_moe": frozenset({
        "num_local_experts", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
        "decoder_sparse_step", "mlp_only_layers",
    }),
}  # fmt: skip

_READ_OF_ROPE: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset({
        "factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate",
        "original_max_position_embeddings",
    }),
}  # fmt: skip

# Their frequencies change as a sequence grows, while its cached keys stay rotated by the old ones.
_ROPE_BY_LENGTH = frozenset({"dynamic", "longrope", "su"})

# One value of each is supported.
_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
}


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions divided by ``factor`` (position interpolation, Chen et al. 2023)."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Low frequencies divided by ``factor`` (Llama 3.1's release)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context_length: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """Frequencies of few turns in the original context divided by ``factor`` (YaRN, Peng et al. 2023, section 3).

    Cosines and sines are multiplied by ``attention_factor``. ``truncate`` rounds the blend's ends to whole dimensions.
    """

    factor: float
    beta_fast: float
    beta_slow: float
    attention_factor: float
    original_context_length: int
    truncate: bool


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding."""

    theta: float
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts in every layer but ``dense_layers``.

    ``normalised``: the shares of the ``per_token`` experts chosen are divided by their sum.
    """

    count: int
    per_token: int
    intermediate_size: int
    normalised: bool
    dense_layers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder of the Llama family.

    Sizes count elements; ``sliding_window`` counts tokens, the query's own included.
    """

    family: str
    vocabulary_size: int
    context_length: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_eps: float
    rope: Rope
    qkv_bias: bool
    qk_norm: bool
    sliding_window: int | None
    tied: bool
    end_token_ids: frozenset[int]
    experts: Experts | None = None

    def experts_of(self, layer: int) -> Experts | None:
        """The layer's experts; None where its MLP is dense."""
        return None if self.experts is None or layer in self.experts.dense_layers else self.experts

    @staticmethod
    def from_folder(folder: Path) -> ModelConfig:
        """Reads config.json and, if there is one, generation_config.json.

        Raises:
            CheckpointError: a file is missing or no JSON object, or a field is missing, ill-typed or not supported.
        """
        fields = _Fields(folder / "config.json", _read_object(folder / "config.json"))
        generation = folder / "generation_config.json"
        ends = _end_token_ids(fields)
        if generation.exists():
            ends |= _end_token_ids(_Fields(generation, _read_object(generation)))
        return _understand(fields, ends)

    def digest(self) -> bytes:
        """SHA-256 of this record as canonical JSON: keys sorted, no spaces, sets as sorted lists."""
        record = asdict(self)
        record["end_token_ids"] = sorted(self.end_token_ids)
        return hashlib.sha256(json.dumps(record, sort_keys=True, separators=(",", ":")).encode()).digest()


@dataclass(frozen=True, slots=True)
class _Fields:
    """A JSON object whose fields are asked for by name and type."""

    file: Path
    values: dict[str, Any]

    def refuse(self, name: str, supported: str) -> CheckpointError:
        value = f"= {json.dumps(self.values[name])} is not supported" if name in self.values else "is missing"
        return CheckpointError(f'{self.file}: "{name}" {value}; supported: {supported}')

    def positive_int(self, name: str, default: int | None = None) -> int:
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.refuse(name, "an integer above 0")
        return value

    def positive_float(self, name: str, default: float | None = None) -> float:
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self.refuse(name, "a number above 0")
        return float(value)

    def flag(self, name: str, *, default: bool = False) -> bool:
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            raise self.refuse(name, "true or false")
        return value


def _read_object(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file.parent} has no readable {file.name}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} holds no JSON object")
    return values


def _understand(fields: _Fields, ends: frozenset[int]) -> ModelConfig:
    family = _family(fields)
    _refuse_what_is_not_supported(fields, family)
    heads, hidden = fields.positive_int("num_attention_heads"), fields.positive_int("hidden_size")
    kv_heads = fields.positive_int("num_key_value_heads", default=heads if family == "llama" else None)
    if heads % kv_heads:
        raise fields.refuse("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    head_dim = fields.positive_int("head_dim", default=None if family == "qwen3" or hidden % heads else hidden // heads)
    if head_dim % 2:
        raise fields.refuse("head_dim", "an even number")
    vocabulary, context = fields.positive_int("vocab_size"), fields.positive_int("max_position_embeddings")
    rope = _rope(fields, family, context)
    if any(end >= vocabulary for end in ends):
        raise CheckpointError(f"{fields.file.parent}: an eos_token_id of {sorted(ends)} is outside the vocabulary")
    return ModelConfig(
        family=family,
        vocabulary_size=vocabulary,
        context_length=_context_length(context, rope),
        hidden_size=hidden,
        layers=fields.positive_int("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=fields.positive_int("intermediate_size"),
        rms_eps=fields.positive_float("rms_norm_eps"),
        rope=rope,
        qkv_bias=family == "qwen2",
        qk_norm=family in ("qwen3", "qwen3_moe"),
        sliding_window=_sliding_window(fields, family),
        tied=fields.flag("tie_word_embeddings"),
        end_token_ids=ends,
        experts=_experts(fields, family),
    )


def _family(fields: _Fields) -> str:
    family = fields.values.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise fields.refuse("model_type", ", ".join(FAMILIES))
    if fields.values.get("architectures") not in (None, [FAMILIES[family]]):
        raise fields.refuse("architectures", json.dumps([FAMILIES[family]]))
    return family


def _refuse_what_is_not_supported(fields: _Fields, family: str) -> None:
    known = _READ | _NO_EFFECT | _READ_OF_FAMILY.get(family, frozenset())
    for name, value in fields.values.items():
        if name in _FIXED:
            if value is not None and value != _FIXED[name]:
                raise fields.refuse(name, json.dumps(_FIXED[name]))
        elif name == "layer_types":
            _refuse_mixed_layers(fields, family)
        elif name not in known and not name.startswith("_") and value not in (None, False):
            raise fields.refuse(name, "null or no such field, as its meaning is not known here")


def _refuse_mixed_layers(fields: _Fields, family: str) -> None:
    kind = "full_attention" if _sliding_window(fields, family) is None else "sliding_attention"
    if fields.values["layer_types"] not in (None, [kind] * fields.positive_int("num_hidden_layers")):
        raise fields.refuse("layer_types", f"{kind} in every layer")


def _sliding_window(fields: _Fields, family: str) -> int | None:
    # Qwen's window is off unless use_sliding_window, which is refused above; Mistral's default is a window of its own.
    required = {"mistral": True, "mixtral": False}.get(family)
    if required is None or fields.values.get("sliding_window", 0 if required else None) is None:
        return None
    return fields.positive_int("sliding_window")


def _experts(fields: _Fields, family: str) -> Experts | None:
    if family not in _READ_OF_FAMILY:
        return None
    count = fields.positive_int("num_experts" if "num_experts" in fields.values else "num_local_experts")
    per_token = fields.positive_int("num_experts_per_tok")
    if per_token > count:
        raise fields.refuse("num_experts_per_tok", f"at most the number of experts ({count})")
    if family == "mixtral":
        return Experts(count, per_token, fields.positive_int("intermediate_size"), normalised=True)
    return Experts(
        count=count,
        per_token=per_token,
        intermediate_size=fields.positive_int("moe_intermediate_size"),
        normalised=fields.flag("norm_topk_prob"),
        dense_layers=_dense_layers(fields),
    )


def _dense_layers(fields: _Fields) -> tuple[int, ...]:
    layers, step = fields.positive_int("num_hidden_layers"), fields.positive_int("decoder_sparse_step", default=1)
    named = fields.values.get("mlp_only_layers") or []
    if not isinstance(named, list) or any(isinstance(i, bool) or i not in range(layers) for i in named):
        raise fields.refuse("mlp_only_layers", f"a list of layers below {layers}, or null")
    return tuple(i for i in range(layers) if i in named or (i + 1) % step)


def _end_token_ids(fields: _Fields) -> frozenset[int]:
    value = fields.values.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(end, bool) or not isinstance(end, int) or end < 0 for end in ids):
        raise fields.refuse("eos_token_id", "a token id, a list of them, or null")
    return frozenset(ids)


def _rope(fields: _Fields, family: str, context: int) -> Rope:
    name = "rope_parameters" if fields.values.get("rope_parameters") is not None else "rope_scaling"
    values = fields.values.get(name) or {}
    if not isinstance(values, dict):
        raise fields.refuse(name, "an object or null")
    rope = _Fields(fields.file, {"rope_theta": fields.values.get("rope_theta"), **values})
    theta = rope.positive_float("rope_theta", default=1e6 if family == "mixtral" else 1e4)
    kind = values.get("rope_type", values.get("type", "default"))
    supported = "rope_type " + ", ".join(_READ_OF_ROPE)
    if not isinstance(kind, str):
        raise fields.refuse(name, supported)
    if kind in _ROPE_BY_LENGTH:
        raise fields.refuse(
            name, f"{supported}; type {kind} rotates by the sequence's length, which no KV cache can hold"
        )
    if kind not in _READ_OF_ROPE:
        raise fields.refuse(name, supported)
    if set(values) - _READ_OF_ROPE[kind] - {"rope_type", "type", "rope_theta"}:
        raise fields.refuse(name, ", ".join(["rope_theta", *sorted(_READ_OF_ROPE[kind])]) + f" in type {kind}")
    match kind:
        case "linear":
            return Rope(theta, LinearScaling(rope.positive_float("factor")))
        case "llama3":
            return Rope(theta, _llama3(fields, name, rope))
        case "yarn":
            return Rope(theta, _yarn(rope, theta, context))
        case _:
            return Rope(theta)


def _llama3(fields: _Fields, name: str, rope: _Fields) -> Llama3Scaling:
    low, high = rope.positive_float("low_freq_factor"), rope.positive_float("high_freq_factor")
    if not low < high:
        raise fields.refuse(name, "a low_freq_factor below high_freq_factor")
    return Llama3Scaling(
        rope.positive_float("factor"), low, high, rope.positive_int("original_max_position_embeddings")
    )


def _yarn(rope: _Fields, theta: float, context: int) -> YarnScaling:
    factor = rope.positive_float("factor")
    fast, slow = rope.positive_float("beta_fast", default=32), rope.positive_float("beta_slow", default=1)
    if slow > fast:
        raise rope.refuse("beta_slow", f"at most beta_fast ({fast})")
    if theta <= 1:
        raise rope.refuse("rope_theta", "a number above 1 in type yarn")

    def attention(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    derived = attention(1)
    if rope.values.get("mscale") and rope.values.get("mscale_all_dim"):
        derived = attention(rope.positive_float("mscale")) / attention(rope.positive_float("mscale_all_dim"))
    return YarnScaling(
        factor=factor,
        beta_fast=fast,
        beta_slow=slow,
        attention_factor=rope.positive_float("attention_factor", default=derived),
        original_context_length=rope.positive_int("original_max_position_embeddings", default=context),
        truncate=rope.flag("truncate", default=True),
    )


def _context_length(context: int, rope: Rope) -> int:
    """YaRN is added to configurations that go on naming the original length, as Qwen's model cards tell to do."""
    if isinstance(rope.scaling, YarnScaling):
        return max(context, int(rope.scaling.factor * rope.scaling.original_context_length))
    return context
