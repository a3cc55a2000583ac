"""The executor on the kernels: the numbers of torch's own operations, and a token's bits whatever is beside it.

The references compute most of it; Triton's kernels, interpreted, one small step of each kind.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from countersign.kernels import attention, padded_attention
from countersign.kernels.dispatch import Backend
from countersign.services.engine import ops
from countersign.services.engine.checkpoint import read_tensors
from countersign.services.engine.config import Dtype, ModelConfig, Numerics
from countersign.services.engine.eager import EagerExecutor
from countersign.services.engine.graphs import GraphedExecutor
from countersign.services.engine.kv import CachedSequence, PagedCache
from countersign.services.engine.linear import LinearMode
from countersign.services.engine.model import Model, Span, load_model
from countersign.services.engine.pages import PAGE_TOKENS
from countersign.services.engine.step import Splitting, plan_paged
from countersign.services.engine.weights import decoder_weights

TOLERANCE = 2e-5
LEAF = 64
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped queries": ("llama", {}),
    "one head a group, biases": ("qwen2", {"hidden_size": 64, "num_key_value_heads": 4}),
    "window": ("mistral", {"sliding_window": 24}),
    "query and key norms": ("qwen3", {}),
    "experts": ("mixtral", {}),
    "experts and norms": ("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": [0]}),
}


@pytest.fixture(scope="module", autouse=True)
def small_leaves() -> Iterator[None]:
    """So that short contexts have several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "LEAF", LEAF)
        yield


