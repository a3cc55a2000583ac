"""What a model is, read from a Hugging Face folder's config.json and generation_config.json.

Every field that changes what is computed is either supported or refused by name and value; a field of unknown meaning
is refused as well. Both ways of writing rotary parameters are read: ``rope_theta`` with ``rope_scaling``
(transformers 4) and ``rope_parameters`` (transformers 5).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from countersign.services.engine.errors import CheckpointError

Dtype = Literal["fp32", "bf16"]
TORCH_DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
}

# Training, bookkeeping, or defaults of a generation that this engine takes from the request.
_NO_EFFECT = frozenset({
    "architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "initializer_range", "use_cache",
    "pretraining_tp", "attention_dropout", "bos_token_id", "pad_token_id", "unk_token_id", "sep_token_id",
    "decoder_start_token_id", "output_attentions", "output_hidden_states", "return_dict", "return_dict_in_generate",
    "output_scores", "id2label", "label2id", "problem_type", "chunk_size_feed_forward", "is_encoder_decoder",
    "max_window_layers", "do_sample", "temperature", "top_k", "top_p", "min_length", "max_length",
    "tokenizer_class", "finetuning_task", "task_specific_params", "torchscript",
})  # fmt: skip

_READ = frozenset({
    "vocab_size", "max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "intermediate_size", "rms_norm_eps", "tie_word_embeddings", "eos_token_id",
    "rope_theta", "rope_scaling", "rope_parameters", "sliding_window",
})  # fmt: skip

# One value of each is supported.
_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
}


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding. The factors are those of type ``llama3`` and 0 in type ``default``."""

    theta: float
    type: Literal["default", "llama3"] = "default"
    factor: float = 0.0
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    original_context_length: int = 0


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

    def flag(self, name: str) -> bool:
        value = self.values.get(name, False)
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
    _refuse_what_is_not_supported(fields)
    heads, hidden = fields.positive_int("num_attention_heads"), fields.positive_int("hidden_size")
    kv_heads = fields.positive_int("num_key_value_heads", default=heads if family == "llama" else None)
    if heads % kv_heads:
        raise fields.refuse("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    head_dim = fields.positive_int("head_dim", default=None if family == "qwen3" or hidden % heads else hidden // heads)
    if head_dim % 2:
        raise fields.refuse("head_dim", "an even number")
    vocabulary = fields.positive_int("vocab_size")
    if any(end >= vocabulary for end in ends):
        raise CheckpointError(f"{fields.file.parent}: an eos_token_id of {sorted(ends)} is outside the vocabulary")
    return ModelConfig(
        family=family,
        vocabulary_size=vocabulary,
        context_length=fields.positive_int("max_position_embeddings"),
        hidden_size=hidden,
        layers=fields.positive_int("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=fields.positive_int("intermediate_size"),
        rms_eps=fields.positive_float("rms_norm_eps"),
        rope=_rope(fields),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        sliding_window=_sliding_window(fields, family),
        tied=fields.flag("tie_word_embeddings"),
        end_token_ids=ends,
    )


def _family(fields: _Fields) -> str:
    family = fields.values.get("model_type")
    if family not in FAMILIES:
        raise fields.refuse("model_type", ", ".join(FAMILIES))
    if fields.values.get("architectures") not in (None, [FAMILIES[family]]):
        raise fields.refuse("architectures", json.dumps([FAMILIES[family]]))
    return str(family)


def _refuse_what_is_not_supported(fields: _Fields) -> None:
    for name, value in fields.values.items():
        if name in _FIXED:
            if value is not None and value != _FIXED[name]:
                raise fields.refuse(name, json.dumps(_FIXED[name]))
        elif name == "layer_types":
            _refuse_mixed_layers(fields)
        elif name not in _READ | _NO_EFFECT and not name.startswith("_") and value not in (None, False):
            raise fields.refuse(name, "null or no such field, as its meaning is not known here")


def _refuse_mixed_layers(fields: _Fields) -> None:
    sliding = fields.values.get("model_type") == "mistral" and fields.values.get("sliding_window") is not None
    kind = "sliding_attention" if sliding else "full_attention"
    if fields.values["layer_types"] not in (None, [kind] * fields.positive_int("num_hidden_layers")):
        raise fields.refuse("layer_types", f"{kind} in every layer")


def _sliding_window(fields: _Fields, family: str) -> int | None:
    # Qwen's window is off unless use_sliding_window, which is refused above.
    if family != "mistral" or fields.values.get("sliding_window", 0) is None:
        return None
    return fields.positive_int("sliding_window")


def _end_token_ids(fields: _Fields) -> frozenset[int]:
    value = fields.values.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(end, bool) or not isinstance(end, int) or end < 0 for end in ids):
        raise fields.refuse("eos_token_id", "a token id, a list of them, or null")
    return frozenset(ids)


def _rope(fields: _Fields) -> Rope:
    name = "rope_parameters" if fields.values.get("rope_parameters") is not None else "rope_scaling"
    values = fields.values.get(name) or {}
    if not isinstance(values, dict):
        raise fields.refuse(name, "an object or null")
    rope = _Fields(fields.file, {"rope_theta": fields.values.get("rope_theta"), **values})
    theta = rope.positive_float("rope_theta", default=10_000.0)
    kind = values.get("rope_type", values.get("type", "default"))
    factors = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    known = {"rope_type", "type", "rope_theta"} | (factors if kind == "llama3" else set())
    if kind not in ("default", "llama3") or set(values) - known:
        raise fields.refuse(name, "rope_type default, or llama3 with " + ", ".join(sorted(factors)))
    if kind == "default":
        return Rope(theta)
    low, high = rope.positive_float("low_freq_factor"), rope.positive_float("high_freq_factor")
    if not low < high:
        raise fields.refuse(name, "a low_freq_factor below high_freq_factor")
    original = rope.positive_int("original_max_position_embeddings")
    return Rope(theta, "llama3", rope.positive_float("factor"), low, high, original)
