"""``countersign calibrate`` on a small model, and what the audit makes of its profile."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from countersign.cli.calibrate import calibrate
from countersign.services.runtime.errors import FailedPrecondition, InvalidArgument
from countersign.verify.difr import audit_tokens, load_reference
from countersign.verify.difr import profile as profiles
from countersign.verify.errors import NotCheckable
from countersign.verify.keys import load_or_create_signing_key, write_public
from countersign.verify.testing import Asked, example_receipt, generate, model_of, write_tiny_model

PROMPT = tuple(range(60, 90))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model")


def run(model: Path, tmp_path: Path, *words: str) -> dict[str, object]:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("def one(\n\ndef two(\n")
    app = typer.Typer()
    app.command()(calibrate)
    options = ["--model", str(model), "--key", str(tmp_path / "a.key"), "--prompts", str(prompts), "--tokens", "12"]
    result = CliRunner().invoke(app, [*options, "--json", *words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    found: dict[str, object] = json.loads(result.stdout)
    return found


def test_a_profile_is_made_signed_and_used_by_the_audit(model: Path, tmp_path: Path) -> None:
    told = run(model, tmp_path, "--tokens", "100")
    entries = told["entries"]
    assert isinstance(entries, list)
    assert {(entry["provider"], entry["reference"]) for entry in entries} >= {("eager fp32", "eager fp32")}
    reference = load_reference(model, "fp32")
    assert reference.profile is not None
    claimed = dataclasses.replace(model_of(reference), build="countersign/0 eager torch/0")
    output = generate(reference, PROMPT, Asked(temperature=0.0), 60)
    report = audit_tokens(reference, *example_receipt(PROMPT, output, model=claimed, asked=Asked(temperature=0.0)))
    assert (report.outcome, report.failures) == ("pass", ())
    assert "honest answers" in report.source
    unknown = dataclasses.replace(claimed, build="countersign/0 abacus torch/0")
    report = audit_tokens(reference, *example_receipt(PROMPT, output, model=unknown, asked=Asked(temperature=0.0)))
    assert (report.outcome, report.source) == ("pass", "reasoned, not calibrated")
    unknown = dataclasses.replace(unknown, dtype="bf16")
    report = audit_tokens(reference, *example_receipt(PROMPT, output, model=unknown, asked=Asked(temperature=0.0)))
    assert (report.outcome, report.failures) == ("inconclusive", ()), "the room for bf16 is not for whoever asks for it"


def test_a_profile_of_other_weights_is_refused_by_name(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path)
    other = write_tiny_model(tmp_path / "other", seed=1)
    for name in (profiles.FILE, profiles.KEY_FILE):
        (other / name).write_bytes((model / name).read_bytes())
    with pytest.raises(NotCheckable, match="made for other weights, of the model model"):
        load_reference(other, "fp32")


def test_a_profile_that_another_key_signed_or_that_was_changed_is_refused(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path)
    write_public(model / profiles.KEY_FILE, load_or_create_signing_key(tmp_path / "b.key").public_key())
    with pytest.raises(NotCheckable, match="not trusted"):
        load_reference(model, "fp32")
    (model / profiles.FILE).write_bytes(b"rubbish")
    with pytest.raises(NotCheckable, match="cannot be used"):
        load_reference(model, "fp32")
    (model / profiles.FILE).unlink()
    assert load_reference(model, "fp32").profile is None


def test_what_cannot_be_calibrated_is_said_with_what_to_do(model: Path, tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="cannot be calibrated"):
        run(tmp_path / "none", tmp_path)
    with pytest.raises(InvalidArgument, match="nowhere"):
        run(model, tmp_path, "--prompts", str(tmp_path / "nowhere"))
    empty = tmp_path / "empty"
    empty.write_text("\n")
    with pytest.raises(InvalidArgument, match="has no prompt"):
        run(model, tmp_path, "--prompts", str(empty))


def test_the_same_answers_are_the_same_bits_whatever_the_condition(model: Path, tmp_path: Path) -> None:
    entries = run(model, tmp_path)["entries"]
    assert isinstance(entries, list)
    for entry in entries:
        assert entry["tokens"] > 0
        assert entry["exact"] is False, "torch's bits are those of this machine"
        if entry["provider"] == entry["reference"]:
            assert entry["differing"] == entry["largest"] == 0
