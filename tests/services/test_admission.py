"""Each rule of the front door, by the reason it refuses with."""

import math

import pytest

from countersign.services.router import admission
from countersign.services.runtime.errors import InvalidArgument, NotFound, Unavailable
from countersign.v1.router_pb2 import GenerateRequest, ModelInfo, TokenIds
from countersign.v1.sampling_pb2 import SamplingParams

MODEL = ModelInfo(name="demo", context_length=32, vocabulary_size=100)


def request(**fields: object) -> GenerateRequest:
    sampling = SamplingParams(max_tokens=4)
    sampling.MergeFrom(SamplingParams(**fields.pop("sampling", {})))  # type: ignore[arg-type]  # by field name
    return GenerateRequest(text="def f(", sampling=sampling, **fields)  # type: ignore[arg-type]  # by field name


def test_a_plain_request_is_let_in() -> None:
    admission.check(request(), MODEL)
    admission.check_length(range(28), SamplingParams(max_tokens=4), MODEL)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (request(request_id="a b"), "BAD_REQUEST_ID"),
        (request(request_id="x" * 65), "BAD_REQUEST_ID"),
        (request(request_id="a.b"), "BAD_REQUEST_ID"),
        (request(tenant="a>b"), "BAD_TENANT"),
        (GenerateRequest(text="", sampling=SamplingParams(max_tokens=1)), "EMPTY_PROMPT"),
        (GenerateRequest(token_ids=TokenIds(), sampling=SamplingParams(max_tokens=1)), "EMPTY_PROMPT"),
        (GenerateRequest(text="é" * 400_000, sampling=SamplingParams(max_tokens=1)), "PROMPT_TOO_LONG"),
        (request(sampling={"temperature": -0.1}), "BAD_TEMPERATURE"),
        (request(sampling={"temperature": math.nan}), "BAD_TEMPERATURE"),
        (request(sampling={"temperature": math.inf}), "BAD_TEMPERATURE"),
        (request(sampling={"temperature": 0.5}), "SEED_NEEDED"),
        (request(sampling={"top_p": 0.0}), "BAD_TOP_P"),
        (request(sampling={"top_p": 1.1}), "BAD_TOP_P"),
        (request(sampling={"top_p": math.nan}), "BAD_TOP_P"),
        (GenerateRequest(text="x"), "BAD_MAX_TOKENS"),
        (request(sampling={"stop": [""]}), "BAD_STOP"),
        (request(sampling={"stop": ["x" * 257]}), "BAD_STOP"),
        (request(sampling={"stop": ["x"] * 17}), "BAD_STOP"),
        (request(sampling={"stop_token_ids": [100]}), "BAD_STOP"),
    ],
)
def test_a_bad_request_is_refused_by_reason(bad: GenerateRequest, reason: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        admission.check(bad, MODEL)
    assert caught.value.reason == reason
    assert caught.value.help


@pytest.mark.parametrize(
    ("tokens", "max_tokens", "reason", "fits"),
    [
        (range(32), 1, "PROMPT_TOO_LONG", "at most 31"),
        (range(30), 3, "MAX_TOKENS_TOO_LARGE", "at most 2"),
        (range(3), 2**32 - 1, "MAX_TOKENS_TOO_LARGE", "at most 29"),
        ([100], 1, "TOKEN_OUT_OF_VOCABULARY", "99"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(tokens: range, max_tokens: int, reason: str, fits: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        admission.check_length(tokens, SamplingParams(max_tokens=max_tokens), MODEL)
    assert caught.value.reason == reason
    assert fits in caught.value.help


def test_an_unknown_model_is_refused_with_those_served() -> None:
    with pytest.raises(NotFound, match="demo") as caught:
        admission.choose_model("gpt", [MODEL])
    assert caught.value.reason == "UNKNOWN_MODEL"
    assert admission.choose_model("", [MODEL]) == MODEL


def test_without_a_target_the_refusal_is_unavailable_and_with_two_a_name_is_needed() -> None:
    with pytest.raises(Unavailable):
        admission.choose_model("", [])
    with pytest.raises(InvalidArgument, match="names no model"):
        admission.choose_model("", [MODEL, ModelInfo(name="other")])
