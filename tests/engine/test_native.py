"""The native executor: the same bits from both variants of its code, any number of threads, and any shape; the numbers
of transformers.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from countersign.kernels.native import library as native
from countersign.services.engine.checkpoint import digests, read_tensors
from countersign.services.engine.config import Dtype, ModelConfig
from countersign.services.engine.errors import EngineError
from countersign.services.engine.kv import CachedSequence, PagedCache
from countersign.services.engine.model import Model, Span, load_model
from countersign.services.engine.native import NativeExecutor
from countersign.services.engine.weights import decoder_weights

DTYPES: tuple[Dtype, ...] = ("fp32", "bf16", "int8")
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"hidden_size": 64},
    "qwen3": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 40},
    "mixtral": {"sliding_window": 70},
    "qwen3_moe": {"mlp_only_layers": [0], "num_hidden_layers": 3},
}
LENGTH = 170
TREE = ([3, 9, 4, 7, 2, 8, 6], [-1, 0, 0, -1, 2, 4, 4])


def tokens(seed: int, count: int = LENGTH, vocabulary: int = 96) -> list[int]:
    return torch.randint(0, vocabulary, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def native_model(folder: Path, dtype: Dtype = "fp32", threads: int = 1, variant: str | None = None) -> Model:
    """As :func:`load_model`, with the variant of the library named."""
    config, tensors = ModelConfig.from_folder(folder), read_tensors(folder)
    executor = NativeExecutor(config, decoder_weights(config, tensors), dtype, threads, native.load(variant))
    return Model(config, digests(folder, config, tensors), dtype, executor)


def work(model: Model, seed: int = 0) -> list[Tensor]:
    """Prefill, decode, a tree and a draft, two sequences together: all logits, and what is in the cache at the end."""
    cache = PagedCache(model.config, model.dtype, 600)
    first, second = cache.sequence(), cache.sequence()
    ids = tokens(seed, vocabulary=model.config.vocabulary_size)
    logits = [
        model.forward(cache, [Span(first, ids[:100], 100)]),
        model.forward(cache, [Span(first, ids[100:101]), Span(second, ids[50:83], 5)]),
        model.forward(cache, [Span(second, TREE[0], 7, TREE[1]), Span(first, ids[101:120], 19)]),
    ]
    second.compact(33, [0, 2, 4, 5])
    logits += [model.forward(cache, [Span(first, [token]), Span(second, [token])]) for token in ids[120:140]]
    return [*logits, cache.pool.view(torch.uint8)]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.fixture(scope="module")
def folders(build_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each family."""
    made = {}
    for family, changes in FAMILIES.items():
        made[family] = tmp_path_factory.mktemp(family)
        build_model(family, 31, **changes).save_pretrained(made[family])
    return made


@pytest.mark.skipif(native.load("v4") is None or native.load().name != "v4", reason="no AVX-512 here")  # type: ignore[union-attr]
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_both_variants_give_the_same_bits(family: str, dtype: Dtype, folders: dict[str, Path]) -> None:
    narrow, wide = (work(native_model(folders[family], dtype, variant=variant)) for variant in ("v3", "v4"))
    assert narrow[0].isfinite().all()
    assert same(narrow, wide)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_the_number_of_threads_changes_no_bit(family: str, dtype: Dtype, folders: dict[str, Path]) -> None:
    one, two, three = (work(native_model(folders[family], dtype, threads)) for threads in (1, 2, 3))
    assert same(one, two)
    assert same(one, three)


def decode(model: Model) -> Tensor:
    cache = PagedCache(model.config, model.dtype, 48)
    sequence = cache.sequence()
    return torch.cat([model.forward(cache, [Span(sequence, [token])]) for token in range(40)])


def test_two_models_may_compute_at_once_each_with_threads_of_its_own(folders: dict[str, Path]) -> None:
    """More threads than cores and steps as short as can be, so that now and then a thread is late by a whole step."""
    models = [native_model(folders["qwen3_moe"], threads=3), native_model(folders["llama"], threads=2)]
    expected = [decode(native_model(folders[family])) for family in ("qwen3_moe", "llama")]
    wrong: list[tuple[int, int]] = []

    def repeat(which: int) -> None:
        wrong.extend((which, i) for i in range(1500) if not torch.equal(decode(models[which]), expected[which]))

    runners = [threading.Thread(target=repeat, args=(which,)) for which in range(2)]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join(240)
    assert not any(runner.is_alive() for runner in runners)
    assert not wrong


def test_teams_come_and_go(folders: dict[str, Path]) -> None:
    expected = work(native_model(folders["llama"]))
    gc.collect()
    threads = len(list(Path("/proc/self/task").iterdir()))
    for count in (4, 2, 3) * 4:
        assert same(work(native_model(folders["llama"], threads=count)), expected)
    gc.collect()
    assert len(list(Path("/proc/self/task").iterdir())) <= threads


