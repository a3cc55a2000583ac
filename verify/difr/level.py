"""The token level of one receipt: the right reference, the scores, the verdict, and where the answer ends."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from countersign.services.engine.errors import EngineError
from countersign.services.engine.model import Backend, Model, load_model
from countersign.services.engine.sampling import Sampling
from countersign.services.engine.text import StopMatcher, Tokenizer
from countersign.verify.arithmetic import Arithmetic, arithmetic_of
from countersign.verify.difr import profile as profiles
from countersign.verify.difr.profile import Profile
from countersign.verify.difr.scores import Kept, TokenScore, score_tokens
from countersign.verify.difr.verdict import THRESHOLDS, Power, Thresholds, judge
from countersign.verify.errors import KeyFileError, NotCheckable, VerificationError
from countersign.verify.keys import load_public
from countersign.verify.receipt import Openings, Receipt

CONTEXT = 8
"""Tokens before an open one that its text may depend on."""


@dataclass(frozen=True, slots=True)
class Reference:
    """What answers are measured against. Without a tokenizer stop strings are not checked; without a profile
    thresholds are reasoned ones.
    """

    model: Model
    tokenizer: Tokenizer | None = None
    profile: Profile | None = None

    @property
    def arithmetic(self) -> Arithmetic:
        """How it computes."""
        return Arithmetic("fp32" if self.model.dtype == "fp32" else "bf16", self.model.executor.name)


@dataclass(frozen=True, slots=True)
class TokenReport:
    """What the level found: how it ended, why the answer is refused (nothing if it is not), what was not checked, the
    figures, where the thresholds come from, what the reference says of each token, and what the receipt says computed
    them.
    """

    outcome: Literal["pass", "fail", "inconclusive"]
    failures: tuple[str, ...]
    unchecked: tuple[str, ...]
    figures: dict[str, float]
    source: str = ""
    scores: tuple[TokenScore, ...] = ()
    arithmetic: str = ""


def load_reference(folder: Path, dtype: Literal["fp32", "bf16"], backend: Backend = "auto") -> Reference:
    """The reference in a Hugging Face folder, with the profile that lies there, if one does.

    Raises:
        NotCheckable: the folder holds no model that this release can run, or a profile that is not of this model, not
            signed by the key beside it, or no profile at all.
    """
    try:
        model, tokenizer = load_model(folder, dtype=dtype, backend=backend), Tokenizer(folder)
    except (EngineError, OSError) as error:
        raise NotCheckable(
            f"the reference model in {folder} cannot be loaded: {error}",
            help="name the folder of its weights (--model FOLDER)",
        ) from error
    return Reference(model, tokenizer, _profile_in(folder, model))


def _profile_in(folder: Path, model: Model) -> Profile | None:
    file = folder / profiles.FILE
    if not file.exists():
        return None
    try:
        profile = profiles.verify(file.read_bytes(), [load_public(folder / profiles.KEY_FILE)])
        profiles.check_model(profile, model.digests.weights, model.digests.config, model.digests.tokenizer)
    except (VerificationError, KeyFileError, OSError) as error:
        raise NotCheckable(
            f"the calibration in {file} cannot be used: {error}",
            help=f"make it again (countersign calibrate --model {folder}), or remove it for reasoned thresholds",
        ) from error
    return profile


def audit_tokens(
    reference: Reference,
    receipt: Receipt,
    openings: Openings,
    power: Power = Power(),  # noqa: B008  it is frozen
    kept: Kept | None = None,
) -> TokenReport:
    """The token level for a receipt whose openings were found to be the signed ones. ``kept``: see ``score_tokens``.

    Raises:
        NotCheckable: other weights, another coupling, no output, or a text too long for the reference.
    """
    check_comparable(reference, receipt)
    config, request = reference.model.config, receipt.request
    prompt, output = openings.prompt_token_ids, openings.output_token_ids
    foreign = [token for token in (*prompt, *output) if token >= config.vocabulary_size]
    if foreign:
        failure = f"{len(foreign)} token ids are outside the vocabulary"
        return TokenReport("fail", (failure,), (), {"sample_size": len(output)})
    thresholds = thresholds_of(reference, receipt)
    try:
        sampling = Sampling(request.temperature, request.top_k, request.top_p, request.seed or 0)
        scores = score_tokens(reference.model, prompt, output, sampling, thresholds.slack, kept)
    except EngineError as error:
        raise NotCheckable(f"the reference cannot compute this text: {error}") from error
    verdict = judge([token.score for token in scores], thresholds, power)
    failures, unchecked = verdict.failures, list[str]()
    if openings.stop and reference.tokenizer is None:
        unchecked.append("where the answer ends, which needs a tokenizer for its stop strings")
    else:
        failures += finish_failures(reference, receipt, openings)
    outcome = "fail" if failures else verdict.outcome
    computed_by = str(arithmetic_of(receipt))
    return TokenReport(
        outcome, failures, tuple(unchecked), verdict.figures, thresholds.source, tuple(scores), computed_by
    )


def thresholds_of(reference: Reference, receipt: Receipt) -> Thresholds:
    """Those of the reference's profile for what the receipt says computed it, else the reasoned ones of its dtype."""
    if reference.profile is not None:
        try:
            return reference.profile.thresholds(arithmetic_of(receipt), reference.arithmetic)
        except NotCheckable:
            pass  # an arithmetic that nobody has calibrated
    return THRESHOLDS[receipt.model.dtype]


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


def check_comparable(reference: Reference, receipt: Receipt) -> None:
    """Raises NotCheckable: other weights, another coupling, no output, or a text too long for the reference."""
    if receipt.request.coupling != "gumbel":
        raise NotCheckable("not auditable at this level: the answer was not coupled to the noise")
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
    check_length(reference, receipt)


def check_length(reference: Reference, receipt: Receipt) -> None:
    """Raises NotCheckable: no answer of the reference is as long, and neither should its audit be."""
    total = receipt.request.prompt_tokens + receipt.output.tokens
    if total > reference.model.config.context_length:
        raise NotCheckable("the text is longer than the reference's context", tokens=total)
