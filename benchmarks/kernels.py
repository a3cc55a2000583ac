"""The Triton kernels on a GPU, beside torch and the device's limits. Without one: their errors at tiny sizes, no speed.

Runs with torch, Triton, NumPy and safetensors alone: ``PYTHONPATH=src python benchmarks/kernels.py --json [--quick]``.
Times are of CUDA events, medians; the L2 cache is written over before each call.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from countersign.kernels import attention, merge
from countersign.kernels.fingerprint import fingerprint, projection
from countersign.kernels.matmul_invariant import matmul_invariant
from countersign.kernels.sample_rows import Rule, sample_rows

if TYPE_CHECKING:
    from countersign.cli.bench import Row

Figure: TypeAlias = dict[str, str | float | bool]
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
HEADS, KV_HEADS, DIM, LEAF = 32, 8, 128, 1024


async def run(quick: bool) -> list[Row]:
    """See :func:`figures`."""
    from countersign.cli.bench import Row

    return [Row(**figure) for figure in figures(quick)]  # type: ignore[arg-type]  # the keys are Row's


def figures(quick: bool) -> list[Figure]:
    """The rows as plain objects."""
    if not ON_GPU:
        os.environ["TRITON_INTERPRET"] = "1"
        found = errors()
    else:
        repeats = 10 if quick else 50
        found = [*prefill(repeats), *decode(repeats), *others(repeats)]
    case = torch.cuda.get_device_name() if ON_GPU else "no GPU: tiny shapes in Triton's interpreter, no speed"
    return [{"bench": "kernels", "case": case, **figure} for figure in found]


def errors() -> list[Figure]:
    """The largest error of each kernel beside its reference, fp32."""
    q, k, v = normal(40, 4, 64), normal(1, 64, 2, 64), normal(1, 64, 2, 64)
    layout, size = attention.Layout.dense(1, 40, 64, causal=True)
    paged = attention.pages(k, v, size)
    outs = [attention.attend(q, *paged, layout, scale=0.125, backend=one)[0] for one in ("reference", "triton")]
    partials = normal(5, 7, 2, 64), normal(5, 7, 2)
    merged = [merge.tree(*partials, backend=one)[0] for one in ("reference", "triton")]
    x, w, basis = normal(9, 96), normal(33, 96), projection(1, 96, 8)
    products = [matmul_invariant(x, w, backend=one) for one in ("reference", "triton")]
    prints = [fingerprint(x, basis, backend=one) for one in ("reference", "triton")]
    rules = [Rule(position, 0.8, seed=position) for position in range(8)]
    tokens = [sample_rows(normal(8, 3000), rules, backend=one) for one in ("reference", "triton")]
    pairs = {"attention": outs, "merge": merged, "matmul_invariant": products, "fingerprint": prints}
    found = [
        figure(f"{name}: largest error beside its reference", float((a - b).abs().max()), "", "<= 2e-6 of the largest",
               bool((a - b).abs().max() <= 2e-6 * a.abs().max().clamp_min(1)))
        for name, (a, b) in pairs.items()
    ]  # fmt: skip
    same = bool((tokens[0] == tokens[1]).all())
    return [*found, figure("sample_rows: tokens as the reference's", float(same), "share", "= 1", same)]


def prefill(repeats: int) -> list[Figure]:
    """Attention of 16 k tokens, bf16, beside the best of torch's own."""
    found = []
    tokens = 16384
    q, k, v = (normal(1, tokens, HEADS, DIM).bfloat16() for _ in range(3))
    for causal, bar in ((False, 550), (True, 480)):
        layout, size = attention.Layout.dense(1, tokens, tokens, causal=causal, device=DEVICE)
        keys, values = attention.pages(k, v, size)
        operations = 4 * tokens * tokens * HEADS * DIM / (2 if causal else 1)
        ours = timed(partial(attention.attend, q[0], keys, values, layout, scale=DIM**-0.5, out_dtype=q.dtype), repeats)
        best = min(
            filter(None, (sdpa(q, k, v, causal, backend, repeats) for backend in SDPBackend.__members__.values()))
        )
        name, speed = f"prefill of 16 k, {'causal' if causal else 'not causal'}", operations / ours / 1e12
        found += [
            figure(name, speed, "TFLOP/s", f">= {bar}", speed >= bar),
            figure(f"{name}, beside torch's best", best / ours, "x", ">= 0.9", best / ours >= 0.9),
        ]
    return found


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, backend: SDPBackend, repeats: int) -> float | None:
    """Seconds of torch's attention by one of its ways; None where it has not that one."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    try:
        with sdpa_kernel(backend):
            return timed(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal), repeats)
    except RuntimeError:
        return None


def decode(repeats: int) -> list[Figure]:
    """One row after 32 k tokens by leaves, merge included, as a share of copy bandwidth."""
    batch, tokens = 8, 32768
    k, v = (normal(batch, tokens, KV_HEADS, DIM).bfloat16() for _ in range(2))
    q = normal(batch, HEADS, DIM).bfloat16()
    layout, size = attention.Layout.dense(batch, 1, tokens, causal=True, device=DEVICE)
    paged = attention.pages(k, v, size)

    def step() -> None:
        merge.tree(*attention.attend(q, *paged, layout, scale=DIM**-0.5, leaf=LEAF))

    share = (k.nbytes + v.nbytes) / timed(step, repeats) / bandwidth(repeats)
    return [
        figure(
            "split decode of 8 rows at 32 k, merge included / copy bandwidth", share, "share", ">= 0.8", share >= 0.8
        )
    ]


def others(repeats: int) -> list[Figure]:
    """Sampling beside a plain argmax, the fingerprint beside a step's weights, the product beside torch's."""
    logits = normal(64, 131072)
    rules = [Rule(1000 + row, 1.0, seed=row) for row in range(64)]
    sampling = timed(partial(sample_rows, logits, rules), repeats) / timed(partial(logits.argmax, 1), repeats)
    hidden, basis = normal(64, 4096).bfloat16(), projection(1, 4096, 64).to(DEVICE)
    step = 16e9 / bandwidth(repeats)  # 8 B weights in bf16, read once
    share = timed(partial(fingerprint, hidden, basis), repeats) / step
    found = [
        figure("sampling of 64 rows of 128 k beside argmax", sampling, "x", "<= 2", sampling <= 2),
        figure("fingerprint of 64 rows beside a decode step of 8 B", share, "share", "<= 0.01", share <= 0.01),
    ]
    for rows in (1, 8, 64, 4096):
        x, w = normal(rows, 4096).bfloat16(), normal(14336, 4096).bfloat16()
        ours, theirs = timed(partial(matmul_invariant, x, w), repeats), timed(partial(F.linear, x, w), repeats)
        found.append(figure(f"matmul_invariant, {rows} rows, 4096 to 14336, beside torch", theirs / ours, "x"))
    return found


def figure(metric: str, value: float, unit: str, bar: str = "", met: bool = False) -> Figure:
    found: Figure = {"metric": metric, "value": value, "unit": unit, "n": 1}
    if bar:
        found |= {"bar": bar, "met": bool(met)}
    return found


def bandwidth(repeats: int) -> float:
    """Bytes a second that a copy on the device reads and writes."""
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timed(lambda: target.copy_(source), repeats)


def timed(work: Callable[[], object], repeats: int) -> float:
    """Median seconds, the L2 cache cold."""
    flush = torch.empty(2**28, dtype=torch.uint8, device=DEVICE)
    for _ in range(3):
        work()
    times: list[float] = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(len(shape)), device=DEVICE)


def main(arguments: Sequence[str]) -> None:
    """Prints JSON lines."""
    for row in figures("--quick" in arguments):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
