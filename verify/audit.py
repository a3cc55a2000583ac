"""The audit of one receipt, level by level.

    form           signed by a trusted key, logged, and not nonsense        TrustRules.form
    count          the disclosed answer is the one signed and billed        ReceiptVerifier.count
    tokens         each token is what the reference weights sample          difr
    activations    what it was sampled from is what they give               activations
    meaning        hidden tokens read like reasoning for the answer         coin.level

A level stands on others, so asking for one runs these too. A level that fails ends the audit. One that cannot be
checked does not: what comes after it is still worth knowing, but the verdict is then inconclusive at best. The
activations need an answer of the provider's to a challenge, and are checked where there is one. The meaning is triage
for answers whose tokens could not be checked: it never fails, and where the tokens have passed its doubts do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal, get_args

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from countersign.verify.coin.bill import Bill
from countersign.verify.coin.bill import check as check_bill
from countersign.verify.coin.counting import Drawn, counted
from countersign.verify.errors import NotCheckable, Untrusted, VerificationError
from countersign.verify.receipt import Openings, PartialOpenings, Receipt, ReceiptVerifier, SignedReceipt, parse
from countersign.verify.trust import Trusted, TrustPolicy, TrustRules

if TYPE_CHECKING:
    from countersign.verify.difr import Kept, Reference, TokenScore
    from countersign.verify.fingerprints import Challenge

Level = Literal["form", "count", "tokens", "activations", "meaning"]
Outcome = Literal["pass", "fail", "inconclusive"]
Dtype = Literal["fp32", "bf16"]
LEVELS: tuple[Level, ...] = get_args(Level)
_STANDS_ON: Mapping[Level, tuple[Level, ...]] = {
    "form": (),
    "count": ("form",),
    "tokens": ("form", "count"),
    "activations": ("form", "count"),
    "meaning": ("form", "count"),
}

_OPEN_HIDDEN = (
    "have some drawn and opened (--open-hidden) to count them; only an auditor to whom all are opened can check them"
)
_SEVERITY: tuple[Outcome, ...] = ("pass", "inconclusive", "fail")


@dataclass(frozen=True, slots=True)
class LevelReport:
    """How one level ended: a sentence for people, figures by name, and what to do where it could not be checked."""

    level: Level
    outcome: Outcome
    summary: str
    figures: Mapping[str, float] = field(default_factory=dict)
    help: str = ""


@dataclass(frozen=True, slots=True)
class AuditReport:
    """The verdict is the worst of the levels. ``receipt`` is what was read, if it could be read; ``scores`` what the
    reference says of each output token, if it was asked.
    """

    verdict: Outcome
    levels: tuple[LevelReport, ...]
    receipt: SignedReceipt | None = None
    scores: tuple[TokenScore, ...] = ()


def audit(
    data: bytes,
    *,
    trusted_keys: Iterable[Ed25519PublicKey] = (),
    policy: TrustPolicy | None = None,
    reference: Callable[[Dtype], Reference] | None,
    levels: Collection[Level] = (),
    challenge: Challenge | None = None,
    drawn: Drawn | None = None,
    bill: Bill | None = None,
) -> AuditReport:
    """Audits a receipt; never raises for what the bytes hold.

    Args:
        data: The receipt with or without openings.
        trusted_keys: Keys whose signature counts. Without any, the form level is inconclusive.
        policy: In place of ``trusted_keys`` where logs, witnesses or clocks count too.
        reference: Gives the reference model in the dtype that the receipt declares; called only for tokens and
            activations. May raise NotCheckable.
        levels: The levels asked for; those that they stand on run too. None: all for which everything is given, meaning
            only where tokens are hidden.
        challenge: The positions that were drawn once the receipt was there, and the provider's fingerprints of them.
        drawn: Hidden tokens that were drawn likewise, for the count level of a receipt that does not open them.
        bill: What was charged for; the count level compares it.
    """
    everything = not levels
    levels = levels or [level for level in LEVELS if challenge is not None or level != "activations"]
    auditor = _Audit(data, policy or TrustPolicy(tuple(trusted_keys)), reference, challenge, drawn, bill)
    reports: list[LevelReport] = []
    for level in (one for one in LEVELS if any(one in (asked, *_STANDS_ON[asked]) for asked in levels)):
        if level == "meaning" and everything and not auditor.hides:
            continue
        reports.append(_outcome_of(level, auditor))
        if reports[-1].outcome == "fail":
            break
    return AuditReport(_verdict(reports), tuple(reports), auditor.signed, auditor.scores)


def _verdict(reports: Sequence[LevelReport]) -> Outcome:
    """The worst of the levels. What the tokens level has passed is the model's own, whatever it means."""
    settled = any(report.level == "tokens" and report.outcome == "pass" for report in reports)
    deciding = [report.outcome for report in reports if report.level != "meaning" or not settled]
    return max(deciding, key=_SEVERITY.index)