def rounded(model: Any, dtype: Dtype) -> Any:
    """Transformers' model with each projection's weight as native code stores it."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if dtype == "bf16":
                parameter.copy_(parameter.bfloat16().float())
            elif parameter.dim() >= 2 and "embed" not in name and "gate.weight" not in name:
                scale = parameter.abs().amax(dim=-1, keepdim=True) / 127
                parameter.copy_((parameter / scale).round() * scale)
    return model


def oracle(model: Any, token_ids: list[int]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([token_ids])).logits[0]
    return logits


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rounded_weights_are_the_only_difference_to_fp32_but_for_the_caches_rounding(
    family: str, dtype: Dtype, build_model: Callable[..., Any], tmp_path: Path
) -> None:
    built = build_model(family, 31, **{**FAMILIES[family], "tie_word_embeddings": False})
    exact = oracle(built, tokens(1))
    expected_model = rounded(built, dtype)
    expected = oracle(expected_model, tokens(1))
    if dtype == "bf16":
        expected_model = expected_model.bfloat16()
    expected_model.save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=dtype, backend="native")
    assert (model_rows(model, tokens(1), "fp32") - expected).abs().max() <= 2e-4
    # A row that comes to other experts may be anywhere; there are few.
    largest, logits = float(exact.abs().max()), model_rows(model, tokens(1))
    for other, tolerance in ((expected, 0.01), (exact, 0.05)):
        worst = (logits - other).abs().amax(dim=1)
        assert 1e-4 < worst.quantile(0.9) <= tolerance * largest


def test_the_cache_may_be_another_each_step_and_of_another_type(folders: dict[str, Path]) -> None:
    model = native_model(folders["llama"])
    ids = tokens(2, 40)
    expected = {}
    for dtype in ("fp32", "bf16"):
        cache = PagedCache(model.config, dtype, 64)
        expected[dtype] = model.forward(cache, [Span(cache.sequence(), ids, 40)])
    assert not torch.equal(expected["fp32"], expected["bf16"])
    for _ in range(3):
        caches = [PagedCache(model.config, dtype, 64) for dtype in ("fp32", "bf16", "fp32")]
        sequences = [cache.sequence() for cache in caches]
        for first in range(0, 40, 10):
            for cache, sequence, dtype in zip(caches, sequences, ("fp32", "bf16", "fp32"), strict=True):
                logits = model.forward(cache, [Span(sequence, ids[first : first + 10], 10)])
                assert torch.equal(logits, expected[dtype][first : first + 10])
        del caches, sequences, cache, sequence


def test_a_step_larger_than_all_before_it_is_right_and_so_is_a_small_one_after_it(folders: dict[str, Path]) -> None:
    for family in ("llama", "mixtral"):
        model = native_model(folders[family])
        for count in (1, 40, 3, 170, 2, 400):
            ids = tokens(3, count)
            logits, whole = model_rows(model, ids), model_rows(native_model(folders[family]), ids)
            assert torch.equal(logits, whole)


def model_rows(model: Model, ids: list[int], dtype: Dtype | None = None) -> Tensor:
    """The logits of these tokens, computed at once; ``dtype`` of the cache if not the model's."""
    cache = PagedCache(model.config, dtype or model.dtype, len(ids))
    return model.forward(cache, [Span(cache.sequence(), ids, len(ids))])


def test_experts_that_tie_are_taken_by_their_number(build_model: Callable[..., Any], tmp_path: Path) -> None:
    built = build_model("qwen3_moe", 36, num_experts_per_tok=2)
    with torch.no_grad():
        for layer in built.model.layers:
            layer.mlp.gate.weight[:] = layer.mlp.gate.weight[[0, 1, 1, 0, 1, 0]]
    built.save_pretrained(tmp_path)
    ids = tokens(7, 60)
    torchs, ours = (model_rows(load_model(tmp_path, backend=backend), ids) for backend in ("eager", "native"))
    assert (torchs - ours).abs().max() <= 2e-4


def test_logits_stay_what_they_are_when_the_model_runs_again(folders: dict[str, Path]) -> None:
    model = native_model(folders["llama"])
    logits = model_rows(model, [1, 2, 3])
    before = logits.clone()
    model_rows(model, [4, 5, 6])
    assert torch.equal(logits, before)


def test_positions_beyond_the_first_table_of_angles_are_right(build_model: Callable[..., Any], tmp_path: Path) -> None:
    expected_model = build_model("llama", 32, max_position_embeddings=4096)
    expected_model.save_pretrained(tmp_path)
    model, ids = load_model(tmp_path, backend="native"), tokens(4, 2100)
    cache = PagedCache(model.config, "fp32", 2200)
    sequence = cache.sequence()
    pieces = [(0, 1000), (1000, 1020), (1020, 1030), (1030, 2099), (2099, 2100)]
    logits = torch.cat([model.forward(cache, [Span(sequence, ids[a:b], b - a)]) for a, b in pieces])
    assert (logits - oracle(expected_model, ids)).abs().max() <= 2e-4
    assert torch.equal(model_rows(load_model(tmp_path, backend="native"), ids), logits)


