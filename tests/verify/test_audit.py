"""The levels of an audit and the verdict that they give together."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal, NoReturn

import pytest

from countersign.verify.audit import AuditReport, Dtype, Level, audit
from countersign.verify.difr import Reference, load_reference
from countersign.verify.errors import NotCheckable
from countersign.verify.receipt import Openings, Receipt, sign, strip
from countersign.verify.testing import Asked, example_receipt, generate, model_of, signing_key, write_tiny_model

PROMPT = tuple(range(60, 70))
KEY = signing_key()
KEYS = (KEY.public_key(),)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return load_reference(write_tiny_model(tmp_path_factory.mktemp("tiny")), "fp32")


@pytest.fixture(scope="module")
def honest(reference: Reference) -> bytes:
    return sign(*answer(reference), KEY)


def answer(reference: Reference, change: int | None = None) -> tuple[Receipt, Openings]:
    output = generate(reference, PROMPT, Asked(), 16)
    if change is not None:
        output[change] = (output[change] + 1) % 256
    return example_receipt(PROMPT, output, model=model_of(reference), asked=Asked())


def outcomes(report: AuditReport) -> list[tuple[str, str]]:
    return [(level.level, level.outcome) for level in report.levels]


def never(dtype: Dtype) -> NoReturn:
    raise AssertionError("the reference model must not be loaded")


def test_an_honest_answer_passes_every_level(honest: bytes, reference: Reference) -> None:
    report = audit(honest, trusted_keys=KEYS, reference=lambda _: reference)
    assert report.verdict == "pass"
    assert outcomes(report) == [("form", "pass"), ("count", "pass"), ("tokens", "pass")]
    assert report.levels[1].figures == {"prompt_tokens": 10, "output_tokens": 16, "hidden_tokens": 0}
    assert report.levels[2].figures["exact_matches"] == 16


def test_a_changed_token_that_the_provider_signs_fails_at_the_tokens(reference: Reference) -> None:
    forged = sign(*answer(reference, change=5), KEY)
    report = audit(forged, trusted_keys=KEYS, reference=lambda _: reference)
    assert report.verdict == "fail"
    assert outcomes(report) == [("form", "pass"), ("count", "pass"), ("tokens", "fail")]
    assert report.levels[2].figures["sample_size"] == 16


def test_an_arithmetic_that_nobody_has_measured_is_told_and_does_not_pass(reference: Reference) -> None:
    receipt, openings = example_receipt(PROMPT, generate(reference, PROMPT, Asked(), 80), model=model_of(reference))
    claimed = dataclasses.replace(receipt.model, dtype="bf16", build="countersign/9 abacus torch/9")
    data = sign(dataclasses.replace(receipt, model=claimed), openings, KEY)
    report = audit(data, trusted_keys=KEYS, reference=lambda _: reference)
    assert outcomes(report)[-1] == ("tokens", "inconclusive")
    assert "nobody has measured what honest answers by abacus bf16 score here" in report.levels[-1].summary
    assert "countersign calibrate" in report.levels[-1].help


def test_a_failed_level_ends_the_audit_before_the_model_is_loaded(honest: bytes) -> None:
    report = audit(honest[:-1], trusted_keys=KEYS, reference=never)
    assert report.verdict == "fail"
    assert outcomes(report) == [("form", "fail")]
    assert report.receipt is None


def test_an_unknown_signer_fails(honest: bytes) -> None:
    report = audit(honest, trusted_keys=[signing_key(2).public_key()], reference=never)
    assert outcomes(report) == [("form", "fail")]


def test_without_trusted_keys_the_rest_is_checked_and_the_verdict_is_inconclusive(
    honest: bytes, reference: Reference
) -> None:
    report = audit(honest, trusted_keys=[], reference=lambda _: reference)
    assert report.verdict == "inconclusive"
    assert outcomes(report) == [("form", "inconclusive"), ("count", "pass"), ("tokens", "pass")]
    assert "--key" in report.levels[0].help


def test_without_trusted_keys_nonsense_still_fails() -> None:
    assert audit(b"nonsense", trusted_keys=[], reference=never).verdict == "fail"


def test_without_openings_count_and_tokens_are_inconclusive(honest: bytes) -> None:
    report = audit(strip(honest), trusted_keys=KEYS, reference=never)
    assert report.verdict == "inconclusive"
    assert outcomes(report) == [("form", "pass"), ("count", "inconclusive"), ("tokens", "inconclusive")]


def test_a_receipt_of_another_model_is_inconclusive_and_names_both_digests(
    honest: bytes, reference: Reference, tmp_path: Path
) -> None:
    other = load_reference(write_tiny_model(tmp_path, seed=1), "fp32")
    report = audit(honest, trusted_keys=KEYS, reference=lambda _: other)
    assert report.verdict == "inconclusive"
    for model in (reference, other):
        assert model.model.digests.weights.hex() in report.levels[2].summary


def test_without_a_reference_the_tokens_are_inconclusive(honest: bytes) -> None:
    def unavailable(dtype: Dtype) -> NoReturn:
        raise NotCheckable("no such folder")

    for reference in (None, unavailable):
        report = audit(honest, trusted_keys=KEYS, reference=reference)
        assert outcomes(report)[2] == ("tokens", "inconclusive")


@pytest.mark.parametrize("policy", ["fp8", "int8"])
def test_tokens_over_kv_that_was_stored_with_losses_cannot_be_audited(
    reference: Reference, policy: Literal["fp8", "int8"]
) -> None:
    receipt, openings = example_receipt(model=model_of(reference))
    lossy = dataclasses.replace(receipt, evidence=dataclasses.replace(receipt.evidence, kv_policy=policy))
    report = audit(sign(lossy, openings, KEY), trusted_keys=KEYS, reference=never)
    assert outcomes(report) == [("form", "pass"), ("count", "pass"), ("tokens", "inconclusive")]
    assert policy in report.levels[2].summary


def test_a_level_runs_those_before_it_and_none_after_it(honest: bytes) -> None:
    wanted: list[tuple[list[Level], int]] = [(["form"], 1), (["count"], 2), (["count", "form"], 2)]
    for levels, reached in wanted:
        report = audit(honest, trusted_keys=KEYS, reference=never, levels=levels)
        assert report.verdict == "pass"
        assert len(report.levels) == reached


def test_the_reference_is_asked_for_in_the_dtype_that_the_receipt_declares(reference: Reference) -> None:
    asked_for: list[str] = []

    def load(dtype: Dtype) -> Reference:
        asked_for.append(dtype)
        raise NotCheckable("enough")

    receipt, openings = example_receipt(model=dataclasses.replace(model_of(reference), dtype="bf16"))
    audit(sign(receipt, openings, KEY), trusted_keys=KEYS, reference=load)
    assert asked_for == ["bf16"]
