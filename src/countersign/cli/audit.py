"""``countersign audit RECEIPT`` and ``countersign receipt show RECEIPT``."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from countersign.cli.generate import ROUTER_VARIABLE
from countersign.cli.provider import Provider
from countersign.services.runtime.errors import CountersignError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from rich.console import Console

    from countersign.services.engine.text import Tokenizer
    from countersign.services.runtime.config import Config
    from countersign.verify.audit import AuditReport, Dtype, LevelReport
    from countersign.verify.coin.counting import Drawn
    from countersign.verify.difr import Reference
    from countersign.verify.fingerprints import Challenge
    from countersign.verify.receipt import SignedReceipt
    from countersign.verify.trust import TrustPolicy

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
EXIT_CODES = {"pass": 0, "fail": 1, "inconclusive": 2}
_STYLES = {"pass": "green", "fail": "red", "inconclusive": "yellow"}
_WORDS = {"pass": "PASS", "fail": "FAIL", "inconclusive": "NOT CHECKABLE"}


class LevelName(StrEnum):
    FORM = "form"
    COUNT = "count"
    TOKENS = "tokens"
    ACTIVATIONS = "activations"
    MEANING = "meaning"


class _Unreadable(Exception):
    """A file that was named cannot be used, so nothing can be said about the receipt."""


ReceiptArgument = Annotated[Path, typer.Argument(help="File with a signed receipt.", metavar="RECEIPT")]


def audit(
    receipt: ReceiptArgument,
    *,
    key: Annotated[
        list[Path] | None,
        typer.Option(
            help="Public key to trust (PEM, raw or hex); the stack's own by default. Repeatable.", metavar="FILE"
        ),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Folder of the reference weights; the demo target by default.", metavar="FOLDER")
    ] = None,
    level: Annotated[
        list[LevelName] | None,
        typer.Option(help="Check up to this level; by default all that the file is enough for. Repeatable."),
    ] = None,
    positions: Annotated[
        int, typer.Option(help="Fingerprints that level activations asks the provider for.", min=1, max=512)
    ] = 32,
    billed: Annotated[
        int | None, typer.Option(help="Output tokens that you are charged for; must be the receipt's.", min=0)
    ] = None,
    open_hidden: Annotated[
        bool, typer.Option("--open-hidden", help="Draw hidden tokens and have the provider open them, to count them.")
    ] = False,
    router: Annotated[
        str, typer.Option(help="Address of the router to ask.", metavar="HOST:PORT", envvar=ROUTER_VARIABLE)
    ] = "",
    log_key: Annotated[
        list[str] | None,
        typer.Option(help="Log that the receipt must be in (name+hash+base64). Repeatable.", metavar="KEY"),
    ] = None,
    witness_key: Annotated[
        list[str] | None,
        typer.Option(help="Witness to trust (name+hash+base64). Repeatable.", metavar="KEY"),
    ] = None,
    quorum: Annotated[int, typer.Option(min=0, help="Witnesses that must have cosigned the log's checkpoint.")] = 0,
    arithmetic: Annotated[
        list[str] | None,
        typer.Option(help='How the provider has agreed to compute, such as "native fp32". Repeatable.', metavar="NAME"),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with the levels and every token's score.", metavar="FILE")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Data folder of the stack that signed (.countersign).", metavar="FOLDER")
    ] = None,
) -> None:
    """Check a receipt: signature, counts, every token. Exits 0 if it holds, 1 if not, 2 if that cannot be checked."""
    try:
        data = _read(receipt)
        asked = LevelName.ACTIVATIONS in (level or ())
        provider = Provider(data, router, data_dir)
        challenge = provider.challenge(positions) if asked else None
        drawn = provider.drawn() if open_hidden else None
        config = _config(data_dir)
        policy = _policy(_trusted_keys(key, config), log_key or (), witness_key or (), quorum, arithmetic or ())
        references = _References(model or config.auditor.model)
        report = provider.explained(_report(data, challenge, drawn, billed, policy, references, level))
        if html is not None:
            _write_page(html, receipt.name, report, references)
    except _Unreadable as error:
        if json_:
            print(json.dumps({"verdict": "inconclusive", "levels": [], "error": str(error)}))
        else:
            print(f"countersign: {error}", file=sys.stderr)
        raise typer.Exit(EXIT_CODES["inconclusive"]) from None
    if json_:
        print(json.dumps({"verdict": report.verdict, "levels": [dataclasses.asdict(part) for part in report.levels]}))
    else:
        _print_report(receipt, report)
    raise typer.Exit(EXIT_CODES[report.verdict])


def show(
    receipt: ReceiptArgument,
    *,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print what a receipt claims, without checking any of it."""
    from countersign.verify.errors import VerificationError
    from countersign.verify.receipt import parse

    try:
        claims = _claims(parse(_read(receipt)))
    except _Unreadable as error:
        print(f"countersign: {error}", file=sys.stderr)
        raise typer.Exit(EXIT_CODES["inconclusive"]) from None
    except VerificationError as error:
        print(f"countersign: {receipt} is no receipt: {error}", file=sys.stderr)
        raise typer.Exit(EXIT_CODES["fail"]) from None
    if json_:
        print(json.dumps(claims))
        return
    print(f"UNVERIFIED: this is what the file claims; check it with: countersign audit {receipt}")
    for line in _lines(claims, 0):
        print(line)


