"""An audit as one HTML page: what was found, what the receipt says, and the answer with each token's score.

The page loads nothing, runs nothing, and its own policy forbids both. Whatever a receipt or a model wrote is escaped,
control characters become pictures, and each token keeps its reading direction to itself.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from html import escape
from importlib import resources
from itertools import islice
from typing import TYPE_CHECKING

from countersign.cli.printable import PICTURES
from countersign.verify.partial import PartialOpenings

if TYPE_CHECKING:
    from countersign.services.engine.text import Tokenizer
    from countersign.verify.audit import AuditReport
    from countersign.verify.difr import TokenScore
    from countersign.verify.receipt import Receipt

MAX_SHOWN = 20_000
"""Most tokens of an answer, and of a prompt, that a page holds."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_WORDS = {"pass": "PASS", "fail": "FAIL", "inconclusive": "NOT CHECKABLE"}
_BANDS = {
    "exact": "the reference samples it too",
    "near": "the reference samples another, within what arithmetic explains",
    "far": "the reference samples another, by more than arithmetic explains",
    "wild": "the reference samples another, by more than ten times what arithmetic explains",
    "outside": "could not have been drawn at all",
    "unknown": "not scored",
}


@dataclass(frozen=True, slots=True)
class Piece:
    """One output token as it is shown. ``choice`` is the text of what the reference samples."""

    index: int
    token_id: int
    text: str
    hidden: bool = False
    score: TokenScore | None = None
    choice: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What is disclosed of prompt and output. A number among the pieces is that of hidden tokens nobody opened."""

    prompt: str
    pieces: tuple[Piece | int, ...]


def answer_of(report: AuditReport, tokenizer: Tokenizer | None) -> Answer | None:
    """The disclosed tokens with their text, ids in brackets where there is no tokenizer; None if none is disclosed."""
    if report.receipt is None or report.receipt.openings is None:
        return None
    opened = report.receipt.openings
    partly = isinstance(opened, PartialOpenings)
    ids = (opened.leaves.token_ids if isinstance(opened, PartialOpenings) else opened.output_token_ids)[:MAX_SHOWN]
    texts = _texts(ids, opened.prompt_token_ids, tokenizer)
    tokens = zip(ids, texts, strict=True)
    pieces: list[Piece | int] = []
    index = 0
    for segment in report.receipt.receipt.output.segments:
        hidden = segment.kind == "hidden"
        if hidden and partly:
            pieces.append(segment.tokens)
        else:
            for place, (token, text) in enumerate(islice(tokens, segment.tokens), index):
                score = report.scores[place] if place < len(report.scores) else None
                pieces.append(Piece(place, token, text, hidden, score, _choice(score, tokenizer)))
        index += segment.tokens
    return Answer("".join(_texts(opened.prompt_token_ids[-MAX_SHOWN:], (), tokenizer)), tuple(pieces))


def page(report: AuditReport, answer: Answer | None, name: str) -> str:
    """The whole page. ``name`` is what the receipt is called here, such as its file."""
    title = f"{_WORDS[report.verdict]}: {name}"
    style = resources.files("countersign.cli").joinpath("page.css").read_text()
    body = "".join(
        (
            f'<h1><span class="verdict {report.verdict}">{_WORDS[report.verdict]}</span> {_text(name)}</h1>',
            _levels(report),
            _answer(answer, _tolerance(report)),
            _facts(report),
        )
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{style}</style></head><body><main>{body}</main></body></html>\n"
    )


def band(score: float | None, tolerance: float) -> str:
    """Which colour a score has: a key of the legend."""
    if score is None:
        return "unknown"
    if score == 0:
        return "exact"
    if math.isinf(score):
        return "outside"
    return "near" if score <= tolerance else "far" if score <= 10 * tolerance else "wild"


def _band(piece: Piece, tolerance: float) -> str:
    return band(None if piece.score is None else piece.score.score, tolerance)


def _levels(report: AuditReport) -> str:
    rows = "".join(
        f'<tr><th scope="row">{level.level}</th><td class="verdict {level.outcome}">{_WORDS[level.outcome]}</td>'
        f"<td>{_text(level.summary)}{_advice(level.help)}{_figures(level.figures)}</td></tr>"
        for level in report.levels
    )
    return f'<section><h2>Levels</h2><table class="levels">{rows}</table></section>'


def _advice(text: str) -> str:
    return f'<p class="note">{_text(text)}</p>' if text else ""


def _figures(figures: Mapping[str, float]) -> str:
    if not figures:
        return ""
    rows = "".join(f"<dt>{_text(name.replace('_', ' '))}</dt><dd>{value:.6g}</dd>" for name, value in figures.items())
    return f"<details><summary>figures</summary><dl>{rows}</dl></details>"


def _answer(answer: Answer | None, tolerance: float) -> str:
    if answer is None:
        return '<section><h2>Answer</h2><p class="note">The tokens are not disclosed.</p></section>'
    pieces = "".join(_spans(answer.pieces, tolerance))
    return (
        f'<section><h2>Answer</h2>{_legend(answer.pieces, tolerance)}<div class="text">{pieces}</div>'
        f'<details><summary>prompt</summary><div class="text">{_text(answer.prompt)}</div></details></section>'
    )


def _spans(pieces: Sequence[Piece | int], tolerance: float) -> Iterator[str]:
    for piece in pieces:
        if isinstance(piece, int):
            yield f'<span class="gap">{piece} hidden token{"s" if piece > 1 else ""}</span>'
        else:
            kind = _band(piece, tolerance) + (" hidden" if piece.hidden else "")
            yield f'<span class="t {kind}" tabindex="0" data-tip="{_text(_tip(piece))}">{_shown(piece.text)}</span>'
    if sum(isinstance(piece, Piece) for piece in pieces) >= MAX_SHOWN:
        yield f'<span class="gap">only the first {MAX_SHOWN} tokens are shown</span>'


def _tip(piece: Piece) -> str:
    first = f"token {piece.index}, id {piece.token_id}" + (", hidden from the client" if piece.hidden else "")
    if piece.score is None:
        return first
    score = "out of support" if math.isinf(piece.score.score) else f"score {piece.score.score:.4g}"
    lines = [first, f"{score}, rank {piece.score.rank}"]
    if piece.score.choice != piece.token_id:
        lines.append(f"the reference samples {piece.choice!r} ({piece.score.choice})")
    return "\n".join(lines)


def _legend(pieces: Sequence[Piece | int], tolerance: float) -> str:
    counts = Counter(_band(piece, tolerance) for piece in pieces if isinstance(piece, Piece))
    items = "".join(
        f'<li><span class="t {kind}">{counts[kind]}</span> {meaning}</li>'
        for kind, meaning in _BANDS.items()
        if counts[kind]
    )
    note = f"Scores are margins in logits; what arithmetic explains is at most {tolerance:g}."
    return f'<ul class="legend">{items}</ul><p class="note">{note}</p>'


def _facts(report: AuditReport) -> str:
    if report.receipt is None:
        return '<section><h2>Receipt</h2><p class="note">It could not be read.</p></section>'
    signed = report.receipt
    rows = [*_claims(signed.receipt), ("signed by", f"ed25519:{signed.key_id.hex()}"), ("digest", signed.digest.hex())]
    body = "".join(f'<tr><th scope="row">{name}</th><td>{_text(value)}</td></tr>' for name, value in rows)
    return f'<section><h2>Receipt</h2><table class="facts">{body}</table></section>'


def _claims(receipt: Receipt) -> list[tuple[str, str]]:
    model, request, output, evidence, usage = (
        receipt.model, receipt.request, receipt.output, receipt.evidence, receipt.usage,
    )  # fmt: skip
    drawn = (
        "greedy"
        if request.temperature == 0
        else (
            f"temperature {request.temperature:g}, top-k {request.top_k}, top-p {request.top_p:g}, "
            f"seed {request.seed} ({request.seed_source}), coupling {request.coupling}"
        )
    )
    hidden = f", {output.hidden} of them hidden" if output.hidden else ""
    speed = f"{evidence.drafted} drafted, {evidence.accepted} accepted, {evidence.passes} passes"
    return [
        ("request", receipt.request_id),
        ("model", f"{model.name}, {model.dtype}, {model.numerics}, {model.build}"),
        ("weights", model.weights.hex()),
        ("sampling", drawn),
        (
            "tokens",
            f"{request.prompt_tokens} of prompt, {output.tokens} of output{hidden}; ended by {output.finish_reason}",
        ),
        ("drafting", f"{evidence.drafting}: {speed}"),
        ("prompt cache", f"{evidence.cached_prompt_tokens} tokens; KV kept as {evidence.kv_policy}"),
        ("output root", output.root.hex()),
        ("opened", _time(request.opened_unix_ms)),
        ("computed", f"{_time(usage.started_unix_ms)} to {_time(usage.finished_unix_ms)}"),
    ]


def _tolerance(report: AuditReport) -> float:
    return next((level.figures.get("tolerance", 0.0) for level in report.levels if level.level == "tokens"), 0.0)


def _texts(ids: Sequence[int], before: Sequence[int], tokenizer: Tokenizer | None) -> list[str]:
    """One text for each id; that of a character lies with the token that completes it."""
    if tokenizer is None:
        return [f"[{token}]" for token in ids]
    return tokenizer.decode_pieces(before[-8:], ids, final=True)


def _choice(score: TokenScore | None, tokenizer: Tokenizer | None) -> str:
    return "" if score is None or tokenizer is None else tokenizer.decode([score.choice])


def _time(unix_ms: int) -> str:
    return (_EPOCH + timedelta(milliseconds=unix_ms)).isoformat(sep=" ", timespec="milliseconds")


def _text(text: str) -> str:
    return escape(text.translate(PICTURES), quote=True)


def _shown(text: str) -> str:
    """Line feeds are seen where they are tokens of their own."""
    return _text(text).replace("\n", "<i>↵</i>\n") or "<i>∅</i>"
