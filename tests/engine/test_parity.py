"""The engine against transformers on random small models: logits within 2e-4 in fp32."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from countersign.services.engine.kv import PagedCache
from countersign.services.engine.model import Model, Span, load_model

TOLERANCE = 2e-4
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-without-grouping": ("llama", {"num_key_value_heads": 4}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1, "head_dim": 8}),
    "llama3-scaling": ("llama", {"rope_parameters": LLAMA3}),
    "qwen2": ("qwen2", {"hidden_size": 64}),
    "qwen2-tied": ("qwen2", {"hidden_size": 64, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True, "head_dim": 32}),
    "mistral-window": ("mistral", {"sliding_window": 7}),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
}


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
def test_prefill_and_decode_agree_with_transformers(case: str, build_model: Callable[..., Any], tmp_path: Path) -> None:
    family, changes = CASES[case]
    expected_model = build_model(family, 11, **changes)
    expected_model.save_pretrained(tmp_path)
    model, token_ids = load_model(tmp_path), prompt()
    expected = oracle(expected_model, token_ids)
    assert expected.abs().max() > 1, "the logits are too small for the tolerance to mean anything"
    assert (prefill(model, token_ids) - expected).abs().max() <= TOLERANCE
    assert (decode(model, token_ids) - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_disk_is_read(dtype: torch.dtype, build_model: Callable[..., Any], tmp_path: Path) -> None:
    expected_model = build_model("llama", 12).to(dtype)
    expected_model.save_pretrained(tmp_path)
    # Not the model itself: casting it rounds its rotary frequencies too.
    expected = oracle(type(expected_model).from_pretrained(tmp_path, dtype=torch.float32), prompt())
    difference = prefill(load_model(tmp_path), prompt()) - expected
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
    assert old.config.rope.type == "llama3"
    assert old.digests == new.digests


def test_bf16_stays_close_to_fp32(checkpoint: Path, model: Model) -> None:
    token_ids = prompt()
    exact, rough = prefill(model, token_ids), prefill(load_model(checkpoint, dtype="bf16"), token_ids)
    assert rough.dtype is torch.float32
    assert torch.cosine_similarity(exact, rough).min() > 0.99
