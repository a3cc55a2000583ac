"""The page of an audit: complete in itself, and safe whatever a receipt or a model wrote."""

from __future__ import annotations

import dataclasses
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from countersign.cli.audit import audit as command
from countersign.cli.page import MAX_SHOWN, Answer, Piece, answer_of, band, page
from countersign.verify.audit import AuditReport, LevelReport, audit
from countersign.verify.difr import Reference, TokenScore, load_reference
from countersign.verify.keys import write_public
from countersign.verify.payload import Segment
from countersign.verify.receipt import HiddenMarkers, Openings, attach, parse, sign, strip, withheld
from countersign.verify.testing import (
    SALT_KEY,
    Asked,
    example_receipt,
    generate,
    model_of,
    signing_key,
    write_tiny_model,
)

KEYS = [signing_key().public_key()]
PROMPT = tuple(range(60, 70))
HOSTILE = '" onmouseover="alert(1)" x="><script>alert(1)</script><img src=x onerror=alert(1)>\u202e'


class Reader(HTMLParser):
    """What a browser would see: elements, their attributes, and the tooltips and classes of tokens."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    @property
    def tokens(self) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.elements if tag == "span" and "data-tip" in attributes]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return load_reference(write_tiny_model(tmp_path_factory.mktemp("model")), "fp32")


def report_on(reference: Reference, *, forged: bool = False) -> AuditReport:
    output = generate(reference, PROMPT, Asked(), 12)
    if forged:
        output[3] = (output[3] + 1) % 256
    receipt = example_receipt(PROMPT, output, model=model_of(reference), asked=Asked())
    return audit(sign(*receipt, signing_key()), trusted_keys=KEYS, reference=lambda _: reference)


def written(report: AuditReport, reference: Reference | None = None, name: str = "a.receipt") -> str:
    return page(report, answer_of(report, None if reference is None else reference.tokenizer), name)


def test_every_token_has_its_position_score_and_rank(reference: Reference) -> None:
    report = report_on(reference)
    tokens = Reader(written(report, reference)).tokens
    assert [token["data-tip"].split(",")[0] for token in tokens] == [f"token {index}" for index in range(12)]
    assert all("score 0, rank 0" in token["data-tip"] for token in tokens)
    assert {token["class"] for token in tokens} == {"t exact"}


def test_a_forged_token_stands_out_and_names_what_the_reference_samples(reference: Reference) -> None:
    report = report_on(reference, forged=True)
    tokens = Reader(written(report, reference)).tokens
    assert tokens[3]["class"] in ("t far", "t wild", "t outside")
    assert "the reference samples" in tokens[3]["data-tip"]
    assert tokens[0]["class"] == "t exact"
    assert "FAIL: a.receipt" in written(report, reference)


def test_a_page_loads_nothing_and_runs_nothing(reference: Reference) -> None:
    text = written(report_on(reference), reference)
    reader = Reader(text)
    policies = [a["content"] for tag, a in reader.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert {tag for tag, _ in reader.elements}.isdisjoint({"script", "link", "img", "iframe", "object", "form", "a"})
    assert {name for _, a in reader.elements for name in a}.isdisjoint({"src", "href", "srcset", "action"})
    for outside in ("http:", "https:", "//", "url(", "@import"):
        assert outside not in text


def test_hostile_names_and_tokens_stay_text(reference: Reference) -> None:
    receipt, openings = example_receipt()
    receipt = dataclasses.replace(receipt, model=dataclasses.replace(receipt.model, name=HOSTILE))
    report = audit(sign(receipt, openings, signing_key()), trusted_keys=KEYS, reference=None)
    report = dataclasses.replace(
        report, levels=(*report.levels, LevelReport("tokens", "fail", HOSTILE, {HOSTILE: 1.0}))
    )
    score = TokenScore(1, 2, 0.3, 4)
    pieces = tuple(Piece(index, 7, HOSTILE + "\x1b[2J", False, score, HOSTILE) for index in range(3))
    reader = Reader(page(report, Answer(HOSTILE, pieces), HOSTILE))
    assert {tag for tag, _ in reader.elements}.isdisjoint({"script", "img"})
    assert {name for tag, a in reader.elements if tag == "span" for name in a} == {"class", "tabindex", "data-tip"}
    assert len(reader.tokens) == 3
    assert "\x1b" not in page(report, Answer(HOSTILE, pieces), HOSTILE)


def test_hidden_tokens_are_a_number_unless_they_are_opened() -> None:
    receipt, openings = example_receipt(output=(9, 8, 1, 70, 71, 72, 2, 7), hidden=HiddenMarkers(1, 2))
    full = sign(receipt, openings, signing_key())
    client = attach(strip(full), withheld(receipt, openings))
    for data, shown in ((full, 8), (client, 3)):
        text = written(audit(data, trusted_keys=KEYS, reference=None))
        tokens = Reader(text).tokens
        assert len(tokens) == shown
        assert ("5 hidden tokens" in text) == (shown == 3)
        assert sum("hidden" in token["class"].split() for token in tokens) == shown - 3
        assert tokens[-1]["data-tip"].startswith("token 7, id 7")


def test_claims_and_openings_of_any_size_give_a_page_of_bounded_size() -> None:
    receipt, _ = example_receipt()
    claimed = dataclasses.replace(
        receipt.output, tokens=2**32 - 1, visible=2**32 - 1, segments=(Segment("visible", 2**32 - 1),)
    )
    many = Openings(SALT_KEY, tuple(range(100_000)), tuple(range(100_000)))
    signed = dataclasses.replace(
        parse(sign(*example_receipt(), signing_key())),
        receipt=dataclasses.replace(receipt, output=claimed),
        openings=many,
    )
    text = written(AuditReport("fail", (), signed))
    assert len(Reader(text).tokens) == MAX_SHOWN
    assert f"only the first {MAX_SHOWN} tokens" in text


def test_a_receipt_that_discloses_nothing_or_cannot_be_read_has_a_page_too() -> None:
    bare = audit(strip(sign(*example_receipt(), signing_key())), trusted_keys=KEYS, reference=None)
    assert "The tokens are not disclosed" in written(bare)
    broken = audit(b"nonsense", trusted_keys=KEYS, reference=None)
    assert "It could not be read" in written(broken)


@pytest.mark.parametrize(
    ("score", "kind"),
    [(None, "unknown"), (0.0, "exact"), (0.1, "near"), (0.2, "far"), (1.01, "wild"), (math.inf, "outside")],
)
def test_a_score_has_the_colour_of_its_band(score: float | None, kind: str) -> None:
    assert band(score, 0.1) == kind


def test_the_command_writes_the_page_and_says_where_it_cannot(reference: Reference, tmp_path: Path) -> None:
    receipt, key, target = tmp_path / "a.receipt", tmp_path / "a.pub", tmp_path / "a.html"
    receipt.write_bytes(sign(*example_receipt(), signing_key()))
    write_public(key, signing_key().public_key())
    app = typer.Typer()
    app.command()(command)
    words = [str(receipt), "--key", str(key), "--level", "count", "--data-dir", str(tmp_path), "--html"]
    assert CliRunner().invoke(app, [*words, str(target)]).exit_code == 0
    assert "PASS: a.receipt" in target.read_text()
    refused = CliRunner().invoke(app, [*words, str(tmp_path / "none" / "a.html")])
    assert refused.exit_code == 2
    assert "cannot be written" in refused.output
