"""Random small checkpoints of every family, written by transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from countersign.services.engine.model import Backend, Model, load_model

CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
}
EXPERTS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 48},
}
SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def build(family: str, seed: int, **changes: Any) -> Any:
    """A transformers model with every parameter random, norms and biases too."""
    config_class, model_class = CLASSES[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**SIZES, **EXPERTS.get(family, {}), **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """These models are too small to share out; on a busy machine the threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def build_model() -> Callable[..., Any]:
    return build


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with grouped queries and a separate head. Read only."""
    folder = tmp_path_factory.mktemp("llama")
    build("llama", 1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def other_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second random model over the same vocabulary: Mistral, with a window smaller than the tests' sequences."""
    folder = tmp_path_factory.mktemp("mistral")
    build("mistral", 2, sliding_window=40).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def routed_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A third over the same vocabulary: Qwen3-MoE, its first layer dense."""
    folder = tmp_path_factory.mktemp("qwen3_moe")
    build("qwen3_moe", 3, norm_topk_prob=True, mlp_only_layers=[0], num_hidden_layers=3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=["native", "eager"])
def backend(request: pytest.FixtureRequest) -> Backend:
    """What computes; whoever asks for it, or for a model below, runs once with each."""
    chosen: Backend = request.param
    return chosen


@pytest.fixture(scope="session")
def model(checkpoint: Path, backend: Backend) -> Model:
    return load_model(checkpoint, backend=backend)


@pytest.fixture(scope="session")
def other_model(other_checkpoint: Path, backend: Backend) -> Model:
    return load_model(other_checkpoint, backend=backend)


@pytest.fixture(scope="session")
def routed_model(routed_checkpoint: Path, backend: Backend) -> Model:
    return load_model(routed_checkpoint, backend=backend)
