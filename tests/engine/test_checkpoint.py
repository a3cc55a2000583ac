"""Checkpoints that are not whole are refused with what is wrong; digests tell models apart."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from countersign.services.engine.checkpoint import read_tensors, weights_digest
from countersign.services.engine.config import ModelConfig
from countersign.services.engine.errors import CheckpointError
from countersign.services.engine.model import Model, load_model
from countersign.services.engine.weights import RoutedExperts, decoder_weights

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    shutil.copytree(checkpoint, copy)
    return copy


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as refused:
        load_model(folder)
    return str(refused.value)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop(DOWN))
    assert f"1 tensors are missing: {DOWN}" in refusal(folder)


def test_an_unexpected_tensor_is_named(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}))
    assert "model.layers.0.self_attn.q_proj.bias is unexpected" in refusal(folder)


def test_a_wrong_shape_is_named_with_both_shapes(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({DOWN: torch.zeros(48, 80)}))
    message = refusal(folder)
    assert DOWN in message
    assert "(48, 80)" in message
    assert "(48, 112)" in message


def test_a_quantised_tensor_is_refused(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({DOWN: torch.zeros(48, 112, dtype=torch.int8)}))
    assert "torch.int8; supported: F32, BF16, F16" in refusal(folder)


@pytest.mark.parametrize(
    ("family", "down"),
    [
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w2.weight"),
        ("qwen3_moe", "model.layers.1.mlp.experts.5.down_proj.weight"),
    ],
)
def test_a_missing_expert_is_named(family: str, down: str, build_model: Callable[..., Any], tmp_path: Path) -> None:
    build_model(family, 5).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop(down))
    assert f"1 tensors are missing: {down}" in refusal(tmp_path)


def test_weights_keep_the_type_that_they_have_on_disk(build_model: Callable[..., Any], tmp_path: Path) -> None:
    build_model("mixtral", 5).to(torch.bfloat16).save_pretrained(tmp_path)
    tensors, config = read_tensors(tmp_path), ModelConfig.from_folder(tmp_path)
    weights = decoder_weights(config, tensors)
    mlp = weights.layers[1].mlp
    assert isinstance(mlp, RoutedExperts)
    assert (mlp.router.shape, mlp.gate_up.shape, mlp.down.shape) == ((4, 48), (4, 224, 48), (4, 48, 112))
    assert mlp.gate_up.dtype is weights.layers[0].qkv.dtype is torch.bfloat16
    expert = "model.layers.1.block_sparse_moe.experts.2"
    assert torch.equal(mlp.gate_up[2, :112], tensors[f"{expert}.w1.weight"])
    assert torch.equal(mlp.gate_up[2, 112:], tensors[f"{expert}.w3.weight"])
    assert torch.equal(mlp.down[2], tensors[f"{expert}.w2.weight"])
    assert weights.layers[0].qkv.shape == ((4 + 2 * 2) * 16, 48)


@pytest.mark.parametrize("keep", [0, 4, 100, 20_000])
def test_a_truncated_file_is_refused(keep: int, folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "model.safetensors is no whole safetensors file" in refusal(folder)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "has neither model.safetensors nor model.safetensors.index.json" in refusal(folder)


def shard(folder: Path, weight_map: dict[str, str] | None = None) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file({DOWN: tensors.pop(DOWN)}, folder / "b.safetensors")
    save_file(tensors, folder / "a.safetensors")
    complete = dict.fromkeys(tensors, "a.safetensors") | {DOWN: "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map or complete}))


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard(folder)
    (folder / "b.safetensors").unlink()
    assert "has no b.safetensors" in refusal(folder)


def test_an_index_that_does_not_match_its_shards_is_refused(folder: Path) -> None:
    shard(folder, {DOWN: "b.safetensors", "model.norm.weight": "b.safetensors"})
    assert "do not hold the same tensors: model.norm.weight" in refusal(folder)


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_an_index_without_a_weight_map_is_refused(text: str, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    assert "weight_map" in refusal(folder)


def test_a_tied_model_may_store_its_head_only_if_it_is_the_embedding(
    build_model: Callable[..., Any], tmp_path: Path
) -> None:
    build_model("llama", 3, tie_word_embeddings=True).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    load_model(tmp_path)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    assert "lm_head.weight is unexpected" in refusal(tmp_path)


def test_rotary_frequencies_of_old_checkpoints_are_ignored(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    load_model(folder)


def test_the_weights_digest_is_over_names_types_shapes_and_bytes() -> None:
    tensors = {"b": torch.tensor([[1.0, 2.0]]), "a": torch.tensor([3.0], dtype=torch.bfloat16)}
    expected = hashlib.sha256(
        b'["a","BF16",[1]]\n' + bytes.fromhex("4040") + b'["b","F32",[1,2]]\n' + bytes.fromhex("0000803f00000040")
    )
    assert weights_digest(tensors) == expected.digest()


def test_one_changed_weight_changes_the_weights_digest_only(folder: Path, model: Model) -> None:
    rewrite(folder, lambda tensors: tensors[DOWN].view(-1)[7].add_(1e-3))
    changed = load_model(folder).digests
    assert changed.weights != model.digests.weights
    assert (changed.config, changed.tokenizer) == (model.digests.config, model.digests.tokenizer)


def test_the_tokenizer_digest_is_that_of_the_file_or_of_nothing(folder: Path, model: Model) -> None:
    assert model.digests.tokenizer == hashlib.sha256(b"").digest()
    (folder / "tokenizer.json").write_bytes(b"{}")
    assert load_model(folder).digests.tokenizer == hashlib.sha256(b"{}").digest()