@pytest.fixture(scope="module")
def folders(build_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for index, (name, (family, changes)) in enumerate(CASES.items()):
        made[name] = tmp_path_factory.mktemp("model")
        build_model(family, 30 + index, **changes).save_pretrained(made[name])
    return made


def on_kernels(
    folder: Path,
    numerics: Numerics,
    backend: Backend = "reference",
    made: type[EagerExecutor] = EagerExecutor,
    dtype: Dtype = "fp32",
) -> Model:
    plain = load_model(folder, backend="eager")
    weights = decoder_weights(plain.config, read_tensors(folder))
    executor = made(plain.config, weights, dtype, numerics, ops=backend)
    assert executor.name == f"paged-{backend}"
    assert executor.paths.attention == backend
    return Model(plain.config, plain.digests, dtype, executor)


def prompt(seed: int, length: int) -> list[int]:
    return torch.randint(2, 96, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def ragged_steps(model: Model, lengths: Sequence[int]) -> Tensor:
    """Prompts, whole and in pieces, beside decode, verification and trees; the rows of all steps."""
    cache = PagedCache(model.config, "fp32", 2000)
    long, short, tree, late = (cache.sequence() for _ in range(4))
    found = [
        model.forward(cache, [Span(tree, prompt(3, lengths[2]), 0), Span(long, prompt(1, lengths[0]), 3)]),
        model.forward(cache, [Span(long, [7]), Span(short, prompt(2, lengths[1]), 2)]),
        model.forward(
            cache,
            [
                Span(tree, [5, 6, 7, 8, 9, 10], 6, parents=[-1, -1, 0, 0, 2, 1]),
                Span(late, prompt(4, lengths[3]), 1),
                Span(short, [11, 12, 13], 3),
                Span(long, [8]),
            ],
        ),
    ]
    tree.compact(lengths[2], [0, 2, 4])
    found.append(model.forward(cache, [Span(tree, [3]), Span(late, [4, 5], 2)]))
    cache.check_integrity()
    return torch.cat(found)


def assert_same_numbers(found: Tensor, expected: Tensor) -> None:
    assert expected.abs().max() > 1, "the logits are too small for the tolerance to mean anything"
    assert (found - expected).abs().max() <= TOLERANCE
    assert torch.equal(found.argmax(dim=1), expected.argmax(dim=1))


@pytest.mark.parametrize("numerics", ["invariant", "fast"])
@pytest.mark.parametrize("case", CASES)
def test_the_references_give_the_numbers_of_torchs_own_operations(
    folders: dict[str, Path], case: str, numerics: Numerics
) -> None:
    lengths = (140, 5, 61, 90)
    expected = ragged_steps(load_model(folders[case], backend="eager"), lengths)
    assert_same_numbers(ragged_steps(on_kernels(folders[case], numerics), lengths), expected)


@pytest.mark.parametrize(
    ("case", "numerics"),
    [("grouped queries", "fast"), ("window", "invariant"), ("query and key norms", "invariant"), ("experts", "fast")],
)
def test_tritons_kernels_give_the_numbers_of_torchs_own_operations(
    folders: dict[str, Path], case: str, numerics: Numerics
) -> None:
    lengths = (66, 3, 30, 9)
    expected = ragged_steps(load_model(folders[case], backend="eager"), lengths)
    assert_same_numbers(ragged_steps(on_kernels(folders[case], numerics, "triton"), lengths), expected)


def test_every_operation_of_a_layer_is_the_kernel_that_was_named(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from countersign.kernels.triton import attention as attend
    from countersign.kernels.triton import matmul_invariant, merge, norm_rope, swiglu

    ran = set()
    kernels = ((attend, "attend"), (merge, "tree"), (norm_rope, "rms_norm"), (norm_rope, "norm_rope"))
    for module, name in (*kernels, (swiglu, "swiglu"), (matmul_invariant, "matmul_invariant")):
        original = getattr(module, name)

        def spy(*args: Any, name: str = name, original: Any = original, **options: Any) -> Any:
            ran.add(name)
            return original(*args, **options)

        monkeypatch.setattr(module, name, spy)
    model = on_kernels(folders["grouped queries"], "invariant", "triton")
    model.forward(cache := PagedCache(model.config, "fp32", 100), [Span(cache.sequence(), [3, 4])])
    assert ran == {"attend", "tree", "rms_norm", "norm_rope", "swiglu", "matmul_invariant"}
    assert isinstance(model.executor, EagerExecutor)
    assert set(model.executor.paths.linear.values()) == {LinearMode.TILED}


@pytest.mark.parametrize(
    ("head_dim", "chosen", "name"),
    [(64, "triton", "paged-triton"), (64, "reference", "eager"), (8, "triton", "eager"), (512, "triton", "eager")],
)
def test_the_kernels_are_taken_where_triton_has_a_gpu_and_the_head_size_fits(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, head_dim: int, chosen: Backend, name: str
) -> None:
    config = replace(ModelConfig.from_folder(folders["grouped queries"]), head_dim=head_dim)
    monkeypatch.setattr(ops, "choose", lambda *_: chosen)
    assert ops.make_ops(None, config, "fp32", "fast", "cpu").name == name
    assert ops.make_ops("padded", config, "fp32", "fast", "cpu").name == "eager"


TOKENS = [prompt(index, length) for index, length in enumerate((200, 131, 30))]


@pytest.fixture(scope="module")
def invariant(folders: dict[str, Path]) -> dict[str, tuple[Model, list[Tensor]]]:
    """Models, and the logits of each sequence computed alone in one piece."""
    found = {}
    for name in ("grouped queries", "window", "experts and norms"):
        model = on_kernels(folders[name], "invariant")
        found[name] = model, [logits_of(model, token_ids) for token_ids in TOKENS]
    return found


def logits_of(model: Model, token_ids: list[int]) -> Tensor:
    cache = PagedCache(model.config, model.dtype, len(token_ids))
    return model.forward(cache, [Span(cache.sequence(), token_ids, len(token_ids))])


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_bf16_stays_close_to_fp32(folders: dict[str, Path], backend: Backend) -> None:
    token_ids = TOKENS[1][: 66 if backend == "triton" else 131]
    rough = logits_of(on_kernels(folders["query and key norms"], "fast", backend, dtype="bf16"), token_ids)
    exact = logits_of(load_model(folders["query and key norms"], backend="eager"), token_ids)
    assert rough.dtype is torch.float32
    assert torch.cosine_similarity(exact, rough).min() > 0.99


NAMES = st.sampled_from(("grouped queries", "window", "experts and norms"))
CHUNKS = st.lists(st.sampled_from((1, 1, 2, 5, 16, 17, 40, 63, 64, 65, 100)), min_size=3, max_size=9)


@settings(max_examples=30)
@given(name=NAMES, chosen=st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True), chunks=CHUNKS)
def test_invariant_logits_are_the_same_bits_in_any_batch_and_any_chunks(
    invariant: dict[str, tuple[Model, list[Tensor]]], name: str, chosen: list[int], chunks: list[int]
) -> None:
    model, alone = invariant[name]
    cache = PagedCache(model.config, "fp32", 2000)
    sequences, sizes = {index: cache.sequence() for index in chosen}, itertools.cycle([*chunks, 33])
    while active := {i: sequence for i, sequence in sequences.items() if sequence.length < len(TOKENS[i])}:
        spans = []
        for index, sequence in active.items():
            token_ids = TOKENS[index][sequence.length :][: next(sizes)]
            spans.append(Span(sequence, token_ids, len(token_ids)))
        parts = torch.split(model.forward(cache, spans), [span.logits for span in spans])
        for index, rows in zip(active, parts, strict=True):
            length = sequences[index].length
            assert torch.equal(rows, alone[index][length - len(rows) : length])


@st.composite
def trees(draw: st.DrawFn) -> tuple[int, list[int]]:
    """(tokens before it, parents)."""
    base, size = draw(st.sampled_from((1, 15, 60, 63, 64, 100))), draw(st.integers(1, 9))
    return base, [draw(st.integers(-1, node - 1)) for node in range(size)]


@settings(max_examples=30)
@given(name=NAMES, drawn=st.lists(trees(), min_size=1, max_size=2))
def test_invariant_tree_nodes_have_the_bits_of_plain_decode_along_their_paths(
    invariant: dict[str, tuple[Model, list[Tensor]]], name: str, drawn: list[tuple[int, list[int]]]
) -> None:
    model, alone = invariant[name]
    cache = PagedCache(model.config, "fp32", 2000)

    def grown(base: int) -> CachedSequence:
        sequence = cache.sequence()
        model.forward(cache, [Span(sequence, TOKENS[1][:base], 0)])
        return sequence

    other = cache.sequence()
    spans = [Span(grown(base), prompt(base, len(p)), len(p), p) for base, p in drawn]
    logits = model.forward(cache, [*spans, Span(other, TOKENS[2], 1)])
    assert torch.equal(logits[-1], alone[2][-1])
    parts = torch.split(logits[:-1], [span.logits for span in spans])
    for (base, parents), span, rows in zip(drawn, spans, parts, strict=True):
        path: list[int] = []
        node = len(parents) - 1
        while node >= 0:
            path, node = [node, *path], parents[node]
        plain = grown(base)
        for node in path:
            assert torch.equal(model.forward(cache, [Span(plain, [span.token_ids[node]])])[0], rows[node])
        # What follows an accepted path has the bits of a sequence without any tree.
        span.sequence.compact(base, path)
        after = model.forward(cache, [Span(span.sequence, [7]), Span(plain, [7])])
        assert torch.equal(after[0], after[1])


def test_less_memory_for_partials_means_more_calls_and_the_same_bits(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ragged_steps(on_kernels(folders["window"], "invariant"), (140, 5, 61, 90))
    calls: list[int] = []
    original = attention.attend

    def counted(q: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        calls.append(len(q))
        return original(q, *args, **options)

    monkeypatch.setattr(attention, "attend", counted)
    # Of 4 heads of 16 in fp32: 30 rows that each have one leaf.
    monkeypatch.setattr(ops, "PARTIAL_BYTES", 30 * 4 * 4 * 16)
    assert torch.equal(ragged_steps(on_kernels(folders["window"], "invariant"), (140, 5, 61, 90)), whole)
    assert max(calls) <= 30
    assert len(calls) > 30


def test_a_step_splits_the_keys_of_few_rows_and_keeps_trees_whole_and_apart(folders: dict[str, Path]) -> None:
    model = on_kernels(folders["grouped queries"], "fast")
    cache = PagedCache(model.config, "fp32", 2000)
    parents = [-1, 0, 0, 1]
    counts: list[tuple[int, list[int] | None]] = [
        (70, None),
        (1, None),
        (4, parents),
        (8, None),
        (65, None),
        (4, [-1] * 4),
    ]
    spans = [Span(cache.sequence(), [3] * count, min(count, 2), tree) for count, tree in counts]
    cache.reserve({span.sequence: len(span.token_ids) for span in spans})

    def shape(splitting: Splitting) -> list[tuple[int, int, int | None, bool]]:
        calls = plan_paged(cache, spans, splitting, "cpu").calls
        return [(c.rows.start, c.rows.stop, c.leaf, c.layout.ancestors is not None) for c in calls]

    assert shape(Splitting(64, 64, 1000)) == [(0, 9, 64, False), (9, 17, 64, True), (17, 152, None, False)]
    pieces = [
        (0, 50, 64, False),
        (50, 100, 64, False),
        (100, 144, 64, False),
        (144, 148, 64, True),
        (148, 152, 64, True),
    ]
    assert shape(Splitting(64, None, 100))[:3] == pieces[:3]
    assert shape(Splitting(64, None, 6))[-2:] == pieces[3:]
    step = plan_paged(cache, spans, Splitting(64, 64, 1000), "cpu")
    assert step.logit_rows.tolist() == [85, 86, 0, 11, 12, 7, 8, 150, 151, 15, 16]
    ancestors = step.calls[1].layout.ancestors
    assert ancestors is not None
    assert ancestors.flatten().tolist() == [0b1, 0b11, 0b101, 0b1011, 0b1, 0b10, 0b100, 0b1000]


class Sides:
    """The same sequences of an executor that replays graphs and of one that does not."""

    def __init__(self, folder: Path, numerics: Numerics, lengths: Sequence[int]) -> None:
        self.models = [on_kernels(folder, numerics, made=made) for made in (GraphedExecutor, EagerExecutor)]
        self.caches = [PagedCache(model.config, "fp32", 2000) for model in self.models]
        self.sequences = [[cache.sequence() for _ in lengths] for cache in self.caches]
        self.run([(index, prompt(index, length), 0) for index, length in enumerate(lengths)])

    def run(self, spans: Sequence[tuple[int, list[int], int]]) -> list[Tensor]:
        """Spans are (sequence, token ids, rows of logits wanted)."""
        return [
            model.forward(cache, [Span(sequences[i], token_ids, wanted) for i, token_ids, wanted in spans])
            for model, cache, sequences in zip(self.models, self.caches, self.sequences, strict=True)
        ]

    def blocks(self, side: int) -> list[bytes]:
        return [s.export_block(i) for s in self.sequences[side] for i in range(s.length // PAGE_TOKENS)]

    @property
    def buckets(self) -> int:
        executor = self.models[0].executor
        assert isinstance(executor, GraphedExecutor)
        return len(executor.buckets)


@st.composite
def steps(draw: st.DrawFn) -> list[list[tuple[int, list[int], int]]]:
    """Decode and verify steps over some of three sequences, in any order."""
    found = []
    for _ in range(draw(st.integers(1, 4))):
        chosen = draw(st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True))
        counts = [draw(st.sampled_from((1, 1, 3, 8, 16))) for _ in chosen]
        found.append([(i, prompt(n, n), draw(st.integers(0, n))) for i, n in zip(chosen, counts, strict=True)])
    return found


LENGTHS = st.lists(st.sampled_from((1, 15, 16, 40, 63, 64, 250, 256)), min_size=3, max_size=3)


@settings(max_examples=30)
@given(lengths=LENGTHS, work=steps(), name=st.sampled_from(("grouped queries", "window", "query and key norms")))
def test_invariant_graphs_have_the_bits_of_plain_steps_in_logits_and_kv(
    folders: dict[str, Path], lengths: list[int], work: list[list[tuple[int, list[int], int]]], name: str
) -> None:
    sides = Sides(folders[name], "invariant", lengths)
    for spans in work:
        assert torch.equal(*sides.run(spans))
    assert sides.blocks(0) == sides.blocks(1)
    assert sides.buckets
    for cache in sides.caches:
        cache.check_integrity()


def test_fast_graphs_differ_from_plain_steps_by_rounding_only(folders: dict[str, Path]) -> None:
    sides = Sides(folders["window"], "fast", (40, 250, 3))
    for spans in ([(0, [5], 1), (1, [6, 7, 8], 3)], [(2, [9] * 7, 7), (0, [4], 1), (1, [5], 1)], [(1, [3], 1)]):
        torch.testing.assert_close(*sides.run(spans), rtol=1e-5, atol=TOLERANCE)
    assert sides.buckets == 3


class NoWord(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it so
    """Refuses operations that wait for the device."""

    WAITING = frozenset({"item", "_local_scalar_dense", "is_nonzero", "nonzero", "masked_select"})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in self.WAITING, f"{func} asks the device"
        return func(*args, **(kwargs or {}))


def test_a_graphs_step_asks_the_host_nothing(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted kernels look at memory; all else is what a GPU would get."""
    model = on_kernels(folders["window"], "invariant", "triton", GraphedExecutor)
    cache = PagedCache(model.config, "fp32", 200)
    sequences = [cache.sequence() for _ in range(2)]
    # On a GPU nobody looks at the layout's numbers.
    monkeypatch.setattr(attention, "_check_numbers", lambda *_: None)
    with NoWord():  # type: ignore[no-untyped-call]  # torch leaves it so
        for token_ids in ([3, 4, 5], [6]):
            model.forward(cache, [Span(sequence, token_ids, len(token_ids)) for sequence in sequences])
    assert isinstance(model.executor, GraphedExecutor)
    assert len(model.executor.buckets) == 2


def test_a_request_of_nan_touches_no_other(folders: dict[str, Path]) -> None:
    for made in (EagerExecutor, GraphedExecutor):
        model = on_kernels(folders["grouped queries"], "invariant", made=made)
        cache = PagedCache(model.config, "fp32", 500)
        good, bad = cache.sequence(), cache.sequence()
        model.forward(cache, [Span(good, prompt(1, 40), 0), Span(bad, prompt(2, 50), 0)])
        cache.pool[bad.pages[0]] = torch.nan
        logits = model.forward(cache, [Span(good, [5]), Span(bad, [6, 7], 2)])
        assert logits[0].isfinite().all()
        assert logits[1:].isnan().all()


def test_the_first_bad_layer_is_found(folders: dict[str, Path]) -> None:
    model = on_kernels(folders["grouped queries"], "fast")
    cache = PagedCache(model.config, "fp32", 100)
    sequence = cache.sequence()
    model.forward(cache, [Span(sequence, prompt(1, 20), 0)])
    cache.keys(1)[sequence.pages[0]] = torch.nan
    span = Span(sequence, [5])
    assert model.forward(cache, [span]).isnan().all()
    assert model.first_bad_layer(cache, span) == 1


def test_the_padded_path_is_what_the_cpu_takes(folders: dict[str, Path]) -> None:
    executor = load_model(folders["grouped queries"], backend="eager").executor
    assert isinstance(executor, EagerExecutor)
    assert executor.paths.attention is padded_attention.Path.FLASH_CPU
