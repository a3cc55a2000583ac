"""TOPLOC (arXiv 2501.16007), written from its paper, to stand beside our fingerprints; and what it costs.

Of each 32 tokens' states, one after another in bf16, the 128 numbers of largest magnitude become a polynomial over
the integers modulo a prime:

    P(i mod m) = bits of the number at place i, for the 128 places i

m is the largest modulus under which the places stay apart. The proof is m and the 128 coefficients, 2 bytes each: 258
bytes. Who verifies takes the 128 largest of its own states, evaluates P at their places and compares: at how many of
them the exponents agree, and by how much the mantissas differ where they do. A place that the prover did not have gives
a random number, whose exponent seldom agrees.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from countersign.cli.bench import Row

CHUNK = 32
LARGEST = 128
PRIME = 65497
PROOF_BYTES = 2 * (1 + LARGEST)
MANTISSA = 128
"""Values of a bf16 mantissa; a place whose exponent disagrees counts as so much of a difference in :func:`score`."""

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Proof:
    """``coefficients`` (128): of x^0, x^1, ..."""

    modulus: int
    coefficients: Ints

    def encode(self) -> bytes:
        """258 bytes, little-endian."""
        return np.array([self.modulus, *self.coefficients.tolist()], dtype="<u2").tobytes()

    @staticmethod
    def decode(data: bytes) -> Proof:
        """What ``encode`` wrote. Raises ValueError for another size or a modulus of 0."""
        numbers = np.frombuffer(data[: len(data) // 2 * 2], dtype="<u2").astype(np.int64)
        if len(data) != PROOF_BYTES or numbers[0] == 0:
            raise ValueError(f"a proof has {PROOF_BYTES} bytes and a modulus, not {len(data)}")
        return Proof(int(numbers[0]), numbers[1:])


@dataclass(frozen=True, slots=True)
class Comparison:
    """Of 128 places those whose exponents agree; mean and median difference of mantissas there, infinite for none."""

    exponents: int
    mean: float
    median: float

    @property
    def passes(self) -> bool:
        """The thresholds of the authors' experiments."""
        return self.exponents >= 90 and self.mean <= 10 and self.median <= 8


def prove(states: Tensor) -> Proof:
    """The proof of a chunk of states (T, hidden)."""
    places, values = largest(states)
    modulus = apart(places)
    return Proof(modulus, interpolate(places % modulus, values % PRIME))


def compare(proof: Proof, states: Tensor) -> Comparison:
    """The proof against one's own states of the same tokens."""
    same, differences = _differences(proof, states)
    if not same:
        return Comparison(0, float("inf"), float("inf"))
    return Comparison(same, float(differences.mean()), float(np.median(differences)))


def score(proof: Proof, states: Tensor) -> float:
    """One number for a curve: the mean difference over all 128 places, ``MANTISSA`` where exponents disagree."""
    same, differences = _differences(proof, states)
    return float(differences.sum() + MANTISSA * (LARGEST - same)) / LARGEST


def largest(states: Tensor) -> tuple[Ints, Ints]:
    """Places of the 128 largest magnitudes in the flat states, ties to the lower, and their bf16 bits."""
    flat = states.to(torch.bfloat16).flatten()
    order = torch.sort(flat.float().abs(), descending=True, stable=True).indices[:LARGEST]
    bits = flat[order].view(torch.int16).numpy().astype(np.int64) % (1 << 16)
    return order.numpy().astype(np.int64), bits


def apart(places: Ints) -> int:
    """The largest modulus up to the prime under which the places stay apart."""
    return next(m for m in range(PRIME, LARGEST - 1, -1) if len(np.unique(places % m)) == len(places))


def interpolate(x: Ints, y: Ints) -> Ints:
    """Coefficients of the polynomial of degree below len(x) through (x, y), modulo the prime; the x are different."""
    newton, inverses = y.copy(), _inverses()
    for step in range(1, len(x)):
        change = (newton[step:] - newton[step - 1 : -1]) % PRIME
        newton[step:] = change * inverses[(x[step:] - x[:-step]) % PRIME] % PRIME
    coefficients = np.zeros(len(x), dtype=np.int64)
    for at in range(len(x) - 1, -1, -1):
        shifted = np.concatenate([[0], coefficients[:-1]])
        coefficients = (shifted - x[at] * coefficients) % PRIME
        coefficients[0] = (coefficients[0] + newton[at]) % PRIME
    return coefficients


def evaluate(coefficients: Ints, x: Ints) -> Ints:
    """The polynomial at each x, modulo the prime."""
    value = np.zeros_like(x)
    for coefficient in coefficients[::-1]:
        value = (value * x + coefficient) % PRIME
    return value


def _differences(proof: Proof, states: Tensor) -> tuple[int, Ints]:
    """At how many places the exponents (and signs) agree, and the mantissas' differences there."""
    places, own = largest(states)
    claimed = evaluate(proof.coefficients, places % proof.modulus)
    agree = claimed // MANTISSA == (own % PRIME) // MANTISSA
    return int(agree.sum()), np.abs(claimed - own % PRIME)[agree]


@functools.cache
def _inverses() -> Ints:
    """Of 0 .. prime - 1, by inverse(a) = -(p div a) inverse(p mod a); 0 has none."""
    found = [0, 1]
    for number in range(2, PRIME):
        found.append((PRIME - PRIME // number) * found[PRIME % number] % PRIME)
    return np.array(found, dtype=np.int64)


async def run(quick: bool) -> list[Row]:
    """Bytes and time of a proof over states of 4,096 numbers."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(CHUNK, 4096, generator=generator)
    proof, turns = prove(states), 5 if quick else 50
    return [
        Row("toploc", "a proof", "bytes a token", PROOF_BYTES / CHUNK, "B", 1),
        Row("toploc", "a chunk of 32 tokens", "to prove", _milliseconds(lambda: prove(states), turns), "ms", turns),
        Row(
            "toploc", "a chunk of 32 tokens", "to compare", _milliseconds(lambda: compare(proof, states), turns), "ms",
            turns,
        ),
    ]  # fmt: skip


def _milliseconds(action: Callable[[], object], turns: int) -> float:
    times = []
    for _ in range(turns):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times))
