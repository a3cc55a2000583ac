"""Token-DiFR: is every token the one that the reference weights sample with this seed? (arXiv 2511.20621)

One teacher-forced pass gives the reference's logits z for each output position, over the claimed prefix. With S the set
that top-k and top-p leave, T the temperature and G the request's Gumbel noise at that absolute position, the claimed
token c has

    score = max over i in S of (z_i + T G_i)  -  (z_c + T G_c)

0 when the reference samples c too, small when two arithmetics disagree about a near tie, large when c came from
elsewhere. A c outside S has no score and is counted apart. At T = 0 the score is max z - z_c.

This needs the coupling of the answer to the noise: under standard rejection sampling an honest answer scores badly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from countersign.services.engine.errors import EngineError
from countersign.services.engine.kv import PagedCache
from countersign.services.engine.model import Model, Span, load_model
from countersign.services.engine.sampling import Sampling, perturbed
from countersign.services.engine.text import StopMatcher, Tokenizer
from countersign.verify.errors import NotCheckable
from countersign.verify.receipt import Openings, Receipt

CHUNK = 256
"""Most rows of logits at once: 256 x 151936 in fp32 are 156 MB."""

CONTEXT = 8
"""Tokens before an open one that its text may depend on."""

CLIP = 0.5
"""Scores are clipped here before the mean, so that one wild token does not hide the rest (DiFR's own value)."""

SIGNIFICANCE = 1e-3
"""Chance that an honest answer, wrong at exactly the allowed rate, is refused by one of the two counts."""


@dataclass(frozen=True, slots=True)
class Thresholds:
    """When to refuse, in units of logits.

    Attributes:
        tolerance: A score above this exceeds what the arithmetic explains.
        rate: Share of tokens that may exceed it, and share that may be out of support. At 0 one token is enough to
            refuse; otherwise the count must be improbable at this rate (binomial tail below ``SIGNIFICANCE``).
        mean: Highest mean of clipped scores. It finds many small deviations, the counts find few large ones.
    """

    tolerance: float
    rate: float
    mean: float


THRESHOLDS: dict[Literal["fp32", "bf16"], Thresholds] = {
    # The same weights in fp32 on other batches or machines differ by about 1e-5, a hundredth of this.
    "fp32": Thresholds(tolerance=1e-3, rate=0.0, mean=2e-4),
    # bf16 carries 8 bits: honest providers match more than 98 % of tokens (DiFR, abstract), the rest are near ties.
    "bf16": Thresholds(tolerance=0.25, rate=0.01, mean=0.02),
}
"""By the dtype that the receipt declares. Set by reasoning, not yet calibrated on pools of honest deployments."""


@dataclass(frozen=True, slots=True)
class Reference:
    """What answers are measured against. Without a tokenizer stop strings are not checked."""

    model: Model
    tokenizer: Tokenizer | None = None


@dataclass(frozen=True, slots=True)
class TokenReport:
    """What the level found: why the answer is refused (nothing if it is not), what was not checked, the figures."""

    failures: tuple[str, ...]
    unchecked: tuple[str, ...]
    figures: dict[str, float]


def load_reference(folder: Path, dtype: Literal["fp32", "bf16"]) -> Reference:
    """The reference in a Hugging Face folder.

    Raises:
        NotCheckable: the folder holds no model that this release can run.
    """
    try:
        return Reference(load_model(folder, dtype=dtype), Tokenizer(folder))
    except (EngineError, OSError) as error:
        raise NotCheckable(
            f"the reference model in {folder} cannot be loaded: {error}",
            help="name the folder of its weights (--model FOLDER)",
        ) from error


def audit_tokens(reference: Reference, receipt: Receipt, openings: Openings) -> TokenReport:
    """The token level for a receipt whose openings were found to be the signed ones.

    Raises:
        NotCheckable: other weights, another coupling, no output, or a text too long for the reference.
    """
    _check_comparable(reference, receipt)
    config, request = reference.model.config, receipt.request
    prompt, output = openings.prompt_token_ids, openings.output_token_ids
    foreign = [token for token in (*prompt, *output) if token >= config.vocabulary_size]
    if foreign:
        return TokenReport((f"{len(foreign)} token ids are outside the vocabulary",), (), {"sample_size": len(output)})
    try:
        sampling = Sampling(request.temperature, request.top_k, request.top_p, request.seed or 0)
        scores = token_scores(reference.model, prompt, output, sampling)
    except EngineError as error:
        raise NotCheckable(f"the reference cannot compute this text: {error}") from error
    refusals, figures = judge(scores, THRESHOLDS[receipt.model.dtype])
    if openings.stop and reference.tokenizer is None:
        return TokenReport(refusals, ("where the answer ends, which needs a tokenizer for its stop strings",), figures)
    return TokenReport((*refusals, *finish_failures(reference, receipt, openings)), (), figures)


def token_scores(model: Model, prompt: Sequence[int], output: Sequence[int], sampling: Sampling) -> list[float]:
    """The score of each output token, in logits; infinite where the token is out of support."""
    rows = teacher_forced(model, [*prompt, *output[:-1]], len(output))
    return [
        _score(row, len(prompt) + i, token, sampling) for i, (row, token) in enumerate(zip(rows, output, strict=True))
    ]


def teacher_forced(model: Model, token_ids: Sequence[int], wanted: int) -> Iterator[torch.Tensor]:
    """The logits (vocabulary,) fp32 after each of the last ``wanted`` tokens, in chunks of at most ``CHUNK`` rows."""
    cache = PagedCache(model.config, model.dtype, tokens=len(token_ids))
    sequence = cache.sequence()
    first = len(token_ids) - wanted
    for start in range(0, len(token_ids), CHUNK):
        chunk = token_ids[start : start + CHUNK]
        rows = min(len(chunk), max(0, start + len(chunk) - first))
        yield from model.forward(cache, [Span(sequence, chunk, rows)])


def judge(scores: Sequence[float], thresholds: Thresholds) -> tuple[tuple[str, ...], dict[str, float]]:
    """Why these scores are refused, and the figures. ``scores`` must not be empty."""
    size = len(scores)
    supported = [score for score in scores if math.isfinite(score)]
    outside = size - len(supported)
    exceeding = sum(score > thresholds.tolerance for score in supported)
    mean = sum(min(score, CLIP) for score in scores) / size
    figures = {
        "sample_size": float(size),
        "exact_matches": float(sum(score == 0 for score in scores)),
        "mean_score": mean,
        "max_score": max(supported, default=0.0),
        "exceedances": float(exceeding),
        "out_of_support": float(outside),
        "tolerance": thresholds.tolerance,
        "mean_threshold": thresholds.mean,
    }
    found = (
        (too_many(outside, size, thresholds.rate), f"{outside} of {size} tokens could not have been drawn at all"),
        (
            too_many(exceeding, size, thresholds.rate),
            f"{exceeding} of {size} tokens lose against the reference's choice by more than {thresholds.tolerance:g}",
        ),
        (mean > thresholds.mean, f"the mean score {mean:.4f} is above {thresholds.mean:g}"),
    )
    return tuple(message for refused, message in found if refused), figures


def too_many(count: int, size: int, rate: float) -> bool:
    """Whether ``count`` of ``size`` is more than ``rate`` explains: any at rate 0, else by the binomial tail."""
    if count == 0 or rate == 0:
        return count > 0
    return binomial_tail(count, size, rate) < SIGNIFICANCE


def binomial_tail(count: int, size: int, rate: float) -> float:
    """The chance of ``count`` or more among ``size`` when each happens with chance ``rate`` (0 < rate < 1)."""

    def log_chance(k: int) -> float:
        ways = math.lgamma(size + 1) - math.lgamma(k + 1) - math.lgamma(size - k + 1)
        return ways + k * math.log(rate) + (size - k) * math.log1p(-rate)

    return math.fsum(math.exp(log_chance(k)) for k in range(count, size + 1))


def stop_string_position(tokenizer: Tokenizer, openings: Openings) -> int | None:
    """The index of the output token with which the first stop string is complete.

    Token by token, as the answer was made: a character that is still open does not count before it is complete.
    """
    matcher = StopMatcher(openings.stop)
    context: tuple[int, ...] = openings.prompt_token_ids[-CONTEXT:]
    pending: tuple[int, ...] = ()
    for index, token in enumerate(openings.output_token_ids):
        pending = (*pending, token)
        pieces = tokenizer.decode_pieces(context, pending, final=False)
        context, pending = (*context, *pending[: len(pieces)])[-CONTEXT:], pending[len(pieces) :]
        if any(matcher.feed(piece).stopped for piece in pieces):
            return index
    return None


def finish_failures(reference: Reference, receipt: Receipt, openings: Openings) -> tuple[str, ...]:
    """What contradicts the finish reason. A deadline or the client may end an answer anywhere; a stop always does."""
    request, output = receipt.request, openings.output_token_ids
    stop_tokens = set(request.stop_token_ids)
    if not request.ignore_eos:
        stop_tokens |= reference.model.config.end_token_ids
    ends = [i for i, token in enumerate(output) if token in stop_tokens]
    if openings.stop and reference.tokenizer is not None:
        ends += [at for at in (stop_string_position(reference.tokenizer, openings),) if at is not None]
    last, reason = len(output) - 1, receipt.output.finish_reason
    found = (
        (any(end < last for end in ends), "the output goes on after it should have stopped"),
        (reason == "stop" and last not in ends, 'it ended by "stop" without a stop token or a stop string'),
        (reason == "length" and last in ends, 'it ended by "length" with a stop token or a stop string'),
    )
    return tuple(message for wrong, message in found if wrong)


def _score(row: torch.Tensor, position: int, token: int, sampling: Sampling) -> float:
    # Greedy choice takes the largest logit of all, so top-k and top-p rule nothing out.
    allowed, scores = perturbed(row, position, sampling if sampling.temperature else Sampling())
    own = scores[allowed == token]
    return float(scores.max() - own[0]) if len(own) else math.inf


def _check_comparable(reference: Reference, receipt: Receipt) -> None:
    if receipt.request.coupling != "gumbel":
        raise NotCheckable("the answer was not coupled to the noise, so its tokens cannot be derived again")
    claimed, digests = receipt.model, reference.model.digests
    for name, wanted, found in (
        ("weights", claimed.weights, digests.weights),
        ("config", claimed.config, digests.config),
        ("tokenizer", claimed.tokenizer, digests.tokenizer),
    ):
        if wanted != found:
            raise NotCheckable(
                f"the reference is another model than the receipt's: the digests of its {name} differ",
                help="name the folder of the weights that the receipt wants (--model FOLDER)",
                wanted=wanted,
                found=found,
            )
    if receipt.output.tokens == 0:
        raise NotCheckable("there is no output token to check")
    total = receipt.request.prompt_tokens + receipt.output.tokens
    if total > reference.model.config.context_length:
        raise NotCheckable("the text is longer than the reference's context", tokens=total)
