"""The decoder in torch's own operations: the readable reference, for any device.

    h = embed(token)
    h += output(attention(qkv(norm(h))));  h += mlp(norm(h))      in each layer
    logits = head(norm(h))

With ``numerics: invariant`` the logits of a token are the same bits whether its sequence runs alone or in a batch, in
whatever pieces its prefix was computed, whether its prefix's KV was imported, and whether it came in a chain or a tree:
every operation treats a row on its own (:mod:`linear`, :mod:`step`, :mod:`countersign.kernels.padded_attention`,
:mod:`countersign.kernels.experts`, :mod:`countersign.kernels.swiglu`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from countersign.kernels import padded_attention
from countersign.kernels.experts import mix, route
from countersign.kernels.native.library import Team
from countersign.kernels.rotary import rotate
from countersign.kernels.swiglu import swiglu
from countersign.services.engine.config import TORCH_DTYPES, Dtype, ModelConfig, Numerics
from countersign.services.engine.kv import PagedCache
from countersign.services.engine.linear import Linear, LinearMode, LinearPacker
from countersign.services.engine.rope import RotaryTable
from countersign.services.engine.step import EXACT, FIXED, Group, Span, Step, plan
from countersign.services.engine.weights import DecoderWeights, DenseMlp, LayerWeights, Mlp


@dataclass(frozen=True, slots=True)
class Paths:
    """Which way each operation is computed here: the mode of each linear shape (out, in), and attention's path, None
    for torch's choice.
    """

    linear: Mapping[tuple[int, int], LinearMode]
    attention: padded_attention.Path | None


@dataclass(frozen=True, slots=True)
class _Dense:
    gate_up: Linear
    down: Linear

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(_gated(self.gate_up(x)))


@dataclass(frozen=True, slots=True)
class _Routed:
    router: Linear
    experts: list[_Dense]
    per_token: int
    normalised: bool

    def __call__(self, x: Tensor) -> Tensor:
        chosen, shares = route(self.router(x), self.per_token, normalised=self.normalised)
        return mix(x, chosen, shares, len(self.experts), lambda expert, rows: self.experts[expert](rows))


@dataclass(frozen=True, slots=True)
class _Layer:
    """qk_norm: (heads + kv_heads, head_dim), the query norm's weight for each head, then the key norm's."""

    attention_norm: Tensor
    qkv: Linear
    qk_norm: Tensor | None
    output: Linear
    mlp_norm: Tensor
    mlp: _Dense | _Routed


class EagerExecutor:
    """A model's weights on ``device``, converted to ``dtype`` and packed."""

    name = "eager"
    team: Team | None = None

    def __init__(
        self, config: ModelConfig, weights: DecoderWeights, dtype: Dtype, numerics: Numerics, device: str = "cpu"
    ) -> None:
        self._config, self._device, self._dtype = config, device, TORCH_DTYPES[dtype]
        self._packer = LinearPacker(numerics)
        self._embedding, self._norm = self._moved(weights.embedding), self._moved(weights.norm)
        self._layers = [self._layer(layer) for layer in weights.layers]
        self._head = self._packed(weights.head)
        self._rotary = RotaryTable(config.rope, config.head_dim)
        self._angles = self._angles_of(0)
        path = None
        if numerics == "invariant":
            path = padded_attention.select_path(config.heads, config.kv_heads, config.head_dim, self._dtype, device)
        self._padding = replace(EXACT, fold=config.heads // config.kv_heads) if path is None else FIXED
        self.paths = Paths(self._packer.modes, path)

    @torch.inference_mode()
    def run(self, cache: PagedCache, spans: Sequence[Span]) -> Tensor:
        """Writes the K and V of the spans' tokens into the slots that are reserved for them.

        Returns:
            (sum of ``span.logits``, vocabulary) fp32 on the executor's device, spans in the order given.
        """
        step = self._plan(cache, spans)
        hidden = deque(self._hidden_states(cache, step), maxlen=1).pop()
        if not step.logits:
            return torch.empty(0, self._config.vocabulary_size, device=self._device)
        return self._logits(hidden.index_select(0, step.logit_rows))[: step.logits]

    def close(self) -> None:
        """Nothing to end: the weights go with this object."""

    @torch.inference_mode()
    def diagnose(self, cache: PagedCache, span: Span) -> int:
        """The first layer whose output for one of these tokens is not finite, as many as there are layers if only the
        logits are not. Computes the tokens again, as :meth:`run` does.
        """
        step = self._plan(cache, [span])
        for index, hidden in enumerate(self._hidden_states(cache, step)):
            if not bool(torch.isfinite(hidden[: step.rows]).all()):
                return index
        return self._config.layers

    def _plan(self, cache: PagedCache, spans: Sequence[Span]) -> Step:
        return plan(cache, spans, self._config.sliding_window, self._padding, self._device)

    def _hidden_states(self, cache: PagedCache, step: Step) -> Iterator[Tensor]:
        """(M', hidden) after each layer."""
        hidden = self._embedding.index_select(0, step.token_ids)
        cos, sin = self._angles_up_to(step.end)
        angles = cos.index_select(0, step.positions), sin.index_select(0, step.positions)
        for index, layer in enumerate(self._layers):
            hidden = hidden + layer.output(self._attend(layer, hidden, step, angles, cache, index))
            hidden = hidden + self._mix(layer, hidden, step.rows)
            yield hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        return self._head(self._normalised(hidden, self._norm)).float()

    def _angles_up_to(self, end: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions below ``end`` at least; the same tensors as long as they suffice."""
        if end > len(self._angles[0]):
            self._angles = self._angles_of(end)
        return self._angles

    def _angles_of(self, end: int) -> tuple[Tensor, Tensor]:
        known = len(self._rotary.table(end)[0])
        cos, sin = self._rotary.rows(torch.arange(known), known, self._dtype)
        return cos.to(self._device), sin.to(self._device)

    def _attend(
        self, layer: _Layer, hidden: Tensor, step: Step, angles: tuple[Tensor, Tensor], cache: PagedCache, index: int
    ) -> Tensor:
        """(M', hidden) to (M', heads head_dim)."""
        heads, kv_heads, size = self._config.heads, self._config.kv_heads, self._config.head_dim
        keys, values = cache.keys(index), cache.values(index)
        qkv = layer.qkv(self._normalised(hidden, layer.attention_norm))[: step.rows].view(step.rows, -1, size)
        qk = qkv[:, : heads + kv_heads]
        if layer.qk_norm is not None:
            qk = F.rms_norm(qk, (size,), None, self._config.rms_eps) * layer.qk_norm
        qk = rotate(qk, *angles)
        keys[step.pages, :, :, step.offsets] = qk[:, heads:]
        values[step.pages, :, step.offsets] = qkv[:, heads + kv_heads :]
        results = [self._attend_group(qk[:, :heads], group, keys, values) for group in step.groups]
        result = results[0] if len(results) == 1 else torch.cat(results)
        return result if step.take is None else result.index_select(0, step.take)

    def _attend_group(self, q: Tensor, group: Group, keys: Tensor, values: Tensor) -> Tensor:
        """(M, heads, head_dim) to (B T, heads head_dim)."""
        q = q if group.rows is None else q.index_select(0, group.rows)
        fold = 1 if group.mask is None else self._padding.fold
        q = q.reshape(group.batch, -1, self._config.heads // fold, fold, self._config.head_dim)
        queries, q = q.shape[1], q.transpose(1, 2).flatten(2, 3)
        k = keys.index_select(0, group.pages).view(group.batch, -1, *keys.shape[1:]).permute(0, 2, 1, 4, 3)
        v = values.index_select(0, group.pages).view(group.batch, -1, *values.shape[1:]).transpose(1, 2)
        k, v = k.flatten(2, 3), v.flatten(2, 3)
        if group.tail is not None:
            k[group.tail.pieces, :, group.tail.places] = keys[group.tail.pages, :, :, group.tail.offsets]
            v[group.tail.pieces, :, group.tail.places] = values[group.tail.pages, :, group.tail.offsets]
        scale = self._config.head_dim**-0.5
        if group.mask is None:
            bias = causal_lower_right(queries, group.keys)
            k, v = k[:, :, : group.keys], v[:, :, : group.keys]
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, enable_gqa=True)
        elif self.paths.attention is None:
            out = padded_attention.attend_fast(q, k, v, group.mask, scale=scale)
        else:
            out, _ = padded_attention.attend(q, k, v, group.mask, scale=scale, path=self.paths.attention)
        out = out.view(group.batch, -1, queries, fold, self._config.head_dim)
        return out.transpose(1, 2).flatten(2).flatten(0, 1)

    def _mix(self, layer: _Layer, hidden: Tensor, rows: int) -> Tensor:
        x = self._normalised(hidden, layer.mlp_norm)
        if isinstance(layer.mlp, _Dense):
            return layer.mlp(x)
        # Rows of padding would have experts run for nothing.
        return F.pad(layer.mlp(x[:rows]), (0, 0, 0, len(x) - rows))

    def _normalised(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self._config.rms_eps)

    def _layer(self, weights: LayerWeights) -> _Layer:
        qk_norm = None
        if weights.q_norm is not None and weights.k_norm is not None:
            parts = (weights.q_norm.expand(self._config.heads, -1), weights.k_norm.expand(self._config.kv_heads, -1))
            qk_norm = self._moved(torch.cat(parts))
        return _Layer(
            attention_norm=self._moved(weights.attention_norm),
            qkv=self._packed(weights.qkv, weights.qkv_bias),
            qk_norm=qk_norm,
            output=self._packed(weights.output),
            mlp_norm=self._moved(weights.mlp_norm),
            mlp=self._mlp(weights.mlp),
        )

    def _mlp(self, weights: Mlp) -> _Dense | _Routed:
        if isinstance(weights, DenseMlp):
            return _Dense(self._packed(weights.gate_up), self._packed(weights.down))
        pairs = zip(weights.gate_up, weights.down, strict=True)
        experts = [_Dense(self._packed(gate_up), self._packed(down)) for gate_up, down in pairs]
        return _Routed(self._packed(weights.router), experts, weights.per_token, weights.normalised)

    def _packed(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        return self._packer.pack(self._moved(weight), None if bias is None else self._moved(bias))

    def _moved(self, weight: Tensor) -> Tensor:
        return weight.to(self._device, self._dtype)


def _gated(gate_up: Tensor) -> Tensor:
    # On an accelerator an element's bits do not depend on where it stands, and fewer passes over memory are faster.
    if gate_up.device.type == "cpu":
        return swiglu(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
