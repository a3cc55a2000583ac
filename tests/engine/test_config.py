"""What a folder's config.json says, and what is refused by name."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

from countersign.services.engine.config import Experts, LinearScaling, Llama3Scaling, ModelConfig, Rope, YarnScaling
from countersign.services.engine.errors import CheckpointError

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "eos_token_id": 3,
    "torch_dtype": "bfloat16",
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
MIXTRAL: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "rope_theta": ...,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.02,
    "output_router_logits": False,
}
QWEN3_MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "head_dim": 16,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def read(folder: Path, **changes: Any) -> ModelConfig:
    """The configuration after these changes; a field set to ... is left out."""
    fields = {name: value for name, value in {**LLAMA, **changes}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(fields))
    return ModelConfig.from_folder(folder)


def test_a_llama_of_transformers_4_is_understood(tmp_path: Path) -> None:
    assert read(tmp_path, rope_scaling=LLAMA3) == ModelConfig(
        family="llama",
        vocabulary_size=100,
        context_length=512,
        hidden_size=64,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=16,
        intermediate_size=96,
        rms_eps=1e-5,
        rope=Rope(5e5, Llama3Scaling(8.0, 1.0, 4.0, 256)),
        qkv_bias=False,
        qk_norm=False,
        sliding_window=None,
        tied=False,
        end_token_ids=frozenset({3}),
    )


def test_rope_parameters_of_transformers_5_win_over_rope_theta(tmp_path: Path) -> None:
    assert read(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 7.0}).rope == Rope(7.0)


def test_yarn_as_a_model_card_adds_it_stretches_the_context(tmp_path: Path) -> None:
    config = read(tmp_path, rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512})
    assert config.rope == Rope(5e5, YarnScaling(4.0, 32.0, 1.0, 0.1 * math.log(4) + 1, 512, truncate=True))
    assert config.context_length == 2048
    assert read(tmp_path, rope_scaling={"type": "yarn", "factor": 0.5}).context_length == 512


def test_yarns_attention_factor_is_the_one_given_or_follows_from_mscale(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "mscale": 2.0, "mscale_all_dim": 0.5}

    def factor(**changes: float) -> float:
        scaling = read(tmp_path, rope_scaling=yarn | changes).rope.scaling
        assert isinstance(scaling, YarnScaling)
        return scaling.attention_factor

    assert factor() == (0.2 * math.log(4) + 1) / (0.05 * math.log(4) + 1)
    assert factor(attention_factor=1.5) == 1.5


def test_linear_scaling_leaves_the_context_as_it_is_given(tmp_path: Path) -> None:
    config = read(tmp_path, rope_scaling={"type": "linear", "factor": 4})
    assert (config.rope, config.context_length) == (Rope(5e5, LinearScaling(4.0)), 512)


def test_mixtral_has_experts_everywhere_and_a_theta_of_its_own(tmp_path: Path) -> None:
    config = read(tmp_path, **MIXTRAL)
    assert config.experts == Experts(8, 2, 96, normalised=True)
    assert (config.rope, config.sliding_window) == (Rope(1e6), None)
    assert read(tmp_path, **MIXTRAL, sliding_window=32).sliding_window == 32


def test_qwen3_moe_has_experts_where_its_configuration_says(tmp_path: Path) -> None:
    config = read(tmp_path, **QWEN3_MOE)
    assert config.experts == Experts(6, 3, 40, normalised=True)
    assert config.qk_norm
    renamed = {"num_experts": ..., "num_local_experts": 6}
    assert read(tmp_path, **{**QWEN3_MOE, **renamed}) == config
    deep = {**QWEN3_MOE, "num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    sparse = read(tmp_path, **deep)
    assert [sparse.experts_of(layer) is not None for layer in range(6)] == [False, True, False, False, False, True]


def test_end_tokens_of_the_generation_configuration_are_added(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6], "top_p": 0.9}')
    assert read(tmp_path).end_token_ids == {3, 5, 6}
    assert read(tmp_path, eos_token_id=None).end_token_ids == {5, 6}


def test_a_window_counts_in_mistral_and_is_off_in_qwen(tmp_path: Path) -> None:
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    qwen = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False}
    assert read(tmp_path, **mistral, sliding_window=32).sliding_window == 32
    assert read(tmp_path, **mistral, sliding_window=None).sliding_window is None
    assert read(tmp_path, **qwen, sliding_window=32, layer_types=["full_attention"] * 2).sliding_window is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gpt2"}, ['"model_type" = "gpt2"', "llama, qwen2, qwen3, mistral"]),
        ({"model_type": ...}, ['"model_type" is missing']),
        ({"model_type": ["llama"]}, ['"model_type" = ["llama"]']),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["architectures", "LlamaForCausalLM"]),
        ({"hidden_act": "gelu"}, ['"hidden_act" = "gelu"', "silu"]),
        ({"attention_bias": True}, ['"attention_bias" = true', "false"]),
        ({"mlp_bias": True}, ['"mlp_bias" = true']),
        ({"use_sliding_window": True}, ['"use_sliding_window" = true']),
        ({"quantization_config": {"bits": 4}}, ['"quantization_config" = {"bits": 4}']),
        ({"logit_softcapping": 30.0}, ['"logit_softcapping" = 30.0', "not known"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types", "full_attention in every layer"]),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
            ["rope_scaling", "dynamic", "no KV cache", "yarn"],
        ),
        ({"rope_scaling": {"type": "longrope", "long_factor": [1.0]}}, ["longrope", "no KV cache"]),
        ({"rope_scaling": {"type": "spiral"}}, ["spiral", "rope_type default, linear, llama3, yarn"]),
        ({"rope_scaling": {"type": ["yarn"]}}, ["rope_scaling", "rope_type default, linear, llama3, yarn"]),
        ({"rope_scaling": {"type": "yarn"}}, ['"factor" is missing']),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta": 3}}, ["rope_scaling", "beta_fast", "in type yarn"]),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": 0}}, ['"truncate" = 0', "true or false"]),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_slow": 40}}, ['"beta_slow" = 40', "at most beta_fast"]),
        ({"rope_parameters": {"type": "yarn", "factor": 2.0, "rope_theta": 1}}, ['"rope_theta" = 1', "above 1"]),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, ['"factor" = "2"']),
        ({"num_local_experts": 8}, ['"num_local_experts" = 8', "not known"]),
        ({**MIXTRAL, "num_local_experts": ...}, ['"num_local_experts" is missing']),
        ({**MIXTRAL, "num_experts_per_tok": 9}, ['"num_experts_per_tok" = 9', "at most the number of experts (8)"]),
        ({**QWEN3_MOE, "mlp_only_layers": [2]}, ['"mlp_only_layers" = [2]', "layers below 2"]),
        ({**QWEN3_MOE, "mlp_only_layers": 1}, ['"mlp_only_layers" = 1']),
        ({**QWEN3_MOE, "norm_topk_prob": "yes"}, ['"norm_topk_prob" = "yes"', "true or false"]),
        ({**QWEN3_MOE, "moe_intermediate_size": ...}, ['"moe_intermediate_size" is missing']),
        ({"rope_parameters": {"rope_theta": 1.0, "partial_rotary_factor": 0.5}}, ["partial_rotary_factor"]),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, ["low_freq_factor below high_freq_factor"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ['"low_freq_factor" is missing']),
        ({"rope_scaling": "yes"}, ['"rope_scaling" = "yes"', "an object or null"]),
        ({"hidden_size": ...}, ['"hidden_size" is missing', "an integer above 0"]),
        ({"hidden_size": "64"}, ['"hidden_size" = "64"']),
        ({"num_hidden_layers": 0}, ['"num_hidden_layers" = 0']),
        ({"num_hidden_layers": True}, ['"num_hidden_layers" = true']),
        ({"num_key_value_heads": 3}, ['"num_key_value_heads" = 3', "divisor"]),
        ({"head_dim": 15}, ['"head_dim" = 15', "even"]),
        ({"rms_norm_eps": -1.0}, ['"rms_norm_eps" = -1.0']),
        ({"tie_word_embeddings": 1}, ['"tie_word_embeddings" = 1', "true or false"]),
        ({"eos_token_id": "</s>"}, ['"eos_token_id" = "</s>"']),
        ({"eos_token_id": 100}, ["eos_token_id", "outside the vocabulary"]),
        ({"model_type": "qwen3", "architectures": None}, ['"head_dim" is missing']),
        ({"model_type": "mistral", "architectures": None}, ['"sliding_window" is missing']),
    ],
)
def test_what_is_not_supported_is_refused_by_field_and_value(
    changes: dict[str, Any], named: list[str], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as refusal:
        read(tmp_path, **changes)
    for part in named:
        assert part in str(refusal.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_a_file_that_is_no_json_object_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ModelConfig.from_folder(tmp_path)


def test_a_folder_without_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no readable config\.json"):
        ModelConfig.from_folder(tmp_path)


def test_the_digest_is_that_of_canonical_json(tmp_path: Path) -> None:
    canonical = (
        '{"context_length":512,"end_token_ids":[1,3],"experts":null,"family":"llama","head_dim":16,"heads":4,"hidden_size":64,'
        '"intermediate_size":96,"kv_heads":2,"layers":2,"qk_norm":false,"qkv_bias":false,"rms_eps":1e-05,'
        '"rope":{"scaling":null,"theta":500000.0},"sliding_window":null,"tied":false,"vocabulary_size":100}'
    )
    assert read(tmp_path, eos_token_id=[3, 1]).digest() == hashlib.sha256(canonical.encode()).digest()
    assert read(tmp_path, rope_theta=1e4).digest() != read(tmp_path).digest()
