"""The level that compares what tokens were sampled from with what the reference weights give."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from countersign.kernels.fingerprint import Fingerprinter, projection
from countersign.services.engine.checkpoint import read_tensors
from countersign.services.engine.config import ModelConfig
from countersign.services.engine.kv import PagedCache
from countersign.services.engine.model import Backend, Computed, Model, Span, executor_of, load_model
from countersign.services.engine.step import AfterLayer
from countersign.services.engine.weights import decoder_weights
from countersign.verify.activations import (
    OTHER,
    SAME,
    audit_activations,
    distance,
    judge,
    states_of,
)
from countersign.verify.audit import AuditReport, audit
from countersign.verify.difr import CHUNK, Reference, load_reference
from countersign.verify.errors import NotCheckable, OpeningMismatch
from countersign.verify.fingerprints import SEED, Challenge, commit, encode, open_positions
from countersign.verify.receipt import Openings, Receipt, sign
from countersign.verify.testing import (
    SALT_KEY,
    Asked,
    example_receipt,
    generate,
    model_of,
    signing_key,
    write_tiny_model,
)

PROMPT, TOKENS, SIZE = tuple(b"def fibonacci(n):"), 40, 8
KEY = signing_key()
DEMO = Path(__file__).resolve().parents[2] / "infra" / "models" / "demo-target"
DRAWN = tuple(range(0, TOKENS, 4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return load_reference(folder, "fp32")


@pytest.fixture(scope="module")
def output(reference: Reference) -> list[int]:
    answer = generate(reference, PROMPT, Asked(), TOKENS)
    assert len(answer) == TOKENS
    return answer


def prints_of(model: Model, output: Sequence[int], size: int = SIZE) -> list[bytes]:
    """As a provider makes them that computes with ``model``."""
    printer = Fingerprinter(SEED, model.config.hidden_size, size, model.team)
    openings = Openings(SALT_KEY, PROMPT, tuple(output))
    return [row.tobytes() for row in printer(states_of(model, openings, range(len(output))))]


def signed(reference: Reference, output: Sequence[int], prints: Sequence[bytes]) -> tuple[Receipt, Openings]:
    receipt, openings = example_receipt(PROMPT, output, model=model_of(reference))
    model = dataclasses.replace(receipt.model, build="countersign/test native torch")
    evidence = dataclasses.replace(receipt.evidence, activations=commit(receipt.request_id, prints, SALT_KEY))
    return dataclasses.replace(receipt, model=model, evidence=evidence), openings


def answered(prints: Sequence[bytes], positions: Sequence[int] = DRAWN) -> Challenge:
    return Challenge(tuple(positions), encode(open_positions("example-1", prints, SALT_KEY, positions)))


def audited(reference: Reference, output: Sequence[int], prints: Sequence[bytes], challenge: Challenge) -> AuditReport:
    data = sign(*signed(reference, output, prints), KEY)
    return audit(data, trusted_keys=[KEY.public_key()], reference=lambda _: reference, challenge=challenge)


def rounded(folder: Path, levels: int) -> Model:
    """The model with each matrix rounded to so many levels a side, a scale an output."""
    config, tensors = ModelConfig.from_folder(folder), read_tensors(folder)
    for name, weight in tensors.items():
        if "layers" in name and weight.dim() == 2:
            scale = weight.abs().amax(dim=1, keepdim=True) / levels
            tensors[name] = (weight / scale).round() * scale
    executor = executor_of(config, decoder_weights(config, tensors), "fp32", "invariant", "cpu", "auto", 1)
    return Model(config, load_model(folder).digests, "fp32", executor)


def test_an_honest_answer_passes_with_its_figures(reference: Reference, output: list[int]) -> None:
    prints = prints_of(reference.model, output)
    report = audited(reference, output, prints, answered(prints))
    assert [(level.level, level.outcome) for level in report.levels] == [
        (level, "pass") for level in ("form", "count", "tokens", "activations")
    ]
    figures = report.levels[-1].figures
    assert figures["max_distance"] == figures["mean_distance"] == 0
    assert (figures["sample_size"], figures["fingerprint_size"]) == (len(DRAWN), SIZE)
    assert figures["false_positive_rate"] == 1e-3


@pytest.mark.parametrize("levels", [7, 127], ids=["int4", "int8"])
def test_two_fingerprints_tell_rounded_weights(
    reference: Reference, folder: Path, output: list[int], levels: int
) -> None:
    # The tokens are the declared model's own: only the fingerprints give the cheap model away.
    prints = prints_of(rounded(folder, levels), output)
    report = audited(reference, output, prints, answered(prints, (5, 30)))
    assert [(level.level, level.outcome) for level in report.levels][2:] == [
        ("tokens", "pass"),
        ("activations", "fail"),
    ]
    assert "2 of 2 fingerprints are further from the reference's" in report.levels[-1].summary


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_whatever_executes_the_reference_honest_passes_and_8_bits_fail(backend: Backend, output: list[int]) -> None:
    reference = load_reference(DEMO, "fp32", backend)
    expected = SAME if backend == "native" else OTHER["fp32"]
    for model, outcome in ((load_model(DEMO, backend="native"), "pass"), (rounded(DEMO, 127), "fail")):
        prints = prints_of(model, output)
        receipt, openings = signed(reference, output, prints)
        report = audit_activations(reference, receipt, openings, answered(prints))
        assert (report.outcome, report.source) == (outcome, expected.source)
        assert (max(report.distances) > 2 * expected.distance) == (outcome == "fail")
        assert max(report.distances) == 0 or outcome == "fail" or backend == "eager"


def test_other_weights_are_far_away(reference: Reference, output: list[int], tmp_path: Path) -> None:
    prints = prints_of(load_model(write_tiny_model(tmp_path, seed=1)), output)
    receipt, openings = signed(reference, output, prints)
    report = audit_activations(reference, receipt, openings, answered(prints, (3,)))
    assert report.outcome == "fail"
    assert report.distances[0] > 0.3


@pytest.mark.parametrize("size", [2, 16, 32])
def test_a_distance_is_about_the_change_of_the_whole_state_whatever_the_size(
    reference: Reference, folder: Path, output: list[int], size: int
) -> None:
    other = rounded(folder, 7)
    own, their = (
        states_of(model, Openings(SALT_KEY, PROMPT, tuple(output)), range(TOKENS)) for model in (reference.model, other)
    )
    change = float(((their - own).norm(dim=1) / own.norm(dim=1)).square().mean().sqrt())
    prints = prints_of(other, output, size)
    receipt, openings = signed(reference, output, prints)
    found = audit_activations(reference, receipt, openings, answered(prints, range(TOKENS))).distances
    assert math.sqrt(float(np.mean(np.square(found)))) == pytest.approx(change, rel=0.35 if size == 2 else 0.2)


def test_withheld_fingerprints_fail(reference: Reference, output: list[int]) -> None:
    prints = prints_of(reference.model, output)
    report = audited(reference, output, prints, Challenge(DRAWN, None))
    assert (report.verdict, report.levels[-1].level) == ("fail", "activations")
    assert "withholds its fingerprints" in report.levels[-1].summary


def test_an_answer_that_opens_other_positions_fails(reference: Reference, output: list[int]) -> None:
    prints = prints_of(reference.model, output)
    other = dataclasses.replace(answered(prints, range(len(DRAWN))), positions=DRAWN)
    assert audited(reference, output, prints, other).verdict == "fail"


def test_bytes_that_are_no_answer_fail(reference: Reference, output: list[int]) -> None:
    prints = prints_of(reference.model, output)
    report = audited(reference, output, prints, Challenge(DRAWN, b"\xff"))
    assert (report.verdict, report.levels[-1].level) == ("fail", "activations")


def test_a_fingerprint_that_is_no_number_fails(reference: Reference, output: list[int]) -> None:
    prints = prints_of(reference.model, output)
    prints[DRAWN[1]] = np.full(SIZE, np.nan, dtype="<f2").tobytes()
    receipt, openings = signed(reference, output, prints)
    report = audit_activations(reference, receipt, openings, answered(prints))
    assert report.outcome == "fail"
    assert report.distances[1] == math.inf


def test_without_fingerprints_or_positions_there_is_nothing_to_check(reference: Reference, output: list[int]) -> None:
    prints = prints_of(reference.model, output)
    with pytest.raises(NotCheckable, match="commits to no activation fingerprints"):
        audit_activations(reference, *signed(reference, output, ()), answered(prints))
    for positions in ((), (TOKENS,)):
        with pytest.raises(NotCheckable, match="no position of the answer was drawn"):
            audit_activations(reference, *signed(reference, output, prints), Challenge(positions, b""))
    with pytest.raises(OpeningMismatch):
        audit_activations(reference, *signed(reference, output, prints), Challenge((0,), None))


def test_without_a_challenge_the_level_is_left_out_or_inconclusive(reference: Reference, output: list[int]) -> None:
    data = sign(*signed(reference, output, prints_of(reference.model, output)), KEY)

    def ask(*levels: str) -> list[str]:
        report = audit(data, trusted_keys=[KEY.public_key()], reference=lambda _: reference, levels=levels)  # type: ignore[arg-type]
        return [f"{level.level} {level.outcome}" for level in report.levels]

    assert ask() == ["form pass", "count pass", "tokens pass"]
    assert ask("activations") == ["form pass", "count pass", "activations inconclusive"]


def test_a_projection_that_the_model_cannot_have_is_not_checkable(reference: Reference, output: list[int]) -> None:
    prints = [bytes(2 * 64)] * TOKENS
    with pytest.raises(NotCheckable, match="cannot compute these fingerprints"):
        audit_activations(reference, *signed(reference, output, prints), answered(prints))


def test_a_position_has_the_state_of_its_own_prefix_in_however_many_chunks_it_is_computed(reference: Reference) -> None:
    tokens = torch.randint(0, 256, (2 * CHUNK + 77,), generator=torch.Generator().manual_seed(1)).tolist()
    openings = Openings(SALT_KEY, tuple(tokens[:50]), tuple(tokens[50:]))
    positions = (0, 3, CHUNK - 51, CHUNK - 50, 2 * CHUNK - 50, 2 * CHUNK + 26)
    found = states_of(reference.model, openings, positions)
    for position, state in zip(positions, found, strict=True):
        cache = PagedCache(reference.model.config, "fp32", 1000)
        span = Span(cache.sequence(), tokens[: 50 + position], 1)
        assert torch.equal(reference.model.compute(cache, [span]).states[0], state)


def test_the_pass_of_the_token_level_serves_the_activations_too(
    reference: Reference, output: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    prints = prints_of(reference.model, output)
    computed: list[int] = []
    compute = reference.model.compute

    def counted(cache: PagedCache, spans: Sequence[Span], after_layer: AfterLayer | None = None) -> Computed:
        computed.append(sum(len(span.token_ids) for span in spans))
        return compute(cache, spans, after_layer)

    monkeypatch.setattr(reference.model, "compute", counted)
    assert audited(reference, output, prints, answered(prints)).verdict == "pass"
    assert computed == [len(PROMPT) + TOKENS - 1]


@given(st.lists(st.floats(0, 2), min_size=1, max_size=40), st.booleans())
def test_one_number_too_large_fails_and_only_that_where_none_may_be(distances: list[float], complete: bool) -> None:
    report = judge(distances, SAME, complete=complete)
    beyond = any(each > SAME.distance for each in distances)
    assert (report.outcome == "fail") == beyond
    assert bool(report.failures) == beyond
    if not beyond:
        assert (report.outcome == "pass") == (complete or len(distances) >= report.figures["positions_needed"])


@given(st.integers(1, 40))
def test_a_number_that_is_none_never_passes(size: int) -> None:
    for bad in (math.nan, math.inf):
        assert judge([0.0] * (size - 1) + [bad], SAME, complete=True).outcome == "fail"


def test_where_some_may_be_large_it_takes_too_many_of_them() -> None:
    few, many = [0.01] * 99 + [0.06], [0.01] * 92 + [0.06] * 8
    assert judge(few, OTHER["bf16"], complete=False).outcome == "pass"
    assert "8 of 100 fingerprints" in judge(many, OTHER["bf16"], complete=False).failures[0]
    assert "mean distance" in judge([0.049] * 2000, OTHER["bf16"], complete=False).failures[0]


def test_all_there_are_of_a_short_answer_pass_only_where_none_is_too_far_away() -> None:
    tolerance = OTHER["bf16"]
    assert judge([0.01], tolerance, complete=True).outcome == "pass"
    # Where one in a hundred may be too far away, one of one does not refute; nor does it say anything for it.
    assert judge([9.0], tolerance, complete=True).outcome == "inconclusive"
    assert judge([0.01, 9.0], tolerance, complete=True).outcome == "inconclusive"


def test_the_distance_is_the_one_of_the_definition() -> None:
    h, other = torch.randn(64, generator=torch.Generator().manual_seed(1)), torch.randn(64)
    q = projection(SEED, 64, SIZE)
    v, w = ((x @ q).half().numpy() for x in (h, other))
    expected = np.linalg.norm(v.astype(float) - w) / (float(h.norm()) * math.sqrt(SIZE / 64))
    assert distance(w.tobytes(), v, float(h.norm()), 64) == pytest.approx(expected)
    zero = np.zeros(SIZE, dtype="<f2")
    assert distance(zero.tobytes(), zero, 0.0, 64) == 0
    assert distance(v.tobytes(), zero, 0.0, 64) == math.inf