SHAPES = [
    (24, 1, 16),  # more heads in a group than a tile has queries
    (40, 2, 16),
    (80, 1, 16),  # more than one call takes
    (4, 4, 80),
    (6, 2, 96),
    (3, 1, 48),
    (5, 5, 32),
    (2, 1, 256),
    (8, 8, 64),
    (14, 2, 128),
]


@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
def test_every_shape_of_attention_is_right_and_has_the_same_bits_in_every_order(
    heads: int, kv_heads: int, head_dim: int, window: int | None, build_model: Callable[..., Any], tmp_path: Path
) -> None:
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    expected_model = build_model("mistral", 33, vocab_size=101, sliding_window=window, **sizes)
    expected_model.save_pretrained(tmp_path)
    ids = tokens(5, vocabulary=101)
    models = [native_model(tmp_path, variant=variant) for variant in ("v3", None)]
    logits = model_rows(models[0], ids)
    assert (logits - oracle(expected_model, ids)).abs().max() <= 2e-4
    assert torch.equal(logits, model_rows(models[1], ids))
    model = models[1]
    cache = PagedCache(model.config, "fp32", 400)
    sequence = cache.sequence()
    rows = [model.forward(cache, [Span(sequence, [token])]) for token in ids[:130]]
    # A tree whose branches are the continuation and strangers.
    tree = [ids[130], 5, ids[131], 6, ids[132]]
    rows.append(model.forward(cache, [Span(sequence, tree, 5, [-1, -1, 0, 1, 2])])[[0, 2, 4]])
    sequence.compact(130, [0, 2, 4])
    rows.append(model.forward(cache, [Span(sequence, ids[133:], len(ids) - 133)]))
    assert torch.equal(torch.cat(rows), logits)


def test_sizes_that_native_code_does_not_take_are_left_to_torch_or_refused_with_the_reason(
    build_model: Callable[..., Any], tmp_path: Path
) -> None:
    build_model("qwen3_moe", 34, head_dim=8, intermediate_size=100, moe_intermediate_size=40).save_pretrained(tmp_path)
    assert load_model(tmp_path).executor.name == "eager"
    reason = "not a multiple of 16: head_dim 8, intermediate_size 100, the experts' intermediate_size 40"
    with pytest.raises(EngineError, match=reason):
        load_model(tmp_path, backend="native")
    with pytest.raises(EngineError, match=reason):
        load_model(tmp_path, dtype="int8")
    build_model("llama", 34, head_dim=272).save_pretrained(tmp_path)
    with pytest.raises(EngineError, match="head_dim 272 is above 256"):
        load_model(tmp_path, backend="native")


def test_int8_is_refused_where_torch_was_asked_for(checkpoint: Path) -> None:
    with pytest.raises(EngineError, match="torch was asked for"):
        load_model(checkpoint, dtype="int8", backend="eager")


@pytest.mark.parametrize("window", [None, 40])
def test_nan_proposals_leave_the_rows_before_and_beside_them_as_they_are(
    window: int | None, build_model: Callable[..., Any], tmp_path: Path
) -> None:
    built = build_model("mistral", 35, sliding_window=window)
    with torch.no_grad():
        built.model.embed_tokens.weight[95] = torch.nan
    built.save_pretrained(tmp_path)
    model, ids = load_model(tmp_path, backend="native", threads=2), [1, *tokens(6, 80, 90)]

    def grown(cache: PagedCache, base: int) -> CachedSequence:
        sequence = cache.sequence()
        model.forward(cache, [Span(sequence, ids[:base], 0)])
        return sequence

    for base in (1, 9, 15, 16, 61, 70):
        plain, cache = (PagedCache(model.config, "fp32", 600) for _ in range(2))
        chain, good = [3, 4, 5, 95, 6, 7], [3, 4, 5]
        expected = model.forward(plain, [Span(grown(plain, base), good, 3)])
        spans = [
            Span(grown(cache, base), chain, 6),
            Span(grown(cache, base), [95, 3, 95, 4, 95, 5, 6], 7, [-1, -1, 1, 1, 0, 3, 2]),
            Span(grown(cache, base), good, 3),
        ]
        logits = model.forward(cache, spans)
        assert torch.equal(logits[:3], expected)
        assert torch.equal(logits[[7, 9, 11]], expected)
        assert torch.equal(logits[13:], expected)
        assert logits.isfinite().all(dim=1).tolist() == [i not in {3, 4, 5, 6, 8, 10, 12} for i in range(16)]
        # The bad ones leave nothing behind.
        spans[0].sequence.truncate(base + 3)
        spans[1].sequence.compact(base, [1, 3, 5])
        after = model.forward(cache, [Span(span.sequence, [8, 9], 2) for span in spans])
        assert torch.equal(after[:2], after[4:])
        assert torch.equal(after[2:4], after[4:])
