"""The torch executor on a GPU: a Llama of 8 B in bf16, random weights made on the device. Without one, a tiny shape.

Fractions: of decode's bandwidth limit, (bytes of all weights but the embedding table / bytes that a device copy reads
and writes in a second) / seconds of a step; of the matrix peak, (operations of the prompt's matrix products and causal
attention / seconds) / operations a second of a square bf16 product. A step's seconds are the host's, from the token
ids to the greedy choices back on the host.

Runs with torch, NumPy and safetensors alone: ``PYTHONPATH=src python benchmarks/gpu.py --json [--quick]``.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import torch

from countersign.services.engine.config import ModelConfig, Numerics, Rope
from countersign.services.engine.eager import EagerExecutor
from countersign.services.engine.graphs import GraphedExecutor
from countersign.services.engine.kv import CachedSequence, PagedCache
from countersign.services.engine.step import Span
from countersign.services.engine.weights import DecoderWeights, DenseMlp, LayerWeights

if TYPE_CHECKING:
    from countersign.cli.bench import Row

Figure: TypeAlias = dict[str, str | float | bool]
VERIFIED = 8


@dataclass(frozen=True, slots=True)
class Size:
    """What is measured: a shape, on a context and a long one, a prompt and a short one, and the side of the product and
    bytes of the copy that stand for the device.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    contexts: tuple[int, int]
    prompts: tuple[int, int]
    product: int
    copied: int

    @property
    def config(self) -> ModelConfig:
        """As a Llama without rotary scaling."""
        return ModelConfig(
            family="llama", vocabulary_size=self.vocabulary, context_length=16384, hidden_size=self.hidden,
            layers=self.layers, heads=self.heads, kv_heads=self.kv_heads, head_dim=self.hidden // self.heads,
            intermediate_size=self.intermediate, rms_eps=1e-5, rope=Rope(500000.0), qkv_bias=False, qk_norm=False,
            sliding_window=None, tied=False, end_token_ids=frozenset(),
        )  # fmt: skip

    def operations(self, tokens: int) -> int:
        """Of a prompt's matrix products and causal attention, an addition and a multiplication being two."""
        head_dim = self.hidden // self.heads
        qkv_and_output = self.hidden * head_dim * (2 * self.heads + 2 * self.kv_heads)
        products = self.layers * (qkv_and_output + 3 * self.hidden * self.intermediate)
        attention = self.layers * self.hidden * tokens * (tokens + 1)
        return 2 * (tokens * products + self.hidden * self.vocabulary + attention)


# Contexts that end 8 tokens or more before a bucket's edge.
LARGE = Size(4096, 32, 32, 8, 14336, 128256, (500, 4000), (8192, 512), 8192, 2**32)
TINY = Size(64, 2, 4, 2, 224, 512, (120, 250), (256, 64), 256, 2**22)


async def run(quick: bool) -> list[Row]:
    """See :func:`figures`."""
    from countersign.cli.bench import Row

    return [Row(**figure) for figure in figures(quick)]  # type: ignore[arg-type]  # the keys are Row's


def figures(quick: bool) -> list[Figure]:
    """The rows as plain objects. Bars are for a GPU only."""
    on_gpu = torch.cuda.is_available()
    size = LARGE if on_gpu else TINY
    case = f"8 B Llama, bf16, {torch.cuda.get_device_name()}" if on_gpu else "no GPU: a tiny Llama, bf16, on the CPU"
    bench = Bench(size, "cuda" if on_gpu else "cpu", 10 if quick or not on_gpu else 100)
    with torch.inference_mode():
        found = [*bench.decode(), *bench.prefill(), *bench.invariance()]
    for figure in found:
        if not on_gpu:
            figure.pop("bar", None)
            figure.pop("met", None)
    return [{"bench": "gpu", "case": case, **figure} for figure in found]


