"""Profiles: counted, signed, read back, and what thresholds they give."""

from __future__ import annotations

import dataclasses
import math

import pytest

from countersign.verify import cbor, statement
from countersign.verify.arithmetic import Arithmetic
from countersign.verify.difr import profile as profiles
from countersign.verify.difr.profile import Honest, Profile, counted
from countersign.verify.difr.verdict import judge
from countersign.verify.errors import BadSignature, Malformed, NotCheckable, Untrusted, VerificationError
from countersign.verify.testing import signing_key

NATIVE, BF16 = Arithmetic("fp32", "native"), Arithmetic("bf16", "native")


def entry(scores: list[list[float]], provider: Arithmetic = NATIVE, reference: Arithmetic = BF16) -> Honest:
    return counted(scores, provider, reference, ["batch 8"], slack=0.05)


def example() -> Profile:
    exact, near = entry([[0.0] * 50] * 4, NATIVE, NATIVE), entry([[0.0] * 990 + [0.02] * 9 + [math.inf]] * 10)
    weights, config, tokenizer = (bytes([i]) * 32 for i in range(3))
    return Profile("example", weights, config, tokenizer, "countersign test", 1_750_000_000_000, (exact, near))


def test_a_profile_is_read_back_as_it_was_signed() -> None:
    data = profiles.sign(example(), signing_key())
    assert profiles.verify(data, [signing_key().public_key()]) == example()


def test_a_profile_of_a_stranger_or_changed_or_of_another_kind_is_refused() -> None:
    data, key = profiles.sign(example(), signing_key()), signing_key().public_key()
    with pytest.raises(Untrusted):
        profiles.verify(data, [signing_key(2).public_key()])
    with pytest.raises(NotCheckable):
        profiles.verify(data, [])
    with pytest.raises(BadSignature):
        profiles.verify(data[:-1] + bytes([data[-1] ^ 1]), [key])
    for other in (
        statement.sign({"v": 1}, profiles.CONTENT_TYPE, signing_key()),
        statement.sign({}, "other", signing_key()),
    ):
        with pytest.raises(Malformed):
            profiles.verify(other, [key])


def test_whichever_byte_is_changed_or_missing_a_profile_is_refused() -> None:
    data, key = profiles.sign(example(), signing_key()), signing_key().public_key()
    for at in range(len(data)):
        for changed in (data[:at], data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]):
            with pytest.raises(VerificationError):
                profiles.verify(changed, [key])


def test_a_statement_is_written_in_deterministic_cbor_so_that_it_has_one_form() -> None:
    data = profiles.sign(example(), signing_key())
    assert cbor.dumps(cbor.loads(data, tag=18)) == data[1:]


def test_where_all_bits_are_the_same_one_odd_token_refutes() -> None:
    thresholds = entry([[0.0] * 50], NATIVE, NATIVE).thresholds()
    assert judge([0.0] * 299 + [1e-9], thresholds).outcome == "fail"


def test_same_arithmetic_with_a_score_above_nothing_is_not_exact() -> None:
    assert not entry([[0.0] * 50 + [1e-6]], NATIVE, NATIVE).exact
    assert not entry([[0.0] * 50], NATIVE, BF16).exact


def test_torch_s_bits_are_a_machine_s_so_that_one_odd_token_refutes_nobody() -> None:
    torch = Arithmetic("fp32", "eager")
    honest = entry([[0.0] * 50] * 100, torch, torch)
    assert not honest.exact
    assert judge([0.0] * 299 + [1e-6], honest.thresholds()).outcome == "pass"


@pytest.mark.parametrize(
    "changed",
    [
        {"outside": 5001},
        {"above": (5001,) * 7},
        {"above": (5000,) * 7},
        {"clipped": 2501.0},
        {"slack": 1.1},
        {"slack": math.inf},
    ],
    ids=str,
)
def test_numbers_that_no_calibration_gives_are_malformed(changed: dict[str, object]) -> None:
    profile = dataclasses.asdict(example())
    profile["entries"] = ({**dataclasses.asdict(entry([[0.0] * 50] * 100)), **changed},)
    data = statement.sign(profile, profiles.CONTENT_TYPE, signing_key())
    with pytest.raises(Malformed):
        profiles.verify(data, [signing_key().public_key()])


def test_rates_are_bounds_that_more_honest_tokens_draw_closer() -> None:
    few, many = ([[0.0] * 99 + [0.02]] * answers for answers in (3, 300))
    loose, close = entry(few).thresholds(), entry(many).thresholds()
    assert loose.limits[0].rate > close.limits[0].rate > 0.01
    assert loose.limits[-1].rate > close.limits[-1].rate > 0
    assert loose.mean > close.mean > 0.0002


def test_answers_like_those_of_the_profile_pass_and_others_fail() -> None:
    thresholds = example().thresholds(NATIVE, BF16)
    honest = [0.0] * 297 + [0.02] * 3
    assert judge(honest, thresholds).outcome == "pass"
    for dishonest in ([0.0] * 270 + [0.02] * 30, [0.0] * 290 + [0.4] * 10, [0.0] * 290 + [math.inf] * 10):
        assert judge(dishonest, thresholds).outcome == "fail"


def test_a_pairing_that_was_not_run_is_named_with_those_that_were() -> None:
    with pytest.raises(NotCheckable, match=r"eager bf16 under native fp32.*native fp32 under native bf16"):
        example().thresholds(Arithmetic("bf16", "eager"), NATIVE)


def test_nothing_can_be_said_without_a_token() -> None:
    with pytest.raises(ValueError, match="no honest token"):
        entry([[], []])


def test_counts_are_of_all_answers_and_infinities_are_counted_apart() -> None:
    found = entry([[0.0, 0.005], [math.inf, 2.0]])
    assert (found.answers, found.tokens, found.outside, found.largest) == (2, 4, 1, 2.0)
    assert found.above == (2, 2, 2, 1, 1, 1, 1)
    assert dataclasses.replace(found, outside=0).thresholds().outside < found.thresholds().outside