def _report(
    data: bytes,
    challenge: Challenge | None,
    drawn: Drawn | None,
    billed: int | None,
    policy: TrustPolicy,
    references: _References,
    level: Sequence[LevelName] | None,
) -> AuditReport:
    from countersign.verify.audit import audit
    from countersign.verify.coin.bill import Bill

    return audit(
        data,
        policy=policy,
        reference=references.load,
        levels=[name.value for name in level or ()],
        challenge=challenge,
        drawn=drawn,
        bill=None if billed is None else Bill(billed),
    )


class _References:
    """Loads the reference model at most once, for the audit and for the texts of its page."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._loaded: Reference | None = None

    def load(self, dtype: Dtype) -> Reference:
        from countersign.verify.difr import load_reference  # torch takes seconds to import; few levels need it

        if self._loaded is None:
            self._loaded = load_reference(self._folder, dtype)
        return self._loaded

    @property
    def tokenizer(self) -> Tokenizer | None:
        """That of the model, if the audit has loaded one."""
        return None if self._loaded is None else self._loaded.tokenizer


def _policy(
    keys: Sequence[Ed25519PublicKey],
    log_keys: Sequence[str],
    witness_keys: Sequence[str],
    quorum: int,
    arithmetics: Sequence[str],
) -> TrustPolicy:
    from countersign.verify.errors import VerificationError
    from countersign.verify.log.checkpoint import KeyKind, NoteKey
    from countersign.verify.trust import TrustPolicy

    found: dict[KeyKind, list[NoteKey]] = {KeyKind.LOG: [], KeyKind.WITNESS: []}
    for kind, texts in ((KeyKind.LOG, log_keys), (KeyKind.WITNESS, witness_keys)):
        for text in texts:
            try:
                note_key = NoteKey.parse(text)
            except VerificationError as error:
                raise _Unreadable(str(error)) from error
            if note_key.kind != kind:
                raise _Unreadable(f"{text} is the key of a {note_key.kind.name.lower()}, not of a {kind.name.lower()}")
            found[kind].append(note_key)
    if quorum > len(found[KeyKind.WITNESS]):
        raise _Unreadable(f"a quorum of {quorum} takes as many witnesses: name them with --witness-key")
    return TrustPolicy(
        receipt_keys=tuple(keys),
        logs=tuple(found[KeyKind.LOG]),
        witnesses=tuple(found[KeyKind.WITNESS]),
        quorum=quorum,
        logged=bool(log_keys),
        now_unix_ms=time.time_ns() // 1_000_000,
        arithmetics=tuple(arithmetics),
    )


def _write_page(file: Path, name: str, report: AuditReport, references: _References) -> None:
    from countersign.cli.page import answer_of, page
    from countersign.files import write_atomically

    content = page(report, answer_of(report, references.tokenizer), name)
    try:
        write_atomically(file, content.encode(errors="replace"))
    except OSError as error:
        raise _Unreadable(f"{file} cannot be written: {error.strerror}") from error


def _config(data_dir: Path | None) -> Config:
    from countersign.services.runtime.config import load

    try:
        return load(None, os.environ, [] if data_dir is None else [f"data_dir={data_dir}"])
    except CountersignError as error:
        raise _Unreadable(str(error)) from error


def _trusted_keys(files: list[Path] | None, config: Config) -> list[Ed25519PublicKey]:
    """The keys named, else the one of the stack whose data folder this is, else none."""
    from countersign.verify.errors import KeyFileError
    from countersign.verify.keys import load_public

    default = config.data_dir / "keys" / "receipts.pub"
    try:
        return [load_public(file) for file in files or ([default] if default.exists() else [])]
    except KeyFileError as error:
        raise _Unreadable(str(error)) from error


def _read(path: Path) -> bytes:
    """The file's bytes, at most one more than a receipt may have: the verifier then says that it is too large."""
    from countersign.verify.receipt import MAX_RECEIPT_BYTES

    try:
        with path.open("rb") as file:
            return file.read(MAX_RECEIPT_BYTES + 1)
    except OSError as error:
        raise _Unreadable(f"{path} cannot be read: {error.strerror}") from error