def _outcome_of(level: Level, auditor: _Audit) -> LevelReport:
    run = {
        "form": auditor.form,
        "count": auditor.count,
        "tokens": auditor.tokens,
        "activations": auditor.activations,
        "meaning": auditor.meaning,
    }
    try:
        return run[level]()
    except NotCheckable as error:
        return LevelReport(level, "inconclusive", str(error), help=error.help)
    except ModuleNotFoundError as error:
        missing = f"this level needs {error.name}, which is not installed here"
        return LevelReport(
            level, "inconclusive", missing, help="install the rest with: pip install 'countersign[stack]'"
        )
    except Untrusted as error:
        advice = (
            "if it comes from another deployment, name its public key (--key FILE) or data folder (--data-dir FOLDER)"
        )
        return LevelReport(level, "fail", str(error), help=advice)
    except VerificationError as error:
        return LevelReport(level, "fail", str(error))


class _Audit:
    """What the levels hand on to each other."""

    def __init__(
        self,
        data: bytes,
        policy: TrustPolicy,
        reference: Callable[[Dtype], Reference] | None,
        challenge: Challenge | None,
        drawn: Drawn | None,
        bill: Bill | None,
    ) -> None:
        self._data = data
        self._policy = policy
        self._reference = reference
        self._challenge = challenge
        self._kept: Kept | None = None
        self._drawn = drawn
        self._bill = bill
        self._openings: Openings | None = None
        self.signed: SignedReceipt | None = None
        self.scores: tuple[TokenScore, ...] = ()

    def form(self) -> LevelReport:
        self.signed = parse(self._data)
        trusted = TrustRules(self._policy).form(self._data)
        self.signed = trusted.signed
        return LevelReport("form", "pass", _praise_form(trusted))

    def count(self) -> LevelReport:
        if self.signed is None:
            raise NotCheckable("the receipt was not read")
        if self._bill is not None:
            check_bill(self.signed.receipt, self._bill)  # the counts are signed, whether the tokens are opened or not
        opened = ReceiptVerifier(()).count(self.signed)
        if isinstance(opened, PartialOpenings):
            return _partly_counted(self.signed, self._drawn)
        self._openings = opened
        prompt, output = len(opened.prompt_token_ids), len(opened.output_token_ids)
        figures = {
            "prompt_tokens": float(prompt),
            "output_tokens": float(output),
            "hidden_tokens": float(self.signed.receipt.output.hidden),
        }
        return LevelReport(
            "count", "pass", f"the {output} tokens disclosed for a prompt of {prompt} are those signed for", figures
        )

    def _material(self) -> tuple[Receipt, Openings, Reference]:
        """What a comparison with the reference model takes. Raises NotCheckable when something is missing."""
        receipt, openings, reference = self._opened()
        policy = receipt.evidence.kv_policy
        if policy != "exact":
            raise NotCheckable(
                f"not auditable at this level: the receipt says that KV may have been stored as {policy}",
                help="ask for answers of a target with target.kv_wire=exact where tokens are to be audited",
            )
        return receipt, openings, reference()

    def _opened(self) -> tuple[Receipt, Openings, Callable[[], Reference]]:
        """The opened answer, and what loads the reference for it. Raises NotCheckable when one is missing."""
        if self.signed is None or self._openings is None:
            hidden = self.signed is not None and self.signed.openings is not None
            raise NotCheckable(
                "hidden tokens are not disclosed, and every later token depends on them"
                if hidden
                else "the tokens are not disclosed, so there is nothing to compare",
                help=_OPEN_HIDDEN if hidden else "",
            )
        if self._reference is None:
            raise NotCheckable(
                "no reference model to compare with", help="name the folder of its weights (--model FOLDER)"
            )
        return self.signed.receipt, self._openings, partial(self._reference, self.signed.receipt.model.dtype)

    def tokens(self) -> LevelReport:
        receipt, openings, reference = self._material()
        from countersign.verify.difr import Kept, audit_tokens  # torch takes seconds to import; only here it is needed

        if self._challenge is not None:
            self._kept = Kept(self._challenge.positions)
        report = audit_tokens(reference, receipt, openings, kept=self._kept)
        self.scores = report.scores
        if report.failures:
            return LevelReport("tokens", "fail", "; ".join(report.failures), report.figures)
        notes = "".join(f"; not checked: {note}" for note in report.unchecked)
        if report.outcome == "inconclusive":
            needed, size = report.figures["tokens_needed"], report.figures["sample_size"]
            why, advice = f"it takes {needed:.0f} to say more", "audit longer answers, or several"
            if size >= needed:
                why = f"nobody has measured what honest answers by {report.arithmetic} score here"
                advice = "calibrate the reference (countersign calibrate), or ask for answers of an arithmetic that is"
            why = f"nothing is wrong with the {size:.0f} tokens, but {why}"
            return LevelReport("tokens", "inconclusive", why + notes, report.figures, advice)
        return LevelReport("tokens", "pass", f"{_praise(report.figures)} ({report.source}){notes}", report.figures)

    def activations(self) -> LevelReport:
        if self._challenge is None:
            raise NotCheckable(
                "no fingerprint of the provider was opened",
                help="draw positions, ask the provider to open them, and audit with its answer",
            )
        receipt, openings, reference = self._material()
        from countersign.verify.activations import audit_activations

        report = audit_activations(reference, receipt, openings, self._challenge, self._kept)
        figures = report.figures
        if report.failures:
            return LevelReport("activations", "fail", "; ".join(report.failures), figures)
        size, needed = figures["sample_size"], figures["positions_needed"]
        if report.outcome == "inconclusive":
            why = f"nothing is wrong with the {size:.0f} fingerprints, but it takes {needed:.0f} to say more"
            return LevelReport("activations", "inconclusive", why, figures, "ask for more positions")
        praise = (
            f"{size:.0f} fingerprints drawn after the signature are the reference's, largest distance "
            f"{figures['max_distance']:.2g}, limit {figures['tolerance']:.2g} ({report.source})"
        )
        return LevelReport("activations", "pass", praise, figures)

    @property
    def hides(self) -> bool:
        """There are hidden tokens, as far as was read."""
        return self.signed is not None and self.signed.receipt.output.hidden > 0

    def meaning(self) -> LevelReport:
        receipt, openings, reference = self._opened()
        from countersign.verify.coin.level import audit_meaning

        report = audit_meaning(reference(), receipt, openings)
        if report.doubts:
            return LevelReport("meaning", "inconclusive", "; ".join(report.doubts), report.figures, "look closer")
        hidden = receipt.output.hidden
        praise = f"the {hidden} hidden tokens read like reasoning for this answer" if hidden else "nothing is hidden"
        praise += f", {report.figures['excess_tokens']:.0f} tokens more than the text needs"
        return LevelReport("meaning", "pass", praise, report.figures)


