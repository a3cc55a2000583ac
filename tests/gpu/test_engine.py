"""The engine on a CUDA device, by Triton's kernels and by torch's own operations: the bits of invariant numerics,
graphs beside plain steps, the CPU's numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from countersign.services.engine import graphs
from countersign.services.engine import ops as engine_ops
from countersign.services.engine.config import Dtype, ModelConfig, Numerics, Rope
from countersign.services.engine.eager import EagerExecutor
from countersign.services.engine.graphs import GraphedExecutor
from countersign.services.engine.kv import CachedSequence, PagedCache
from countersign.services.engine.model import Digests, Model, Span
from countersign.services.engine.ops import Choice
from countersign.services.engine.weights import DecoderWeights, DenseMlp, LayerWeights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CONFIG = ModelConfig(
    family="llama", vocabulary_size=512, context_length=8192, hidden_size=512, layers=3, heads=8, kv_heads=2,
    head_dim=64, intermediate_size=768, rms_eps=1e-5, rope=Rope(10000.0), qkv_bias=False, qk_norm=False,
    sliding_window=None, tied=False, end_token_ids=frozenset(),
)  # fmt: skip
TOKENS = torch.randint(0, 512, (2400,), generator=torch.Generator().manual_seed(7)).tolist()


NORMED = replace(CONFIG, qk_norm=True, sliding_window=100)
OPS = pytest.mark.parametrize("ops", ["triton", "padded"])


def weights(*, qk_norm: bool = False) -> DecoderWeights:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).mul_(shape[-1] ** -0.5)

    layer = (
        LayerWeights(
            drawn(512) + 1, drawn(768, 512), None, drawn(64) + 1 if qk_norm else None,
            drawn(64) + 1 if qk_norm else None, drawn(512, 512), drawn(512) + 1,
            DenseMlp(drawn(1536, 512), drawn(512, 768)),
        )
        for _ in range(CONFIG.layers)
    )  # fmt: skip
    return DecoderWeights(drawn(512, 512), tuple(layer), drawn(512) + 1, drawn(512, 512) * 8)


WEIGHTS, NORMED_WEIGHTS = weights(), weights(qk_norm=True)


class Side:
    """A model on a device, and its cache."""

    def __init__(
        self,
        made: type[EagerExecutor],
        numerics: Numerics,
        dtype: Dtype = "bf16",
        device: str = "cuda",
        config: ModelConfig = CONFIG,
        ops: Choice | None = None,
    ) -> None:
        self.executor = made(config, NORMED_WEIGHTS if config.qk_norm else WEIGHTS, dtype, numerics, device, ops)
        self.model = Model(config, Digests(b"", b"", b""), dtype, self.executor)
        self.renew()

    def renew(self) -> None:
        self.cache = PagedCache(CONFIG, self.model.dtype, 20000, self.executor._device)

    def grown(self, length: int) -> CachedSequence:
        sequence = self.cache.sequence()
        self.model.forward(self.cache, [Span(sequence, TOKENS[:length], 0)])
        return sequence

    def run(self, *spans: Span) -> Tensor:
        return self.model.forward(self.cache, spans)

    def greedy(self, lengths: Sequence[int], steps: int) -> list[int]:
        """Tokens of sequences that come and go."""
        sequences = [self.grown(length) for length in lengths]
        last, told = [[3] for _ in lengths], []
        for step in range(steps):
            present = [i for i in range(len(lengths)) if (step // 5) % (i + 2) != 1] or [0]
            logits = self.run(*(Span(sequences[i], last[i]) for i in present))
            for i, token in zip(present, logits.argmax(dim=-1).tolist(), strict=True):
                last[i] = [token]
                told.append(token)
        return told


def test_a_gpu_takes_tritons_kernels() -> None:
    side = Side(GraphedExecutor, "fast")
    assert side.executor.name == "paged-triton"
    assert side.executor.paths.attention == "triton"


@OPS
@pytest.mark.parametrize("config", [CONFIG, NORMED], ids=["plain", "normed"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_invariant_logits_are_the_same_bits_in_a_batch_in_chunks_and_in_decode(
    dtype: Dtype, config: ModelConfig, ops: Choice
) -> None:
    side = Side(EagerExecutor, "invariant", dtype, config=config, ops=ops)
    alone = side.run(Span(side.cache.sequence(), TOKENS[:600], 600))
    sequence, other, third = side.cache.sequence(), side.grown(300), side.grown(40)
    first = 0
    for index, chunk in enumerate((33, 1, 16, 200, 5, 1, 255, 8, 81)):
        beside = [Span(other, [9] * (index % 3 + 1)), Span(third, [5] * (17 * (index % 2) + 1))][: index % 3]
        span = Span(sequence, TOKENS[first : first + chunk], chunk)
        assert torch.equal(side.run(*beside, span)[len(beside) :], alone[first : first + chunk])
        first += chunk
    assert first == 600


@OPS
@pytest.mark.parametrize("config", [CONFIG, NORMED], ids=["plain", "normed"])
def test_invariant_tree_nodes_have_the_bits_of_plain_decode(config: ModelConfig, ops: Choice) -> None:
    side = Side(EagerExecutor, "invariant", config=config, ops=ops)
    parents, token_ids = [-1, 0, 0, 2, -1, 3], [7, 8, 9, 10, 11, 12]
    logits = side.run(Span(side.grown(507), token_ids, 6, parents))
    for path in ([0, 1], [0, 2, 3, 5], [4]):
        sequence = side.grown(507)
        for node in path:
            assert torch.equal(side.run(Span(sequence, [token_ids[node]]))[0], logits[node])


@pytest.mark.parametrize("config", [CONFIG, NORMED], ids=["plain", "normed"])
def test_invariant_graphs_have_the_bits_of_plain_steps(config: ModelConfig) -> None:
    found = []
    for made in (GraphedExecutor, EagerExecutor):
        side = Side(made, "invariant", config=config)
        sequences = [side.grown(length) for length in (250, 40, 511)]
        rows = [
            side.run(*(Span(s, TOKENS[:n], n) for s, n in zip(sequences, counts, strict=False)))
            for counts in ((1, 1, 1), (5, 1, 8), (3, 16), (1,), (1, 2, 3), (1, 1, 1))
        ]
        blocks = [sequence.export_block(i) for sequence in sequences for i in range(sequence.length // 16)]
        found.append((torch.cat(rows), blocks))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_less_memory_for_partials_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for size in (1 << 28, 1 << 20):
        monkeypatch.setattr(engine_ops, "PARTIAL_BYTES", size)
        side = Side(EagerExecutor, "invariant")
        sequence = side.grown(100)
        found.append(side.run(Span(sequence, TOKENS[100:2300], 2200), Span(side.grown(30), [5])))
    assert torch.equal(*found)


@pytest.mark.parametrize("config", [CONFIG, NORMED], ids=["plain", "normed"])
@pytest.mark.parametrize("numerics", ["invariant", "fast"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_tritons_kernels_give_the_numbers_of_torchs_own_operations(
    dtype: Dtype, numerics: Numerics, config: ModelConfig
) -> None:
    found = []
    choices: tuple[Choice, ...] = ("triton", "padded")
    for ops in choices:
        side = Side(EagerExecutor, numerics, dtype, config=config, ops=ops)
        long, short, tree = side.cache.sequence(), side.grown(20), side.grown(300)
        rows = [side.run(Span(long, TOKENS[:700], 700), Span(short, [5], 1))]
        rows.append(
            side.run(Span(tree, [1, 2, 3, 4], 4, [-1, -1, 0, 2]), Span(long, TOKENS[:90], 90), Span(short, [3]))
        )
        rows.append(side.run(Span(long, [9]), Span(short, [8, 7, 6], 3)))
        found.append(torch.cat(rows))
    assert found[0].isfinite().all()
    assert relative(*found) < (2e-2 if dtype == "bf16" else 1e-4)


@pytest.mark.parametrize("made", [EagerExecutor, GraphedExecutor])
def test_a_step_waits_for_nothing_on_the_device(made: type[EagerExecutor]) -> None:
    side = Side(made, "invariant")
    first, second = side.grown(300), side.grown(40)

    def work() -> None:
        side.run(Span(first, [5]), Span(second, [6, 7, 8], 3))
        side.run(Span(first, [5, 6, 7], 3, [-1, 0, 0]), Span(second, TOKENS[:100]))

    work()  # compiles, and captures
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@OPS
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_graphs_and_plain_steps_agree(dtype: Dtype, window: int | None, ops: Choice) -> None:
    config = replace(CONFIG, sliding_window=window)
    made = [Side(each, "fast", dtype, config=config, ops=ops) for each in (GraphedExecutor, EagerExecutor)]
    found = []
    for side in made:
        sequences = [side.grown(length) for length in (250, 40, 511)]
        rows = []
        for step in range(12):
            counts = [1 + (step * (i + 1)) % 6 for i in range(3)][: 1 + step % 3]
            rows.append(side.run(*(Span(s, TOKENS[:n], n) for s, n in zip(sequences, counts, strict=False))))
        found.append(torch.cat(rows))
        side.cache.check_integrity()
    assert found[0].isfinite().all()
    assert relative(found[0], found[1]) < (1e-2 if dtype == "bf16" else 1e-4)
    executor = made[0].executor
    assert isinstance(executor, GraphedExecutor)
    assert len(executor.buckets) >= 4


def test_greedy_tokens_with_graphs_are_those_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few graphs are kept, and the rotary table and the cache are replaced under them."""
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 3)
    graphed, plain = (Side(each, "fast", "fp32") for each in (GraphedExecutor, EagerExecutor))
    for lengths, steps in (((20, 250, 3), 40), ((1020, 30), 30), ((2040,), 30), ((20, 250, 3), 40)):
        assert graphed.greedy(lengths, steps) == plain.greedy(lengths, steps)
    graphed.renew()
    plain.renew()
    assert graphed.greedy((20, 250), 30) == plain.greedy((20, 250), 30)


