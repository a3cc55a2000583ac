"""A decoder of the Llama family over a paged KV cache, for the new tokens of several sequences at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

from torch import Tensor

from countersign.kernels.native.library import Team
from countersign.services.engine.checkpoint import Digests, check_tensors, digests, read_tensors
from countersign.services.engine.config import Dtype, ModelConfig, Numerics
from countersign.services.engine.eager import EagerExecutor
from countersign.services.engine.errors import EngineError
from countersign.services.engine.graphs import GraphedExecutor
from countersign.services.engine.kv import PagedCache
from countersign.services.engine.native import NativeExecutor, refusal_of
from countersign.services.engine.step import AfterLayer, Computed, Span, check_spans
from countersign.services.engine.weights import DecoderWeights, decoder_weights

__all__ = ["Backend", "Computed", "Digests", "Executor", "Model", "Span", "executor_of", "load_model"]

Backend = Literal["auto", "native", "eager"]


class Executor(Protocol):
    """Runs a model's weights on spans that were checked and whose slots are reserved; changes no sequence's length.

    ``name`` stands for the way it rounds: executors of one name give the same bits. ``team``: threads of native code,
    if that is at hand. ``layered``: it tells ``after_layer``; else it takes None only.
    """

    name: str
    layered: bool

    @property
    def team(self) -> Team | None: ...

    def run(self, cache: PagedCache, spans: Sequence[Span], after_layer: AfterLayer | None = None) -> Computed:
        """Logits and states of the rows that are wanted; writes the tokens' K and V."""

    def diagnose(self, cache: PagedCache, span: Span) -> int:
        """The first layer with an output that is not finite, as many as there are layers if only the logits are not."""

    def close(self) -> None:
        """End what it has started."""


class Model:
    """A checkpoint ready to run. Made by :func:`load_model`. ``team``: the threads of native code, if it computes."""

    def __init__(self, config: ModelConfig, named: Digests, dtype: Dtype, executor: Executor) -> None:
        self.config, self.digests, self.dtype, self.executor = config, named, dtype, executor
        self.team = executor.team

    def forward(self, cache: PagedCache, spans: Sequence[Span], after_layer: AfterLayer | None = None) -> Tensor:
        """The logits of :meth:`compute`: (sum of ``span.logits``, vocabulary) fp32, spans in the order given."""
        return self.compute(cache, spans, after_layer).logits

    def compute(self, cache: PagedCache, spans: Sequence[Span], after_layer: AfterLayer | None = None) -> Computed:
        """Computes the spans' tokens, writes their K and V, and advances the sequences.

        Raises:
            InvalidSpan, ContextExceeded: see :func:`check_spans`; nothing changed.
            OutOfPages: the cache is full; nothing changed.
        """
        check_spans(self.config, cache, spans)
        cache.reserve({span.sequence: span.sequence.length + len(span.token_ids) for span in spans})
        computed = self.executor.run(cache, spans, after_layer)
        for span in spans:
            span.sequence.length += len(span.token_ids)
        return computed

    def first_bad_layer(self, cache: PagedCache, span: Span) -> int:
        """The layer at which a span whose logits are not finite went wrong: the first whose output for any of the
        span's tokens is not finite, ``config.layers`` if only the logits are not.

        The span must be the last that ``forward`` added to its sequence, and still be there whole. It is computed
        again, so that a forward pass pays nothing for this as long as all is well.
        """
        sequence, end = span.sequence, span.sequence.length
        sequence.length = end - len(span.token_ids)
        try:
            return self.executor.diagnose(cache, span)
        finally:
            sequence.length = end


def load_model(
    folder: Path,
    *,
    dtype: Dtype = "fp32",
    numerics: Numerics = "invariant",
    device: str = "cpu",
    backend: Backend = "auto",
    threads: int = 1,
) -> Model:
    """Reads a Hugging Face folder of the Llama family.

    Args:
        folder: config.json and safetensors.
        dtype: of weights and cache; int8 of weights only, the cache is bf16 then.
        numerics: ``invariant`` keeps a token's bits whatever it is computed with; ``fast`` need not.
        device: torch's name of where to compute; the cache must be there too.
        backend: what computes; ``auto`` takes native code where it can, else torch.
        threads: of native code. torch has its own setting.

    Raises:
        CheckpointError: the folder is not understood or not whole; the message says what is missing.
        EngineError: native code is asked for, or int8, and cannot compute this model here; the message says why.
    """
    config = ModelConfig.from_folder(folder)
    tensors = read_tensors(folder)
    check_tensors(config, tensors, folder)
    weights = decoder_weights(config, tensors)
    try:
        executor = executor_of(config, weights, dtype, numerics, device, backend, threads)
    except EngineError as error:
        raise EngineError(f"{folder} {error}") from None
    return Model(config, digests(folder, config, tensors), dtype, executor)


def executor_of(
    config: ModelConfig,
    weights: DecoderWeights,
    dtype: Dtype,
    numerics: Numerics,
    device: str,
    backend: Backend,
    threads: int,
) -> Executor:
    """What computes these weights; see :func:`load_model`.

    Raises:
        EngineError: as there.
    """
    refusal = "it runs on the CPU only" if device != "cpu" else refusal_of(config)
    if backend != "eager" and not refusal:
        return NativeExecutor(config, weights, dtype, threads)
    if backend == "native" or dtype == "int8":
        raise EngineError(f"needs native code, which cannot compute it here: {refusal or 'torch was asked for'}")
    made = GraphedExecutor if device.startswith("cuda") else EagerExecutor
    return made(config, weights, dtype, numerics, device)
