"""Dishonest providers, made on purpose (``target.fault``): tests and benchmarks see whether audits find them.

A target with a fault answers, commits and signs as any other; its receipts claim the declared weights and parameters.
That is the point. It shares no KV with honest targets, so that nobody else is led to cheat.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import Tensor

from countersign.services.engine.checkpoint import check_tensors, read_tensors
from countersign.services.engine.config import Dtype, ModelConfig, Numerics
from countersign.services.engine.kv import PagedCache
from countersign.services.engine.model import Model, executor_of, load_model
from countersign.services.engine.pages import PAGE_TOKENS
from countersign.services.engine.runner import Fingerprints, Outcome, Runner, Work
from countersign.services.engine.sampling import Draws, Sampling, perturbed
from countersign.services.engine.step import AfterLayer
from countersign.services.engine.weights import DecoderWeights, DenseMlp, LayerWeights, RoutedExperts, decoder_weights
from countersign.services.target.padding import Padding
from countersign.v1.commit_pb2 import Opened
from countersign.verify.logged import markers_of
from countersign.verify.segments import Segmenter

Rounding: TypeAlias = Callable[[Tensor], Tensor]

INT4_GROUP = 64
"""Weights that share a scale, as in the 4-bit formats in use."""

BUG_CHOICES = 20
"""The sampler bug draws evenly from so many of the likeliest tokens (DiFR's own fault)."""

DRAFT, NUDGED = "draft", "nudged"


@dataclass(frozen=True, slots=True)
class Fault:
    """What is done otherwise than the receipt says.

    Attributes:
        about: In a line, for logs.
        rounding: Applied to each matrix of the layers.
        skip: A layer that is left out.
        checkpoint: "draft": the draft's weights; "nudged": the declared ones, each moved by a hundredth of its matrix's
            spread, as a short fine-tuning does.
        window: Older KV than of so many tokens is evicted.
        fp8_kv: KV is rounded to e4m3.
        prompt: So many last tokens of the prompt are shown to the model.
        temperature, top_p: Factors on what was asked for.
        seed: Added to what was asked for.
        bug: Share of tokens that a broken sampler draws.
        unverified: Share of the draft's proposals that are taken without a look.
        repaired: Proposals are taken whose score is not above this.
        inflation: Share of hidden tokens that are added to them, see ``padding``.
    """

    about: str
    rounding: Rounding | None = None
    skip: int | None = None
    checkpoint: str = ""
    window: int | None = None
    fp8_kv: bool = False
    prompt: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    bug: float = 0.0
    unverified: float = 0.0
    repaired: float | None = None
    inflation: float = 0.0

    @property
    def drafts(self) -> bool:
        """Whether it shows only where proposals come in."""
        return self.unverified > 0 or self.repaired is not None

    def sampling(self, asked: Sampling) -> Sampling:
        """How it draws instead."""
        return Sampling(
            asked.temperature * self.temperature,
            asked.top_k,
            asked.top_p * self.top_p,
            (asked.seed + self.seed) % 2**64,
        )

    def unseen(self, prompt_tokens: int) -> int:
        """How many first tokens of a prompt the model is not shown."""
        return 0 if self.prompt is None else max(0, prompt_tokens - self.prompt)


def int8(weight: Tensor) -> Tensor:
    """Rounded to 8 bits, one scale an output."""
    return _rounded(weight.float(), 127)


def int4(weight: Tensor) -> Tensor:
    """Rounded to 4 bits, one scale for each ``INT4_GROUP`` inputs of an output."""
    groups = weight.float().reshape(-1, INT4_GROUP)
    return _rounded(groups, 7).view(weight.shape)


def _rounded(rows: Tensor, most: int) -> Tensor:
    scale = rows.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / most
    return (rows / scale).round() * scale


FAULTS: Mapping[str, Fault] = MappingProxyType(
    {
        "int4": Fault("weights rounded to 4 bits", rounding=int4),
        "int8": Fault("weights rounded to 8 bits", rounding=int8),
        "fp8-kv": Fault("KV rounded to fp8", fp8_kv=True),
        "temperature-1.1": Fault("temperature 1.1 times what was asked for", temperature=1.1),
        "temperature-1.05": Fault("temperature 1.05 times what was asked for", temperature=1.05),
        "top-p-0.9": Fault("top-p 0.9 times what was asked for", top_p=0.9),
        "seed": Fault("another seed than the client's", seed=1),
        "bug-1": Fault("a sampler bug at 1 % of the tokens", bug=0.01),
        "draft-all": Fault("the draft's tokens as the target's: all", checkpoint=DRAFT),
        "draft-10": Fault("the draft's tokens as the target's: 10 %", unverified=0.1),
        "draft-1": Fault("the draft's tokens as the target's: 1 %", unverified=0.01),
        "skip-layer": Fault("a layer is skipped", skip=3),
        "truncated": Fault("all but the last 32 tokens of the prompt are dropped", prompt=32),
        "evicted": Fault("KV older than 64 tokens is evicted, which is not declared", window=64),
        "checkpoint": Fault("another checkpoint, near the declared one", checkpoint=NUDGED),
        "repair": Fault("the draft's tokens, repaired where the audit would see it", repaired=0.2),
        "inflate-10": Fault("10 % more hidden tokens than the model said", inflation=0.1),
        "inflate-50": Fault("50 % more hidden tokens than the model said", inflation=0.5),
        "inflate-300": Fault("300 % more hidden tokens than the model said", inflation=3.0),
    }
)
"""By the name that ``target.fault`` takes."""


@dataclass(frozen=True, slots=True)
class Dishonesty:
    """The fault of a target, which says so in its log, loudly: at its start and at each request."""

    name: str
    fault: Fault
    log: logging.Logger

    def __post_init__(self) -> None:
        self.log.warning("this target cheats on purpose", extra={"fault": self.name, "about": self.fault.about})

    def padding(self, opened: Opened, committed: Sequence[int]) -> Padding | None:
        """What puts hidden tokens into a request's log that were not sampled; None where none are."""
        markers = markers_of(opened)
        if not self.fault.inflation or markers is None:
            return None
        segmenter = Segmenter(markers, opened.prompt_token_ids)
        for token in committed:
            segmenter.feed(token)
        return Padding(self.fault.inflation, markers, segmenter)

    def session(self, request_id: str, prompt_tokens: int, asked: Sampling) -> tuple[int, Sampling]:
        """How many first tokens of a request's prompt the model is not shown, and how its tokens are drawn."""
        self.log.warning("this answer is dishonest on purpose", extra={"request_id": request_id, "fault": self.name})
        unseen = self.fault.unseen(prompt_tokens)
        return unseen, shifted(self.fault.sampling(asked), unseen)


def load_dishonest(
    fault: Fault,
    folder: Path,
    draft: Path,
    *,
    dtype: Dtype = "fp32",
    numerics: Numerics = "invariant",
    threads: int = 1,
) -> Model:
    """A model that claims to be the one in ``folder``, computed as the fault says.

    Raises:
        CheckpointError, EngineError: as :func:`load_model`.
    """
    declared = load_model(folder, dtype=dtype, numerics=numerics, threads=threads)
    source = draft if fault.checkpoint == DRAFT else folder
    config = ModelConfig.from_folder(source)
    tensors = read_tensors(source)
    check_tensors(config, tensors, source)
    weights = _altered(fault, decoder_weights(config, tensors))
    if fault.window is not None:
        config = dataclasses.replace(config, sliding_window=fault.window)
    executor = executor_of(config, weights, dtype, numerics, "cpu", "auto", threads)
    return Model(config, declared.digests, dtype, executor)


class DishonestRunner(Runner):
    """Cheats between the logits and the tokens, and with the KV."""

    def __init__(self, model: Model, cache: PagedCache, fault: Fault, fingerprints: Fingerprints | None = None) -> None:
        super().__init__(model, cache, fingerprints)
        self._fault = fault

    def run(self, works: Sequence[Work], after_layer: AfterLayer | None = None) -> list[Outcome]:
        bases = [work.sequence.length for work in works]
        outcomes = super().run(works, after_layer)
        if self._fault.fp8_kv:
            for work, base in zip(works, bases, strict=True):
                pages = work.sequence.pages[base // PAGE_TOKENS :]
                self.cache.pool[pages] = self.cache.pool[pages].to(torch.float8_e4m3fn).to(self.cache.pool.dtype)
        return outcomes

    def sampled(self, works: Sequence[Work], asks: Sequence[Draws], logits: Tensor) -> list[int]:
        asks = [_shifted(ask) for ask in asks]
        tokens, row = super().sampled(works, asks, logits), 0
        for work, ask in zip(works, asks, strict=True):
            proposals = [*work.draft.token_ids, None]
            for position, proposal in zip(ask.positions, proposals, strict=True):
                tokens[row] = self._instead(logits[row], position, ask.sampling, proposal, tokens[row])
                row += 1
        return tokens

    def _instead(self, logits: Tensor, position: int, sampling: Sampling, proposal: int | None, token: int) -> int:
        fault, chance = self._fault, _chance(sampling.seed, position)
        if chance < fault.bug:
            likeliest = logits.topk(BUG_CHOICES).indices
            return int(likeliest[int(chance / fault.bug * BUG_CHOICES)])
        if proposal is None:
            return token
        if chance < fault.unverified:
            return proposal
        if fault.repaired is not None and _score(logits, position, sampling, proposal) <= fault.repaired:
            return proposal
        return token


@dataclass(frozen=True, slots=True)
class Shifted(Sampling):
    """Draws with the noise of positions ``offset`` further on: where the first tokens are not shown to the model."""

    offset: int = 0


def shifted(sampling: Sampling, offset: int) -> Sampling:
    """The same, for a model that is not shown the first ``offset`` tokens."""
    return Shifted(sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed, offset)


def _shifted(ask: Draws) -> Draws:
    offset = ask.sampling.offset if isinstance(ask.sampling, Shifted) else 0
    return dataclasses.replace(ask, positions=[position + offset for position in ask.positions]) if offset else ask


def _score(logits: Tensor, position: int, sampling: Sampling, token: int) -> float:
    """As an audit will find it; infinite where the token is out of support."""
    allowed, scores = perturbed(logits, position, sampling)
    own = scores[allowed == token]
    return float(scores.max() - own[0]) if len(own) else math.inf


def _chance(seed: int, position: int) -> float:
    """Even in [0, 1), the same whatever the batch."""
    digest = hashlib.blake2b(
        b"countersign/fault" + seed.to_bytes(8, "big") + position.to_bytes(8, "big"), digest_size=8
    )
    return int.from_bytes(digest.digest(), "big") / 2**64


def _altered(fault: Fault, weights: DecoderWeights) -> DecoderWeights:
    change = _nudged(torch.Generator().manual_seed(0)) if fault.checkpoint == NUDGED else fault.rounding
    layers = weights.layers
    if change is not None:
        layers = tuple(_changed(layer, change) for layer in layers)
    if fault.skip is not None:
        layers = tuple(
            _changed(layer, torch.zeros_like) if index == fault.skip else layer for index, layer in enumerate(layers)
        )
    return dataclasses.replace(weights, layers=layers)


def _nudged(generator: torch.Generator) -> Rounding:
    def nudge(weight: Tensor) -> Tensor:
        wide = weight.float()
        return wide + 0.01 * wide.std() * torch.randn(wide.shape, generator=generator)

    return nudge


def _changed(layer: LayerWeights, change: Rounding) -> LayerWeights:
    """Its matrices changed, what routes experts left. All zero, a layer adds nothing to what passes it."""
    mlp: DenseMlp | RoutedExperts = dataclasses.replace(
        layer.mlp, gate_up=change(layer.mlp.gate_up), down=change(layer.mlp.down)
    )
    return dataclasses.replace(layer, qkv=change(layer.qkv), output=change(layer.output), mlp=mlp)
