"""Token-DiFR on a small random model: honest answers pass, each way to cheat is found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from countersign.services.engine.text import Tokenizer
from countersign.verify.difr import CHUNK, THRESHOLDS, Reference, TokenReport, audit_tokens, load_reference
from countersign.verify.difr.level import stop_string_position
from countersign.verify.errors import NotCheckable
from countersign.verify.receipt import Openings
from countersign.verify.testing import (
    END_TOKEN,
    VOCABULARY,
    Asked,
    example_receipt,
    generate,
    model_of,
    write_tiny_model,
)

PROMPT = tuple(range(60, 90))
TOKENS = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return load_reference(folder, "fp32")


Auditing = Callable[..., TokenReport]


@pytest.fixture
def run(reference: Reference) -> Auditing:
    """Audits an output against what was asked."""

    def run(output: list[int], asked: Asked, **changes: Any) -> TokenReport:
        prompt = changes.pop("prompt", PROMPT)
        return audit_tokens(
            reference, *example_receipt(prompt, output, model=model_of(reference), asked=asked, **changes)
        )

    return run


@pytest.mark.parametrize(
    "asked",
    [Asked(temperature=0.0), Asked(), Asked(top_k=0, top_p=1.0), Asked(temperature=1.7, top_k=3), Asked(top_p=0.3)],
)
def test_an_honest_answer_passes_with_every_token_matched(reference: Reference, run: Auditing, asked: Asked) -> None:
    output = generate(reference, PROMPT, asked, TOKENS)
    report = run(output, asked, finish_reason="stop" if output[-1] == END_TOKEN else "length")
    assert report.failures == ()
    assert report.outcome == "pass"
    assert report.figures["exact_matches"] == report.figures["sample_size"] == len(output)
    assert report.figures["mean_score"] == report.figures["exceedances"] == report.figures["out_of_support"] == 0


def test_a_long_answer_is_scored_over_chunks_like_a_short_one(reference: Reference, run: Auditing) -> None:
    asked = Asked(temperature=1.0, top_k=0, top_p=1.0)
    prompt = tuple(i % 256 for i in range(CHUNK - 20))
    output = generate(reference, prompt, asked, 40)
    report = run(output, asked, prompt=prompt)
    assert len(output) == report.figures["exact_matches"] == 40


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_one_changed_token_is_caught_wherever_it_stands(
    reference: Reference, run: Auditing, temperature: float
) -> None:
    asked = Asked(temperature=temperature)
    output = generate(reference, PROMPT, asked, TOKENS)
    for position in range(0, len(output), 7):
        changed = list(output)
        changed[position] = (changed[position] + 1) % 256
        assert run(changed, asked).failures


def test_a_greedy_answer_has_no_tokens_out_of_support_whatever_top_k_is(reference: Reference, run: Auditing) -> None:
    asked = Asked(temperature=0.0, top_k=1)
    output = generate(reference, PROMPT, asked, 8)
    report = run([*output[:7], (output[7] + 1) % 256], asked)
    assert (report.figures["out_of_support"], report.figures["exceedances"]) == (0, 1)


def test_an_answer_at_another_temperature_is_caught(reference: Reference, run: Auditing) -> None:
    output = generate(reference, PROMPT, Asked(temperature=1.2), TOKENS)
    assert run(output, Asked(temperature=0.8)).failures


def test_an_answer_with_another_seed_is_caught(reference: Reference, run: Auditing) -> None:
    output = generate(reference, PROMPT, Asked(seed=43), TOKENS)
    report = run(output, Asked(seed=42))
    assert report.failures
    assert report.figures["mean_score"] > report.figures["mean_threshold"]


def test_an_answer_with_a_wider_nucleus_has_tokens_out_of_support(reference: Reference, run: Auditing) -> None:
    output = generate(reference, PROMPT, Asked(temperature=1.5, top_k=0, top_p=1.0), TOKENS)
    report = run(output, Asked(temperature=1.5, top_k=2, top_p=1.0))
    assert report.figures["out_of_support"] > 0
    assert any("could not have been drawn" in failure for failure in report.failures)


def test_an_answer_to_another_prompt_is_caught(reference: Reference, run: Auditing) -> None:
    output = generate(reference, PROMPT, Asked(), TOKENS)
    assert run(output, Asked(), prompt=(*PROMPT[:-1], 7)).failures


def test_an_answer_of_another_model_that_claims_the_reference_is_caught(
    tmp_path: Path, reference: Reference, run: Auditing
) -> None:
    other = load_reference(write_tiny_model(tmp_path, seed=1), "fp32")
    assert run(generate(other, PROMPT, Asked(), TOKENS), Asked()).failures


def test_an_honest_answer_in_bf16_passes_by_the_thresholds_of_bf16(folder: Path) -> None:
    reference = load_reference(folder, "bf16")
    asked = Asked(temperature=0.8, top_k=0, top_p=1.0)
    model = dataclasses.replace(model_of(reference), dtype="bf16")
    output = generate(reference, PROMPT, asked, TOKENS)
    report = audit_tokens(reference, *example_receipt(PROMPT, output, model=model, asked=asked))
    assert report.failures == ()
    assert report.figures["tolerance"] == THRESHOLDS["bf16"].limits[-1].tolerance
    spoiled = audit_tokens(reference, *example_receipt(PROMPT, output[::-1], model=model, asked=asked))
    assert spoiled.outcome == "fail"


def test_token_ids_outside_the_vocabulary_are_refused_before_the_model_runs(run: Auditing) -> None:
    assert run([1, VOCABULARY], Asked()).failures == ("1 token ids are outside the vocabulary",)


@pytest.mark.parametrize("name", ["weights", "config", "tokenizer"])
def test_a_receipt_of_another_model_is_not_checkable_and_both_digests_are_named(
    reference: Reference, name: str
) -> None:
    mine = model_of(reference)
    changed: dict[str, Any] = {name: bytes(32)}
    model = dataclasses.replace(mine, **changed)
    with pytest.raises(NotCheckable, match=name) as refusal:
        audit_tokens(reference, *example_receipt(model=model))
    assert refusal.value.evidence == {"wanted": bytes(32).hex(), "found": getattr(mine, name).hex()}


def test_an_uncoupled_answer_is_not_checkable(reference: Reference) -> None:
    receipt, openings = example_receipt(model=model_of(reference))
    uncoupled = dataclasses.replace(receipt, request=dataclasses.replace(receipt.request, coupling="none"))
    with pytest.raises(NotCheckable, match="coupled"):
        audit_tokens(reference, uncoupled, openings)


def test_an_answer_too_short_to_say_anything_is_inconclusive_unless_it_is_wrong(
    reference: Reference, run: Auditing
) -> None:
    output = generate(reference, PROMPT, Asked(), 3)
    report = run(output, Asked())
    assert (report.outcome, report.failures) == ("inconclusive", ())
    assert report.figures["tokens_needed"] > 3
    assert run([(output[0] + 1) % 256, *output[1:]], Asked()).outcome == "fail"


def test_an_answer_without_tokens_is_not_checkable(reference: Reference) -> None:
    with pytest.raises(NotCheckable, match="no output token"):
        audit_tokens(reference, *example_receipt(output=(), finish_reason="cancelled", model=model_of(reference)))


def test_a_text_beyond_the_references_context_is_not_checkable(reference: Reference) -> None:
    with pytest.raises(NotCheckable, match="context"):
        audit_tokens(reference, *example_receipt([1] * 1024, [2], model=model_of(reference)))


def test_a_folder_without_a_model_is_not_checkable_with_what_to_do(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(NotCheckable, match="cannot be loaded") as refusal:
            load_reference(folder, "fp32")
        assert "--model" in refusal.value.help


def finish(reference: Reference, output: list[int], **changes: Any) -> tuple[str, ...]:
    """What only the finish check says; the scores of made-up tokens are not of interest."""
    changes.setdefault("max_tokens", 50)
    report = audit_tokens(reference, *example_receipt(PROMPT, output, model=model_of(reference), **changes))
    return tuple(failure for failure in report.failures if failure.startswith(("it ended", "the output goes")))


def ids(reference: Reference, text: str) -> list[int]:
    assert reference.tokenizer is not None
    return reference.tokenizer.encode(text, plain=True)


def test_a_stop_must_have_a_stop_token_at_its_end(reference: Reference) -> None:
    assert finish(reference, [5, END_TOKEN], finish_reason="stop") == ()
    assert finish(reference, [5, 9], finish_reason="stop", stop_token_ids=[9]) == ()
    assert finish(reference, [5, 9], finish_reason="stop")
    assert finish(reference, [5, END_TOKEN], finish_reason="stop", ignore_eos=True)


def test_an_answer_that_goes_on_after_a_stop_token_is_refused(reference: Reference) -> None:
    assert finish(reference, [END_TOKEN, 5], finish_reason="length", max_tokens=2)
    assert finish(reference, [9, 5], finish_reason="cancelled", stop_token_ids=[9])
    assert finish(reference, [END_TOKEN, 5], finish_reason="length", max_tokens=2, ignore_eos=True) == ()


def test_a_length_that_hides_a_stop_is_refused(reference: Reference) -> None:
    assert finish(reference, [5, END_TOKEN], finish_reason="length", max_tokens=2)


def test_a_deadline_or_a_cancel_may_end_an_answer_anywhere(reference: Reference) -> None:
    for reason in ("deadline", "cancelled", "error"):
        assert finish(reference, [5, 6], finish_reason=reason) == ()
        assert finish(reference, [5, END_TOKEN], finish_reason=reason) == ()


def test_a_stop_string_ends_the_answer_with_the_token_that_completes_it(reference: Reference) -> None:
    ended = ids(reference, "ab, cd")
    assert finish(reference, ended, finish_reason="stop", stop=["cd"]) == ()
    assert finish(reference, [*ended, 5], finish_reason="length", max_tokens=7, stop=["cd"])
    assert finish(reference, ended, finish_reason="stop", stop=["xy"])


def test_without_a_tokenizer_stop_strings_are_said_to_be_unchecked(reference: Reference) -> None:
    bare = Reference(reference.model)
    receipt, openings = example_receipt(
        PROMPT, [5, 6], finish_reason="stop", max_tokens=9, stop=["x"], model=model_of(reference)
    )
    report = audit_tokens(bare, receipt, openings)
    assert "stop strings" in report.unchecked[0]
    assert not any("ended" in failure for failure in report.failures)


def test_a_stop_string_counts_only_when_its_last_character_is_whole(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    output = tuple(tokenizer.encode("a é!", plain=True))
    openings = Openings(bytes(32), (1,), output, ("é",))
    assert stop_string_position(tokenizer, openings) == 3
    assert stop_string_position(tokenizer, dataclasses.replace(openings, output_token_ids=output[:3])) is None