def _partly_counted(signed: SignedReceipt, drawn: Drawn | None) -> LevelReport:
    """The visible tokens are the signed ones; that there are tokens behind the hidden leaves only a draw can show."""
    request, output = signed.receipt.request, signed.receipt.output
    figures = {
        "prompt_tokens": float(request.prompt_tokens),
        "output_tokens": float(output.tokens),
        "visible_tokens": float(output.visible),
        "hidden_tokens": float(output.hidden),
    }
    seen = f"the {output.visible} visible tokens and the prompt are those signed for"
    if drawn is None:
        summary = f"{seen}; {output.hidden} hidden tokens are signed for too, but nobody has counted them here"
        return LevelReport("count", "inconclusive", summary, figures, _OPEN_HIDDEN)
    count = counted(signed, drawn)
    figures |= {"opened_leaves": float(count.opened), "power": count.power}
    summary = (
        f"{seen}; of {output.hidden} hidden leaves {count.opened} drawn ones hold tokens, which would have met a "
        f"quarter of empty ones with a chance of {count.power:.1%}"
    )
    if count.enough:
        return LevelReport("count", "pass", summary, figures)
    return LevelReport("count", "inconclusive", summary, figures, "have more leaves opened")


def _praise_form(trusted: Trusted) -> str:
    parts = [f"signed by trusted key {trusted.signed.key_id.hex()[:16]}, well formed and without contradiction"]
    parts += [f"entry {part.index} of {part.size} of {part.origin}" for part in trusted.included]
    if trusted.witnesses:
        parts.append(f"seen by {trusted.witnesses} witness{'es' if trusted.witnesses > 1 else ''}")
    return "; ".join((*parts, *(f"not checked: {note}" for note in trusted.unchecked)))


def _praise(figures: Mapping[str, float]) -> str:
    matches, size = figures["exact_matches"], figures["sample_size"]
    mean, limit = figures["mean_score"], figures["mean_threshold"]
    return (
        f"{matches:.0f} of {size:.0f} tokens are the reference's own choice, mean score {mean:.4f}, limit {limit:.3g}"
    )
