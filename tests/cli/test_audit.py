"""``countersign audit`` and ``countersign receipt show`` as a person at a terminal meets them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from countersign.cli.audit import audit, show
from countersign.verify import merkle
from countersign.verify.cose_receipt import prove_inclusion
from countersign.verify.difr import load_reference
from countersign.verify.fingerprints import commit
from countersign.verify.keys import write_public
from countersign.verify.log.checkpoint import Checkpoint, KeyKind, NoteKey, cosign
from countersign.verify.log.checkpoint import sign as sign_checkpoint
from countersign.verify.receipt import (
    MAX_RECEIPT_BYTES,
    HiddenMarkers,
    attach,
    attach_proofs,
    sign,
    strip,
    withheld,
)
from countersign.verify.testing import Asked, example_receipt, generate, model_of, signing_key, write_tiny_model

PROMPT = tuple(range(60, 70))
LOG, WITNESS = signing_key(7), signing_key(8)


@dataclass(frozen=True, slots=True)
class Case:
    """A data folder, weights, an honest receipt, and one whose token 3 was changed before it was signed."""

    data_dir: Path
    model: Path
    honest: Path
    forged: Path


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("audit")
    model = write_tiny_model(folder / "model")
    write_public(folder / "data" / "keys" / "receipts.pub", signing_key().public_key())
    reference = load_reference(model, "fp32")
    output = generate(reference, PROMPT, Asked(), 12)
    for name, tokens in (("honest", output), ("forged", [*output[:3], (output[3] + 1) % 256, *output[4:]])):
        receipt = example_receipt(PROMPT, tokens, model=model_of(reference), asked=Asked())
        (folder / name).write_bytes(sign(*receipt, signing_key()))
    return Case(folder / "data", model, folder / "honest", folder / "forged")


def run(*words: object) -> Result:
    app = typer.Typer()
    app.command("audit")(audit)
    app.command("show")(show)
    return CliRunner().invoke(app, [str(word) for word in words])


def check(case: Case, receipt: Path, *words: object) -> Result:
    return run("audit", receipt, "--data-dir", case.data_dir, "--model", case.model, *words)


def test_an_honest_receipt_passes_with_exit_code_0(case: Case) -> None:
    result = check(case, case.honest)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].split() == [
        "example-1:",
        "tiny",
        "in",
        "fp32,",
        *["10", "prompt", "tokens,", "12", "output", "tokens,", "ended", "by", "length"],
    ]
    assert [line.split()[:2] for line in lines[1:4]] == [["form", "PASS"], ["count", "PASS"], ["tokens", "PASS"]]
    assert lines[4].startswith("PASS ")


def test_a_changed_token_fails_with_exit_code_1_and_says_how_many(case: Case) -> None:
    result = check(case, case.forged)
    assert result.exit_code == 1, result.output
    assert "of 12 tokens" in result.output
    assert result.output.splitlines()[-1].startswith("FAIL ")


def test_a_missing_key_is_not_checkable_with_exit_code_2_and_what_to_do(case: Case, tmp_path: Path) -> None:
    result = run("audit", case.honest, "--data-dir", tmp_path, "--model", case.model)
    assert result.exit_code == 2, result.output
    last = result.output.splitlines()[-1]
    assert last.startswith("NOT CHECKABLE ")
    assert "--key FILE" in last


def test_a_key_named_on_the_command_line_is_trusted_and_no_other(case: Case, tmp_path: Path) -> None:
    other = tmp_path / "other.pub"
    write_public(other, signing_key(2).public_key())
    assert check(case, case.honest, "--key", other).exit_code == 1
    mine = case.data_dir / "keys" / "receipts.pub"
    assert check(case, case.honest, "--key", other, "--key", mine).exit_code == 0


def test_another_model_is_not_checkable_and_both_digests_are_named(case: Case, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path, seed=1)
    result = check(case, case.honest, "--model", other)
    assert result.exit_code == 2
    for folder in (case.model, other):
        assert load_reference(folder, "fp32").model.digests.weights.hex() in result.output
    assert "--model FOLDER" in result.output


def test_a_model_folder_that_is_none_is_not_checkable(case: Case, tmp_path: Path) -> None:
    result = check(case, case.honest, "--model", tmp_path / "none")
    assert result.exit_code == 2
    assert "cannot be loaded" in result.output


def test_a_stripped_receipt_is_not_checkable_beyond_its_form(case: Case, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.write_bytes(strip(case.honest.read_bytes()))
    assert check(case, bare).exit_code == 2
    assert check(case, bare, "--level", "form").exit_code == 0


@pytest.mark.parametrize("content", [b"", b"def quicksort(", bytes(range(256)), bytes(MAX_RECEIPT_BYTES + 1)], ids=len)
def test_a_file_that_is_no_receipt_fails(case: Case, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    result = check(case, path)
    assert result.exit_code == 1
    assert result.output.splitlines()[-1].startswith("FAIL ")
    assert "no receipt" in result.output
    assert run("show", path).exit_code == 1


def test_a_receipt_cut_short_fails(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "cut"
    path.write_bytes(case.honest.read_bytes()[:-10])
    result = check(case, path)
    assert result.exit_code == 1
    assert "cut short" in result.output or "too early" in result.output


def test_a_path_that_cannot_be_read_is_not_checkable(case: Case, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        result = check(case, path)
        assert result.exit_code == 2
        assert f"{path} cannot be read" in result.stderr
        assert run("show", path).exit_code == 2


def test_a_key_file_that_is_none_is_not_checkable(case: Case) -> None:
    result = check(case, case.honest, "--key", case.honest)
    assert result.exit_code == 2
    assert "not an Ed25519 public key" in result.stderr


def test_json_is_one_object_with_the_verdict_and_the_levels(case: Case, tmp_path: Path) -> None:
    passed = json.loads(check(case, case.honest, "--json").stdout)
    assert passed["verdict"] == "pass"
    assert [level["level"] for level in passed["levels"]] == ["form", "count", "tokens"]
    assert passed["levels"][2]["figures"]["exact_matches"] == 12
    assert json.loads(check(case, case.forged, "--json").stdout)["verdict"] == "fail"
    unreadable = json.loads(check(case, tmp_path, "--json").stdout)
    assert unreadable["verdict"] == "inconclusive"
    assert "cannot be read" in unreadable["error"]


def test_levels_below_the_tokens_do_not_import_torch(case: Case) -> None:
    code = (
        "import sys, typer\n"
        "from countersign.cli.audit import audit\n"
        "try:\n"
        "    typer.run(audit)\n"
        "except SystemExit as done:\n"
        "    assert done.code == 0, done.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    words = ["--level", "count", "--data-dir", str(case.data_dir)]
    subprocess.run([sys.executable, "-c", code, str(case.honest), *words], check=True, timeout=60)


def test_how_the_provider_agreed_to_compute_can_be_named(case: Case) -> None:
    assert check(case, case.honest, "--arithmetic", "native fp32", "--arithmetic", "test fp32").exit_code == 0
    result = check(case, case.honest, "--arithmetic", "native fp32", "--level", "form")
    assert result.exit_code == 1
    assert "computed otherwise than was agreed" in result.output


def test_show_prints_every_claim_and_says_that_none_was_checked(case: Case) -> None:
    text = run("show", case.honest)
    assert text.exit_code == 0
    assert text.output.startswith("UNVERIFIED")
    for words in ("finish_reason", "temperature", "0.8", "prompt_token_ids", "2025-06-15T15:06:40"):
        assert words in text.output
    claims = json.loads(run("show", case.forged, "--json").stdout)
    assert claims["verified"] is False
    assert claims["receipt"]["output"]["tokens"] == 12
    assert len(claims["openings"]["output_token_ids"]) == 12


def test_show_of_a_stripped_receipt_has_no_openings(case: Case, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.write_bytes(strip(case.honest.read_bytes()))
    assert json.loads(run("show", bare, "--json").stdout)["openings"] is None


def test_show_can_print_the_last_time_that_a_receipt_may_hold(tmp_path: Path) -> None:
    receipt, openings = example_receipt()
    late = dataclasses.replace(receipt, usage=dataclasses.replace(receipt.usage, finished_unix_ms=253_402_300_799_999))
    (tmp_path / "late").write_bytes(sign(late, openings, signing_key()))
    assert "9999-12-31T23:59:59.999" in run("show", tmp_path / "late").output


def test_an_answer_of_tomorrow_fails(case: Case, tmp_path: Path) -> None:
    receipt, openings = example_receipt()
    late = dataclasses.replace(receipt, usage=dataclasses.replace(receipt.usage, finished_unix_ms=253_402_300_799_999))
    (tmp_path / "late").write_bytes(sign(late, openings, signing_key()))
    result = check(case, tmp_path / "late", "--level", "form")
    assert (result.exit_code, "in the future" in result.output) == (1, True)


def logged(case: Case, tmp_path: Path) -> Path:
    """The honest receipt with a proof that it is leaf 1 of 2, and the checkpoint, which one witness has cosigned."""
    data = case.honest.read_bytes()
    leaves = [merkle.leaf_hash(b"another"), merkle.leaf_hash(strip(data))]
    root = merkle.root(leaves)
    note = cosign(sign_checkpoint(Checkpoint("log.test", 2, root), LOG), WITNESS, "witness.test", time=1_750_000_000)
    path = tmp_path / "logged"
    path.write_bytes(attach_proofs(data, [prove_inclusion(root, 2, 1, leaves[:1], LOG)], note))
    return path


def test_a_log_that_is_named_must_hold_the_receipt(case: Case, tmp_path: Path) -> None:
    log = NoteKey("log.test", LOG.public_key()).encode()
    result = check(case, logged(case, tmp_path), "--level", "form", "--log-key", log)
    assert result.exit_code == 0, result.output
    assert "entry 1 of 2 of log.test" in result.output
    assert check(case, case.honest, "--level", "form", "--log-key", log).exit_code == 2
    stranger = NoteKey("log.test", WITNESS.public_key()).encode()
    assert check(case, logged(case, tmp_path), "--level", "form", "--log-key", stranger).exit_code == 2


def test_a_quorum_of_witnesses_can_be_asked_for(case: Case, tmp_path: Path) -> None:
    log, witness = (
        NoteKey("log.test", LOG.public_key()).encode(),
        NoteKey("witness.test", WITNESS.public_key(), KeyKind.WITNESS).encode(),
    )
    other = NoteKey("other.test", signing_key(9).public_key(), KeyKind.WITNESS).encode()
    words = ["--level", "form", "--log-key", log, "--witness-key", witness]
    result = check(case, logged(case, tmp_path), *words, "--quorum", 1)
    assert result.exit_code == 0, result.output
    assert "seen by 1 witness" in result.output
    result = check(case, logged(case, tmp_path), *words, "--witness-key", other, "--quorum", 2)
    assert result.exit_code == 2
    assert "fewer witnesses" in result.output


def test_a_quorum_without_a_log_is_not_checkable(case: Case, tmp_path: Path) -> None:
    """Nobody has seen the checkpoint of a log that is not trusted: that must not look as if it had been asked for."""
    witness = NoteKey("witness.test", WITNESS.public_key(), KeyKind.WITNESS).encode()
    for file in (case.honest, logged(case, tmp_path)):
        result = check(case, file, "--level", "form", "--witness-key", witness, "--quorum", 1)
        assert result.exit_code == 2, result.output
        assert "--log-key" in result.output


def test_a_provider_that_does_not_answer_keeps_no_level_from_failing(case: Case, tmp_path: Path) -> None:
    """Else whoever has signed a forged answer would only have to be silent."""
    hidden, fingerprints = tmp_path / "hidden", tmp_path / "fingerprints"
    receipt, openings = example_receipt(output=(9, 1, 5, 2, 8), hidden=HiddenMarkers(1, 2))
    hidden.write_bytes(attach(strip(sign(receipt, openings, signing_key())), withheld(receipt, openings)))
    receipt, openings = example_receipt(PROMPT, (4, 5, 6), model=model_of(load_reference(case.model, "fp32")))
    committed = commit(receipt.request_id, [bytes(16)] * 3, openings.salt_key)
    evidence = dataclasses.replace(receipt.evidence, activations=committed)
    fingerprints.write_bytes(sign(dataclasses.replace(receipt, evidence=evidence), openings, signing_key()))
    silent = ["--router", "127.0.0.1:9"]
    for file, words, refused, failing in (
        (hidden, ["--level", "count", "--open-hidden"], "did not open its hidden tokens", ["--billed", 6]),
        (fingerprints, ["--level", "activations"], "did not open its fingerprints", ["--level", "tokens"]),
    ):
        result = check(case, file, *words, *silent)
        assert result.exit_code == 2, result.output
        assert refused in result.output
        result = check(case, file, *words, *silent, *failing)
        assert result.exit_code == 1, result.output


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--log-key", "nonsense"], "not a note key"),
        (["--witness-key", "LOG"], "the key of a log, not of a witness"),
        (["--quorum", "1"], "name them with --witness-key"),
    ],
)
def test_a_log_or_witness_key_that_is_none_is_told(case: Case, words: list[str], told: str) -> None:
    log = NoteKey("log.test", LOG.public_key()).encode()
    result = check(case, case.honest, *(log if word == "LOG" else word for word in words))
    assert result.exit_code == 2
    assert told in result.stderr
