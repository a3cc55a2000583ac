"""Small true receipts and a small true model, for tests of whatever makes, carries or checks receipts.

Everything is deterministic. The model is a random two-layer Llama of some 30,000 weights over a byte tokenizer, written
as a Hugging Face folder; its answers are as bad as they are auditable.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from countersign.verify.payload import Evidence, FinishReason, HiddenMarkers, Model, Receipt, Request, Usage
from countersign.verify.receipt import Openings, build_output, prompt_digest, stop_digest
from countersign.verify.segments import segments_of

if TYPE_CHECKING:
    import torch

    from countersign.verify.difr import Reference

SALT_KEY = bytes(range(32))
VOCABULARY = 257
END_TOKEN = 256
_HIDDEN, _INTERMEDIATE, _LAYERS, _HEADS, _KV_HEADS = 32, 48, 2, 4, 2


@dataclass(frozen=True, slots=True)
class Asked:
    """How the answer was sampled."""

    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 0.95
    seed: int = 42


def signing_key(number: int = 1) -> Ed25519PrivateKey:
    """A key that is the same for the same number."""
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"test key %d" % number).digest())


def example_model() -> Model:
    """A model that is nowhere."""
    names = ("weights", "tokenizer", "config")
    weights, tokenizer, config = (hashlib.sha256(name.encode()).digest() for name in names)
    return Model("example", weights, tokenizer, config, dtype="fp32", numerics="invariant", build="countersign test")


def model_of(reference: Reference) -> Model:
    """The model part of a receipt for answers of ``reference``."""
    digests = reference.model.digests
    return Model("tiny", digests.weights, digests.tokenizer, digests.config, "fp32", "invariant", "countersign test")


def example_receipt(
    prompt: Sequence[int] = (1, 2, 3),
    output: Sequence[int] = (4, 5, 6, 7),
    *,
    model: Model | None = None,
    asked: Asked | None = None,
    max_tokens: int | None = None,
    finish_reason: FinishReason = "length",
    stop: Sequence[str] = (),
    stop_token_ids: Sequence[int] = (),
    ignore_eos: bool = False,
    request_id: str = "example-1",
    hidden: HiddenMarkers | None = None,
) -> tuple[Receipt, Openings]:
    """A receipt that adds up, and its openings."""
    asked = asked or Asked()
    drawn = asked.temperature > 0
    request = Request(
        prompt=prompt_digest(prompt, SALT_KEY),
        prompt_tokens=len(prompt),
        temperature=asked.temperature,
        top_k=asked.top_k,
        top_p=asked.top_p,
        seed=asked.seed if drawn else None,
        seed_source="client" if drawn else "none",
        max_tokens=max(1, len(output)) if max_tokens is None else max_tokens,
        stop_token_ids=tuple(stop_token_ids),
        ignore_eos=ignore_eos,
        stop=stop_digest(stop, SALT_KEY),
        coupling="gumbel",
        opened_unix_ms=1_750_000_000_000,
        hidden=hidden,
    )
    accepted = len(output) // 2
    receipt = Receipt(
        request_id=request_id,
        model=model or example_model(),
        request=request,
        output=build_output(
            request_id, output, SALT_KEY, finish_reason=finish_reason, segments=segments_of(prompt, output, hidden)
        ),
        evidence=Evidence(
            commit=hashlib.sha256(b"last record").digest(),
            records=2 + len(output) - accepted,
            drafting="model",
            drafted=2 * accepted,
            accepted=accepted,
            passes=len(output) - accepted,
            cached_prompt_tokens=0,
            kv_policy="exact",
        ),
        usage=Usage(1_750_000_000_010, 1_750_000_000_250, "unavailable"),
    )
    return receipt, Openings(SALT_KEY, tuple(prompt), tuple(output), tuple(stop))


def write_tiny_model(folder: Path, seed: int = 0) -> Path:
    """Writes the model into ``folder`` and returns it. Another seed is another model of the same shape."""
    import torch
    from safetensors.torch import save_file

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": _HIDDEN,
        "intermediate_size": _INTERMEDIATE,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "head_dim": _HIDDEN // _HEADS,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": END_TOKEN,
        "torch_dtype": "float32",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(_byte_tokenizer()))
    save_file(_weights(torch.Generator().manual_seed(seed)), folder / "model.safetensors")
    return folder


def generate(reference: Reference, prompt: Sequence[int], asked: Asked, tokens: int) -> list[int]:
    """An honest answer, one token a pass, that ends with the end token or after ``tokens``."""
    from countersign.services.engine.kv import PagedCache
    from countersign.services.engine.model import Span
    from countersign.services.engine.sampling import Sampling, sample

    sampling = Sampling(asked.temperature, asked.top_k, asked.top_p, asked.seed)
    model = reference.model
    cache = PagedCache(model.config, model.dtype, tokens=len(prompt) + tokens)
    sequence, output, fresh = cache.sequence(), list[int](), list(prompt)
    while len(output) < tokens and END_TOKEN not in fresh:
        row = model.forward(cache, [Span(sequence, fresh, 1)])[0]
        fresh = [sample(row, len(prompt) + len(output), sampling)]
        output += fresh
    return output


def _weights(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random weights, large enough that the logits differ by several units."""
    import torch

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator).mul_(2 / columns**0.5)

    head = _HIDDEN // _HEADS
    weights = {"model.embed_tokens.weight": matrix(VOCABULARY, _HIDDEN), "lm_head.weight": matrix(VOCABULARY, _HIDDEN)}
    weights["model.norm.weight"] = torch.ones(_HIDDEN)
    for layer in range(_LAYERS):
        name = f"model.layers.{layer}."
        weights |= {
            name + "self_attn.q_proj.weight": matrix(_HIDDEN, _HIDDEN),
            name + "self_attn.k_proj.weight": matrix(_KV_HEADS * head, _HIDDEN),
            name + "self_attn.v_proj.weight": matrix(_KV_HEADS * head, _HIDDEN),
            name + "self_attn.o_proj.weight": matrix(_HIDDEN, _HIDDEN),
            name + "mlp.gate_proj.weight": matrix(_INTERMEDIATE, _HIDDEN),
            name + "mlp.up_proj.weight": matrix(_INTERMEDIATE, _HIDDEN),
            name + "mlp.down_proj.weight": matrix(_HIDDEN, _INTERMEDIATE),
            name + "input_layernorm.weight": torch.ones(_HIDDEN),
            name + "post_attention_layernorm.weight": torch.ones(_HIDDEN),
        }
    return weights


def _byte_tokenizer() -> dict[str, object]:
    """A byte-level BPE without merges: token id = rank of the byte in GPT-2's alphabet, and one end token."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = [chr(byte) for byte in printable] + [chr(0x100 + i) for i in range(256 - len(printable))]
    end = {
        "id": END_TOKEN,
        "content": "<|end|>",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(alphabet)},
            "merges": [],
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
        },
    }
