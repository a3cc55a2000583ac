"""Seeded sampling: token = argmax over i in S of z_i + T * G(seed, position, i), ties to the lower id.

    words o0..o3 = Philox4x32-10(key = (seed mod 2^32, seed >> 32), counter = (position, i, 0, 0))
    u = (((o0 | o1 << 32) >> 12) + 0.5) / 2^52       in (0, 1)
    E = -log1p(-u),  G = -log(E)                      all in fp64

The noise of a token is a function of (seed, absolute position, token id) and of nothing else, so that neither the batch
nor a restart changes what is sampled. Counter word 2 is the domain: 0 for tokens.

Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, with the constants of Random123.
Gumbel-max: argmax of z/T + G is a draw from softmax(z/T).
"""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Words: TypeAlias = NDArray[np.uint64]
Ids: TypeAlias = NDArray[np.int64]
Reals: TypeAlias = NDArray[np.float64]

DOMAIN_TOKEN = 0
G_MAX = 36.75
"""u >= 2^-53 bounds G from above by 36.7368."""
G_MIN = -3.61
"""u <= 1 - 2^-53 bounds G from below by -3.6043."""

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_WORD = 1 << 32
_CHUNK = 8192  # ids at a time, so that the words stay in the L2 cache


def philox4x32(counter: tuple[Words, Words, Words, Words], key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """Ten rounds of Philox4x32 on 32-bit words held in uint64 arrays that broadcast against each other."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0 = _MULTIPLIERS[0] * c0
        p1 = _MULTIPLIERS[1] * c2
        c0, c1 = (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0), p1 & _MASK
        c2, c3 = (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1), p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) % _WORD, (k1 + _WEYL[1]) % _WORD
    return c0, c1, c2, c3


def gumbel(seed: int, position: int, token_ids: Ids) -> Reals:
    """G(seed, position, i) for each id, shape (n,).

    Raises:
        ValueError: the seed is not in [0, 2^64) or the position not in [0, 2^32).
    """
    if not 0 <= seed < _WORD * _WORD:
        raise ValueError(f"seed {seed} is not an unsigned 64-bit integer")
    if not 0 <= position < _WORD:
        raise ValueError(f"position {position} is not an unsigned 32-bit integer")
    noise = np.empty(token_ids.shape, dtype=np.float64)
    for start in range(0, token_ids.size, _CHUNK):
        part = slice(start, start + _CHUNK)
        noise[part] = _gumbel_chunk(seed, position, token_ids[part])
    return noise


def _gumbel_chunk(seed: int, position: int, token_ids: Ids) -> Reals:
    # The constant words stay arrays of one element: broadcasting then saves most of the first two rounds.
    constant, domain, zero = (np.array([word], dtype=np.uint64) for word in (position, DOMAIN_TOKEN, 0))
    words = philox4x32((constant, token_ids.astype(np.uint64), domain, zero), (seed % _WORD, seed // _WORD))
    bits = (words[0] | words[1] << _SHIFT) >> np.uint64(12)
    u = (bits.astype(np.float64) + 0.5) * 2.0**-52
    return -np.log(-np.log1p(-u))


def allowed(logits: Reals, *, temperature: float, top_k: int, top_p: float) -> Ids:
    """The ids of S in rising order: top-k first, then top-p over softmax(z/T) of what top-k left.

    Args:
        logits: (V,), -inf for tokens ruled out beforehand.
        temperature: above 0.
        top_k: the k largest stay, ties to the lower ids; 0 keeps all.
        top_p: by falling logit, the smallest prefix whose share of the survivors' probability reaches top_p stays, at
            least one token, ties to the lower ids; 1 keeps all.
    """
    kept, size = logits, logits.size
    if 0 < top_k < size:
        kept = np.partition(logits, size - top_k)[size - top_k :]
    elif top_p >= 1:
        return np.flatnonzero(logits > -math.inf)
    falling = np.sort(kept)[::-1]
    count = falling.size if top_p >= 1 else _nucleus(falling, temperature, top_p)
    # Equal logits weigh the same, so the count needs no ids; only the last value may be shared by more tokens than fit.
    last = falling[count - 1]
    if last == -math.inf:
        return np.flatnonzero(logits > -math.inf)
    above = np.flatnonzero(logits > last)
    ties = np.flatnonzero(logits == last)[: count - above.size]
    return np.sort(np.concatenate((above, ties)))


def _nucleus(falling: Reals, temperature: float, top_p: float) -> int:
    with np.errstate(over="ignore", under="ignore"):
        weights = np.exp((falling - falling[0]) / temperature)
    cumulative = np.cumsum(weights)
    return min(int(np.searchsorted(cumulative, top_p * cumulative[-1])) + 1, falling.size)


def perturbed(
    logits: Reals, position: int, *, temperature: float, top_k: int, top_p: float, seed: int
) -> tuple[Ids, Reals]:
    """(ids of S in rising order, their scores z + T*G); at temperature 0 the scores are the logits."""
    ids = allowed(logits, temperature=temperature or 1.0, top_k=top_k, top_p=top_p)
    return ids, _scores(logits, ids, position, temperature, seed)


def sample(logits: Reals, position: int, *, temperature: float, top_k: int, top_p: float, seed: int) -> int:
    """The token at ``position``; at temperature 0 the largest logit, ties to the lower id.

    Only tokens that can still win get noise. One that even G_MAX leaves below the largest logit with G_MIN cannot win,
    and floating-point rounding is monotonic, so that leaving it out changes no result.
    """
    best = int(np.argmax(logits))
    if temperature == 0:
        return best
    hopeful = logits + temperature * G_MAX >= float(logits[best]) + temperature * G_MIN
    if top_k or top_p < 1:
        ids = allowed(logits, temperature=temperature, top_k=top_k, top_p=top_p)
        ids = ids[hopeful[ids]]
    else:
        ids = np.flatnonzero(hopeful)
    if ids.size == 1:
        return int(ids[0])
    return int(ids[np.argmax(_scores(logits, ids, position, temperature, seed))])


def _scores(logits: Reals, ids: Ids, position: int, temperature: float, seed: int) -> Reals:
    if temperature == 0:
        return logits[ids]
    with np.errstate(over="ignore"):
        return logits[ids] + temperature * gumbel(seed, position, ids)