def _print_report(path: Path, report: AuditReport) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    if report.receipt is None:
        console.print(str(path), markup=False, soft_wrap=True)
    else:
        receipt = report.receipt.receipt
        request, output = receipt.request, receipt.output
        what = f"{receipt.request_id}: {receipt.model.name} in {receipt.model.dtype}"
        counts = (
            f"{request.prompt_tokens} prompt tokens, {output.tokens} output tokens, ended by {output.finish_reason}"
        )
        console.print(f"{what}, {counts}", markup=False, soft_wrap=True)
    _print_levels(console, report.levels)
    verdict = Text(_WORDS[report.verdict], f"bold {_STYLES[report.verdict]}")
    console.print(verdict, Text(_conclusion(report)), soft_wrap=True)


def _print_levels(console: Console, levels: Sequence[LevelReport]) -> None:
    """A table that fits the terminal; a line for each level where a program may read it."""
    from rich.table import Table
    from rich.text import Text

    if not console.is_terminal:
        names = max(len(level.level) for level in levels)
        words = max(len(_WORDS[level.outcome]) for level in levels)
        for level in levels:
            print(f"{level.level:<{names}}  {_WORDS[level.outcome]:<{words}}  {level.summary}")
        return
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    for level in levels:
        table.add_row(level.level, Text(_WORDS[level.outcome], _STYLES[level.outcome]), Text(level.summary))
    console.print(table)


def _conclusion(report: AuditReport) -> str:
    if report.verdict == "fail" and report.receipt is None:
        return "this is no receipt, or it was damaged."
    if report.verdict == "fail" and report.levels[-1].help:
        return f"nobody who is trusted here has signed it: {report.levels[-1].help}."
    if report.verdict == "fail":
        return "the receipt or its answer is not what it claims to be. Keep the file: it is the evidence."
    if report.verdict == "inconclusive":
        open_levels = [level for level in report.levels if level.outcome == "inconclusive"]
        advice = "; ".join(dict.fromkeys(level.help for level in open_levels if level.help))
        return "nothing wrong was found, but not everything could be checked" + (f": {advice}." if advice else ".")
    checked = ", ".join(level.level for level in report.levels)
    if not any(level.level in ("tokens", "activations") for level in report.levels):
        return f"the receipt holds as far as it was checked ({checked})."
    return "the answer is what the reference weights give for the signed request."


def _claims(signed: SignedReceipt) -> dict[str, Any]:
    """All that a receipt says, as JSON can hold it: bytes as hex."""
    opened = signed.openings
    claims = {
        "verified": False,
        "signer": signed.key_id,
        "digest": signed.digest,
        "receipt": dataclasses.asdict(signed.receipt),
        "openings": None if opened is None else dataclasses.asdict(opened),
    }
    plain: dict[str, Any] = json.loads(json.dumps(claims, default=bytes.hex))
    return plain


def _lines(value: dict[str, Any], depth: int) -> Iterator[str]:
    for name, part in value.items():
        indent = "  " * depth + name
        if isinstance(part, dict):
            yield indent
            yield from _lines(part, depth + 1)
        elif name.endswith("_unix_ms"):
            yield f"{indent:<28}{(_EPOCH + timedelta(milliseconds=part)).isoformat(timespec='milliseconds')}"
        else:
            yield f"{indent:<28}{part if isinstance(part, str) and part.isprintable() else json.dumps(part)}"