def test_the_rotary_table_may_grow_under_a_captured_graph() -> None:
    graphed, plain = (Side(each, "fast", "fp32") for each in (GraphedExecutor, EagerExecutor))
    rows = []
    for side in (graphed, plain):
        short = side.grown(30)
        side.run(Span(short, [5]))
        long = side.grown(2000)
        side.run(Span(long, [5]))
        # Of the size of the first table, so that they take its memory if it is free.
        filled = [torch.full((1024, CONFIG.head_dim), torch.nan, device="cuda") for _ in range(64)]
        rows.append(side.run(Span(short, [6])))
        assert len(filled) == 64
    assert relative(*rows) < 1e-4


@OPS
@pytest.mark.parametrize("numerics", ["invariant", "fast"])
def test_the_cpu_and_the_gpu_agree(numerics: Numerics, ops: Choice) -> None:
    found = []
    for device in ("cuda", "cpu"):
        side = Side(GraphedExecutor, numerics, "fp32", device, ops=ops if device == "cuda" else None)
        sequence = side.cache.sequence()
        rows = [side.run(Span(sequence, TOKENS[:600], 600)), side.run(Span(sequence, TOKENS[600:640], 40))]
        rows += [side.run(Span(sequence, [token])) for token in TOKENS[640:660]]
        tree = Span(sequence, [1, 2, 3], 3, [-1, -1, 0])
        found.append(torch.cat([*rows, side.run(tree)]).cpu())
    assert relative(*found) < 1e-4


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())
