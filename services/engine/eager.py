"""The decoder as one layer after another, for any device: :mod:`ops` says what computes it.

    h = embed(token)
    h += output(attention(qkv(norm(h))));  h += mlp(norm(h))      in each layer
    logits = head(norm(h))

With ``numerics: invariant`` the logits of a token are the same bits whether its sequence runs alone or in a batch, in
whatever pieces its prefix was computed, whether its prefix's KV was imported, and whether it came in a chain or a tree:
every operation treats a row on its own (:mod:`linear`, :mod:`step`, :mod:`ops`, :mod:`countersign.kernels.experts`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from countersign.kernels.experts import mix, route
from countersign.kernels.native.library import Team
from countersign.services.engine.config import TORCH_DTYPES, Dtype, ModelConfig, Numerics
from countersign.services.engine.kv import PagedCache
from countersign.services.engine.linear import Linear
from countersign.services.engine.ops import Choice, make_ops
from countersign.services.engine.rope import RotaryTable
from countersign.services.engine.step import AfterLayer, Computed, Span, Step
from countersign.services.engine.weights import DecoderWeights, DenseMlp, LayerWeights, Mlp


@dataclass(frozen=True, slots=True)
class _Dense:
    gate_up: Linear
    gate: Callable[[Tensor], Tensor]
    down: Linear

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self.gate(self.gate_up(x)))


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
    """A model's weights on ``device``, converted to ``dtype`` and packed. ``ops``: what computes; None for the fastest
    that ``device`` has, see :func:`countersign.services.engine.ops.make_ops`.
    """

    team: Team | None = None
    layered = True

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        dtype: Dtype,
        numerics: Numerics,
        device: str = "cpu",
        ops: Choice | None = None,
    ) -> None:
        self._config, self._device, self._dtype = config, device, TORCH_DTYPES[dtype]
        self._ops = make_ops(ops, config, dtype, numerics, device)
        self.name, self.paths = self._ops.name, self._ops.paths
        self._embedding, self._norm = self._moved(weights.embedding), self._moved(weights.norm)
        self._layers = [self._layer(layer) for layer in weights.layers]
        self._head = self._packed(weights.head)
        self._rotary = RotaryTable(config.rope, config.head_dim)
        self._angles = self._ops.angles(self._rotary, 0)

    @torch.inference_mode()
    def run(self, cache: PagedCache, spans: Sequence[Span], after_layer: AfterLayer | None = None) -> Computed:
        """Writes the K and V of the spans' tokens into the slots that are reserved for them; the result is on the
        executor's device.
        """
        with self._current():
            step = self._ops.plan(cache, spans)
            states = _told(self._hidden_states(cache, step), after_layer)
            hidden = deque(states, maxlen=1).pop()
            if not step.logits:
                logits = torch.empty(0, self._config.vocabulary_size, device=self._device)
                return Computed(logits, hidden[:0])
            computed = self._computed(hidden.index_select(0, step.logit_rows))
            return Computed(computed.logits[: step.logits], computed.states[: step.logits])

    @torch.inference_mode()
    def run_layers(self, cache: PagedCache, spans: Sequence[Span], layers: int) -> None:
        """Writes the K and V of the spans' tokens in the first ``layers`` layers, as :meth:`run` does."""
        with self._current():
            deque(islice(self._hidden_states(cache, self._ops.plan(cache, spans)), layers), maxlen=0)

    def close(self) -> None:
        """Nothing to end: the weights go with this object."""

    @torch.inference_mode()
    def diagnose(self, cache: PagedCache, span: Span) -> int:
        """The first layer whose output for one of these tokens is not finite, as many as there are layers if only the
        logits are not. Computes the tokens again, as :meth:`run` does.
        """
        with self._current():
            step = self._ops.plan(cache, [span])
            for index, hidden in enumerate(self._hidden_states(cache, step)):
                if not bool(torch.isfinite(hidden[: step.rows]).all()):
                    return index
        return self._config.layers

    def _current(self) -> AbstractContextManager[object]:
        """Triton launches on the current device, wherever the tensors are."""
        return torch.cuda.device(self._device) if self._device.startswith("cuda") else nullcontext()

    def _hidden_states(self, cache: PagedCache, step: Step) -> Iterator[Tensor]:
        """(M', hidden) after each layer."""
        hidden = self._embedding.index_select(0, step.token_ids)
        cos, sin = self._angles_up_to(step.end)
        angles = cos.index_select(0, step.positions), sin.index_select(0, step.positions)
        for index, layer in enumerate(self._layers):
            hidden = hidden + layer.output(self._attend(layer, hidden, step, angles, cache, index))
            hidden = hidden + self._mix(layer, hidden, step.rows)
            yield hidden

    def _computed(self, hidden: Tensor) -> Computed:
        states = self._ops.normalise(hidden, self._norm)
        return Computed(self._head(states).float(), states)

    def _angles_up_to(self, end: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions below ``end`` at least; the same tensors as long as they suffice."""
        if end > len(self._angles[0]):
            self._angles = self._ops.angles(self._rotary, end)
        return self._angles

    def _attend(
        self, layer: _Layer, hidden: Tensor, step: Step, angles: tuple[Tensor, Tensor], cache: PagedCache, index: int
    ) -> Tensor:
        """(M', hidden) to (M', heads head_dim)."""
        heads, kv_heads, size = self._config.heads, self._config.kv_heads, self._config.head_dim
        keys, values = cache.keys(index), cache.values(index)
        qkv = layer.qkv(self._ops.normalise(hidden, layer.attention_norm))[: step.rows].view(step.rows, -1, size)
        qk = self._ops.rotate(qkv[:, : heads + kv_heads], layer.qk_norm, angles)
        keys[step.pages, :, :, step.offsets] = qk[:, heads:]
        values[step.pages, :, step.offsets] = qkv[:, heads + kv_heads :]
        return self._ops.attend(qk[:, :heads], keys, values, step)

    def _mix(self, layer: _Layer, hidden: Tensor, rows: int) -> Tensor:
        x = self._ops.normalise(hidden, layer.mlp_norm)
        if isinstance(layer.mlp, _Dense):
            return layer.mlp(x)
        # Rows of padding would have experts run for nothing.
        return F.pad(layer.mlp(x[:rows]), (0, 0, 0, len(x) - rows))

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
            return self._dense(weights.gate_up, weights.down)
        experts = [self._dense(*pair) for pair in zip(weights.gate_up, weights.down, strict=True)]
        return _Routed(self._packed(weights.router), experts, weights.per_token, weights.normalised)

    def _dense(self, gate_up: Tensor, down: Tensor) -> _Dense:
        return _Dense(self._packed(gate_up), self._ops.gate, self._packed(down))

    def _packed(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        return self._ops.pack(self._moved(weight), None if bias is None else self._moved(bias))

    def _moved(self, weight: Tensor) -> Tensor:
        return weight.to(self._device, self._dtype)


def _told(states: Iterator[Tensor], after_layer: AfterLayer | None) -> Iterator[Tensor]:
    """The hidden states after each layer, with a word after each."""
    for layer, hidden in enumerate(states):
        if after_layer is not None:
            after_layer(layer)
        yield hidden
