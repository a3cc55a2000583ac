"""The engine against transformers on random small models: logits within 2e-4 in fp32."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from countersign.services.engine.config import Llama3Scaling
from countersign.services.engine.eager import EagerExecutor
from countersign.services.engine.kv import PagedCache
from countersign.services.engine.linear import LinearMode
from countersign.services.engine.model import Backend, Model, Span, load_model

TOLERANCE = 2e-4
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-without-grouping": ("llama", {"num_key_value_heads": 4}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1, "head_dim": 32}),
    "llama3-scaling": ("llama", {"rope_parameters": LLAMA3}),
    "qwen2": ("qwen2", {"hidden_size": 64}),
    "qwen2-tied": ("qwen2", {"hidden_size": 64, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True, "head_dim": 32}),
    "mistral-window": ("mistral", {"sliding_window": 7}),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
    "mixtral": ("mixtral", {}),
    "mixtral-window": ("mixtral", {"sliding_window": 7, "num_local_experts": 3, "num_experts_per_tok": 1}),
    "qwen3-moe": ("qwen3_moe", {}),
    "qwen3-moe-shares-add-to-one": ("qwen3_moe", {"norm_topk_prob": True, "num_experts_per_tok": 6}),
    "qwen3-moe-every-second-layer": ("qwen3_moe", {"decoder_sparse_step": 2, "num_hidden_layers": 3}),
    "qwen3-moe-dense-first-layer": ("qwen3_moe", {"mlp_only_layers": [0]}),
    "linear-scaling": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "yarn-qwen2": ("qwen2", {"hidden_size": 64, "rope_parameters": {**YARN, "factor": 2.0}}),
    "yarn-qwen3": ("qwen3", {"rope_parameters": {**YARN, "attention_factor": 1.5}}),
    "yarn-qwen3-moe": ("qwen3_moe", {"rope_parameters": {**YARN, "beta_fast": 2.0, "beta_slow": 0.5}}),
    "yarn-not-truncated": ("mistral", {"rope_parameters": {**YARN, "truncate": False}, "sliding_window": None}),
    "yarn-mscale": ("mixtral", {"rope_parameters": {**YARN, "mscale": 2.0, "mscale_all_dim": 0.5}}),
}


def eager(model: Model) -> EagerExecutor:
    assert isinstance(model.executor, EagerExecutor)
    return model.executor


def prompt(length: int = 150) -> list[int]:
    return torch.randint(0, 96, (length,), generator=torch.Generator().manual_seed(3)).tolist()


def oracle(model: Any, token_ids: list[int]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([token_ids])).logits[0]
    return logits


def prefill(model: Model, token_ids: list[int]) -> Tensor:
    cache = PagedCache(model.config, model.dtype, 1024)
    return model.forward(cache, [Span(cache.sequence(), token_ids, len(token_ids))])


def decode(model: Model, token_ids: list[int]) -> Tensor:
    cache = PagedCache(model.config, model.dtype, 1024)
    sequence = cache.sequence()
    return torch.cat([model.forward(cache, [Span(sequence, [token])]) for token in token_ids])


@pytest.mark.parametrize("case", CASES)
def test_prefill_and_decode_agree_with_transformers(
    case: str, backend: Backend, build_model: Callable[..., Any], tmp_path: Path
) -> None:
    family, changes = CASES[case]
    expected_model = build_model(family, 11, **changes)
    expected_model.save_pretrained(tmp_path)
    model, token_ids = load_model(tmp_path, backend=backend), prompt()
    assert model.executor.name == backend
    expected = oracle(expected_model, token_ids)
    assert expected.abs().max() > 1, "the logits are too small for the tolerance to mean anything"
    assert (prefill(model, token_ids) - expected).abs().max() <= TOLERANCE
    assert (decode(model, token_ids) - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_the_states_are_those_that_transformers_puts_into_its_head(
    case: str, backend: Backend, build_model: Callable[..., Any], tmp_path: Path
) -> None:
    family, changes = CASES[case]
    expected_model = build_model(family, 11, **changes)
    expected_model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = expected_model(torch.tensor([prompt()]), output_hidden_states=True).hidden_states[-1][0, -70:]
    model = load_model(tmp_path, backend=backend)
    cache = PagedCache(model.config, model.dtype, 1024)
    states = model.compute(cache, [Span(cache.sequence(), prompt(), 70)]).states
    assert (states - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_disk_is_read(
    dtype: torch.dtype, backend: Backend, build_model: Callable[..., Any], tmp_path: Path
) -> None:
    expected_model = build_model("llama", 12).to(dtype)
    expected_model.save_pretrained(tmp_path)
    # Not the model itself: casting it rounds its rotary frequencies too.
    expected = oracle(type(expected_model).from_pretrained(tmp_path, dtype=torch.float32), prompt())
    difference = prefill(load_model(tmp_path, backend=backend), prompt()) - expected
    assert difference.abs().max() <= TOLERANCE


def test_shards_are_read_and_do_not_change_the_digest(build_model: Callable[..., Any], tmp_path: Path) -> None:
    expected_model = build_model("qwen2", 13, hidden_size=64)
    expected_model.save_pretrained(tmp_path / "whole")
    expected_model.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    whole, shards = load_model(tmp_path / "whole"), load_model(tmp_path / "shards")
    assert whole.digests == shards.digests
    assert torch.equal(prefill(whole, prompt()), prefill(shards, prompt()))


def test_both_ways_of_writing_rotary_parameters_mean_the_same(build_model: Callable[..., Any], tmp_path: Path) -> None:
    build_model("llama", 14, rope_parameters=LLAMA3).save_pretrained(tmp_path)
    new = load_model(tmp_path)
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    parameters = fields.pop("rope_parameters")
    fields["rope_theta"] = parameters.pop("rope_theta")
    fields["rope_scaling"] = parameters
    file.write_text(json.dumps(fields))
    old = load_model(tmp_path)
    assert old.config == new.config
    assert isinstance(old.config.rope.scaling, Llama3Scaling)
    assert old.digests == new.digests


def test_bf16_stays_close_to_fp32(checkpoint: Path, backend: Backend, model: Model) -> None:
    token_ids = prompt()
    rough = prefill(load_model(checkpoint, dtype="bf16", backend=backend), token_ids)
    exact = prefill(model, token_ids)
    assert rough.dtype is torch.float32
    assert torch.cosine_similarity(exact, rough).min() > 0.99


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe"])
def test_fast_numerics_agree_with_transformers_too(
    family: str, build_model: Callable[..., Any], tmp_path: Path
) -> None:
    expected_model = build_model(family, 15)
    expected_model.save_pretrained(tmp_path)
    model, token_ids = load_model(tmp_path, numerics="fast", backend="eager"), prompt(300)
    assert set(eager(model).paths.linear.values()) == {LinearMode.PLAIN}
    assert eager(model).paths.attention is None
    expected = oracle(expected_model, token_ids)
    assert (prefill(model, token_ids) - expected).abs().max() <= TOLERANCE
    cache = PagedCache(model.config, "fp32", 2048)
    first, second, tree = cache.sequence(), cache.sequence(), cache.sequence()
    model.forward(
        cache, [Span(first, token_ids[:250], 0), Span(second, token_ids[:3], 0), Span(tree, token_ids[:99], 0)]
    )
    branches = [token_ids[99], 5, token_ids[100], token_ids[101]]
    logits = model.forward(
        cache,
        [
            Span(first, token_ids[250:], 50),
            Span(second, token_ids[3:4]),
            Span(tree, branches, 4, parents=[-1, -1, 0, 2]),
        ],
    )
    assert (logits[:50] - expected[250:]).abs().max() <= TOLERANCE
    assert (logits[[50, 51, 53, 54]] - expected[[3, 99, 100, 101]]).abs().max() <= TOLERANCE