class Bench:
    """The model on a device. ``repeats``: of each step."""

    def __init__(self, size: Size, device: str, repeats: int) -> None:
        self.size, self.device, self.repeats = size, device, repeats
        self.weights = random_weights(size.config, device)
        self.cache = PagedCache(size.config, "bf16", 2 * max(*size.prompts, *size.contexts), device)
        self.fast = self.executor(GraphedExecutor, "fast")

    def executor(self, made: type[EagerExecutor], numerics: Numerics) -> EagerExecutor:
        """All share the weights' memory."""
        return made(self.size.config, self.weights, "bf16", numerics, self.device)

    def step(self, executor: EagerExecutor, sequence: CachedSequence, token_ids: Sequence[int]) -> list[int]:
        """The greedy choice after each of the tokens, which the sequence does not keep."""
        length = sequence.length
        self.cache.reserve({sequence: length + len(token_ids)})
        computed = executor.run(self.cache, [Span(sequence, token_ids, min(len(token_ids), VERIFIED))])
        chosen: list[int] = computed.logits.argmax(dim=-1).tolist()
        sequence.length = length + len(token_ids)
        sequence.truncate(length)
        return chosen

    def grown(self, tokens: int) -> CachedSequence:
        """A sequence of so many tokens."""
        sequence = self.cache.sequence()
        self.cache.reserve({sequence: tokens})
        self.fast.run(self.cache, [Span(sequence, self.token_ids(tokens), 0)])
        sequence.length = tokens
        return sequence

    def token_ids(self, count: int) -> list[int]:
        """Drawn, always the same."""
        generator = torch.Generator().manual_seed(count)
        return torch.randint(self.size.vocabulary, (count,), generator=generator).tolist()

    def turns(self, *works: Callable[[], object], repeats: int | None = None) -> list[float]:
        """Median seconds of each, in turns of a few, after two unmeasured."""
        taken: list[list[float]] = [[] for _ in works]
        for turn in range(1 + 5):
            for work, seconds in zip(works, taken, strict=True):
                for _ in range(2 if turn == 0 else -(-(repeats or self.repeats) // 5)):
                    self.wait()
                    began = time.perf_counter()
                    work()
                    self.wait()
                    if turn:
                        seconds.append(time.perf_counter() - began)
        return [statistics.median(seconds) for seconds in taken]

    def wait(self) -> None:
        """For the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def copy_rate(self) -> float:
        """Bytes a second, read and written."""
        source = torch.randint(256, (self.size.copied,), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * self.size.copied / self.turns(lambda: target.copy_(source))[0]

    def product_rate(self) -> float:
        """Operations a second."""
        side = self.size.product
        a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=self.device) for _ in range(2))
        return float(2 * side**3 / self.turns(lambda: a @ b)[0])

    def decode(self) -> list[Figure]:
        """Batch 1, on graphs: decode, verification, a long context; the same without graphs."""
        copy_rate = self.copy_rate()
        read = weight_bytes(self.weights)
        one, long = (self.grown(context) for context in self.size.contexts)
        tokens = self.token_ids(VERIFIED)
        eager = self.executor(EagerExecutor, "fast")
        decode, verify, far, launched = self.turns(
            lambda: self.step(self.fast, one, tokens[:1]),
            lambda: self.step(self.fast, one, tokens),
            lambda: self.step(self.fast, long, tokens[:1]),
            lambda: self.step(eager, one, tokens[:1]),
        )
        one.close()
        long.close()
        limit, n = read / copy_rate, self.repeats
        context, longer = self.size.contexts
        return [
            figure("device copy, bytes read and written", copy_rate / 1e9, "GB/s", n),
            figure("weights read by a step", read / 1e9, "GB", 1),
            figure(f"decode with graphs, batch 1, context {context}", decode * 1e3, "ms/token", n),
            judged("decode with graphs, share of the bandwidth limit", limit / decode, 0.8, n),
            figure(f"decode with graphs, batch 1, context {longer}", far * 1e3, "ms/token", n),
            figure("decode without graphs", launched * 1e3, "ms/token", n),
            judged(f"verify step of {VERIFIED} tokens, over a decode step", verify / decode, 1.15, n, most=True),
        ]

    def prefill(self) -> list[Figure]:
        """A long prompt at once."""
        rate, n = self.product_rate(), 5
        tokens = self.token_ids(self.size.prompts[0])
        sequence = self.cache.sequence()
        taken = self.turns(lambda: self.step(self.fast, sequence, tokens), repeats=n)[0]
        sequence.close()
        share = self.size.operations(len(tokens)) / taken / rate
        return [
            figure(f"bf16 product of side {self.size.product}", rate / 1e12, "TFLOP/s", self.repeats),
            figure(f"prefill of {len(tokens)} tokens", len(tokens) / taken, "tokens/s", n),
            judged(f"prefill of {len(tokens)} tokens, share of the matrix peak", share, 0.55, n),
        ]

    def invariance(self) -> list[Figure]:
        """What ``numerics: invariant`` costs, beside ``fast``."""
        invariant, n = self.executor(GraphedExecutor, "invariant"), 5
        one, other = self.grown(self.size.contexts[0]), self.cache.sequence()
        tokens, prompt = self.token_ids(VERIFIED), self.token_ids(self.size.prompts[1])
        found = []
        for what, sequence, token_ids in (
            ("decode step", one, tokens[:1]),
            (f"verify step of {VERIFIED} tokens", one, tokens),
            (f"prefill of {len(prompt)} tokens", other, prompt),
        ):
            exact, fast = self.turns(
                partial(self.step, invariant, sequence, token_ids),
                partial(self.step, self.fast, sequence, token_ids),
                repeats=n,
            )
            beside: Figure = {"peer": "fast numerics", "ratio": exact / fast}
            found.append({**figure(f"{what}, invariant numerics", exact * 1e3, "ms", n), **beside})
        return found


def random_weights(config: ModelConfig, device: str) -> DecoderWeights:
    """bf16, made where they stay."""
    hidden, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocabulary_size

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=device).mul_(shape[-1] ** -0.5)

    def ones() -> torch.Tensor:
        return torch.ones(hidden, dtype=torch.bfloat16, device=device)

    torch.manual_seed(0)
    width = config.heads * config.head_dim
    layers = tuple(
        LayerWeights(
            attention_norm=ones(),
            qkv=drawn(width + 2 * config.kv_heads * config.head_dim, hidden),
            qkv_bias=None,
            q_norm=None,
            k_norm=None,
            output=drawn(hidden, width),
            mlp_norm=ones(),
            mlp=DenseMlp(drawn(2 * inner, hidden), drawn(hidden, inner)),
        )
        for _ in range(config.layers)
    )
    return DecoderWeights(drawn(vocabulary, hidden), layers, ones(), drawn(vocabulary, hidden))


def weight_bytes(weights: DecoderWeights) -> int:
    """Of all but the embedding table, of which a step reads a row a token."""
    total = weights.norm.nbytes + weights.head.nbytes
    for layer in weights.layers:
        mlp = (layer.mlp.gate_up, layer.mlp.down) if isinstance(layer.mlp, DenseMlp) else ()
        parts = (layer.attention_norm, layer.qkv, layer.output, layer.mlp_norm, *mlp)
        total += sum(part.nbytes for part in parts)
    return total


def figure(metric: str, value: float, unit: str, n: int) -> Figure:
    """One measured number."""
    return {"metric": metric, "value": value, "unit": unit, "n": n}


def judged(metric: str, value: float, bar: float, n: int, *, most: bool = False) -> Figure:
    """One with a bar: at least, or at ``most``."""
    met = value <= bar if most else value >= bar
    return {**figure(metric, value, "1", n), "bar": f"{'<=' if most else '>='} {bar:g}", "met": met}


def main() -> None:
    """Rows as JSON lines, or as text."""
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    when = {"machine": f"{machine}, torch {torch.__version__}", "when": datetime.now(UTC).isoformat(timespec="seconds")}
    for row in figures("--quick" in sys.argv):
        if "--json" in sys.argv:
            print(json.dumps({**row, **when}))
        else:
            print(f"{row['metric']}: {row['value']:.4g} {row['unit']} {row.get('bar', '')}")


if __name__ == "__main__":
    main()
