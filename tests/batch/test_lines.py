"""The batch format: what is read, what is refused by name, what is written."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from countersign.batch.lines import Line, Refused, answered, failed, finished_ids, options_of, read_lines
from countersign.client import Answer, FinishReason, Usage
from countersign.services.runtime.errors import NotFound


def line(custom_id: str = "a", url: str = "/v1/completions", **body: Any) -> bytes:
    whole = {"custom_id": custom_id, "method": "POST", "url": url, "body": {"prompt": "x", **body}}
    return json.dumps(whole).encode() + b"\n"


def reason_of(content: bytes) -> str:
    (refused,) = read_lines(content)
    assert isinstance(refused, Refused)
    assert "line 1" in refused.error.message
    assert refused.error.help
    return refused.error.reason


def test_a_line_is_read_with_the_formats_defaults() -> None:
    (one, two) = read_lines(line() + b"\n  \n" + line("b", prompt=[1, 2], max_tokens=3, stop=["x"], n=1, logprobs=None))
    assert isinstance(one, Line)
    assert isinstance(two, Line)
    assert (one.number, one.body.max_tokens, one.body.temperature) == (1, 16, 1.0)
    assert (two.number, two.body.prompt, two.body.stop) == (4, [1, 2], ["x"])


@pytest.mark.parametrize(
    "body",
    [
        {"n": 2},
        {"stream": True},
        {"echo": True},
        {"logprobs": 5},
        {"logit_bias": {"1": 100}},
        {"presence_penalty": 0.5},
        {"frequency_penalty": -1},
        {"best_of": 3},
        {"suffix": "end"},
        {"max_token": 5},
        {"max_tokens": "5"},
        {"prompt": ["two", "prompts"]},
        {"prompt": None},
        {"prompt": [-1]},
        {"prompt": [2**32]},
    ],
)
def test_what_cannot_be_honoured_is_refused_and_never_ignored(body: dict[str, Any]) -> None:
    assert reason_of(line(**body)) == "BAD_LINE"
    (refused,) = read_lines(line(**body))
    assert isinstance(refused, Refused)
    assert next(iter(body)) in refused.error.message
    assert refused.custom_id == "a"


def test_values_that_change_nothing_are_taken() -> None:
    (taken,) = read_lines(line(n=1, best_of=1, echo=False, logit_bias={}, presence_penalty=0, user="me", suffix=None))
    assert isinstance(taken, Line)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "BAD_JSON"),
        (b"\xff\xfe{}", "BAD_JSON"),
        (b'{"custom_id": "\\ud800"}', "BAD_JSON"),
        (b"[]", "BAD_LINE"),
        (line().replace(b"POST", b"GET"), "BAD_LINE"),
        (line("", max_tokens=1), "NO_CUSTOM_ID"),
        (line(url="/v1/chat/completions"), "NO_CHAT"),
        (line(url="/v1/embeddings"), "UNKNOWN_URL"),
    ],
)
def test_a_line_that_is_none_is_refused_by_name(content: bytes, reason: str) -> None:
    assert reason_of(content) == reason


def test_the_second_line_of_an_id_is_refused_and_the_first_stands() -> None:
    first, second = read_lines(line() + line(max_tokens=2))
    assert isinstance(first, Line)
    assert isinstance(second, Refused)
    assert (second.error.reason, second.number) == ("DUPLICATE_CUSTOM_ID", 2)
    assert "line 1" in second.error.message


@given(st.lists(st.binary(max_size=40).filter(lambda text: b"\n" not in text and b"\r" not in text), max_size=5))
def test_whatever_a_file_holds_each_line_is_taken_or_refused(texts: list[bytes]) -> None:
    assert len(read_lines(b"\n".join(texts))) == sum(bool(text.strip()) for text in texts)


def test_a_seed_that_is_left_out_follows_from_the_salt_and_the_id_and_stays() -> None:
    one, other, greedy, given_one = read_lines(
        line("a") + line("b") + line("c", temperature=0) + line("d", seed=5, temperature=0.5)
    )
    assert all(isinstance(each, Line) for each in (one, other, greedy, given_one))
    seeds = [options_of(each, "salt")["seed"] for each in (one, other, greedy, given_one) if isinstance(each, Line)]
    assert len({*seeds}) == 4
    assert seeds[2:] == [None, 5]
    assert isinstance(one, Line)
    assert options_of(one, "salt")["seed"] == seeds[0]
    assert options_of(one, "other")["seed"] != seeds[0]


def test_an_answer_and_an_error_are_lines_of_the_format() -> None:
    (asked,) = read_lines(line("ä\n", max_tokens=2))
    assert isinstance(asked, Line)
    usage = Usage(prompt_tokens=5, output_tokens=2, cached_prompt_tokens=4)
    answer = Answer("r1", "é\n", (), FinishReason.LENGTH, usage, b"signed", 7)
    good = answered(asked, answer, "demo", "receipts/000001.receipt", clock=lambda: 12.7)
    assert "\n" not in good
    assert json.loads(good) == {
        "id": json.loads(good)["id"],
        "custom_id": "ä\n",
        "response": {
            "status_code": 200,
            "request_id": "r1",
            "body": {
                "id": "cmpl-r1",
                "object": "text_completion",
                "created": 12,
                "model": "demo",
                "choices": [{"index": 0, "text": "é\n", "logprobs": None, "finish_reason": "length"}],
                "usage": {
                    "prompt_tokens": 5,
                    "completion_tokens": 2,
                    "total_tokens": 7,
                    "prompt_tokens_details": {"cached_tokens": 4},
                },
                "countersign": {"receipt": "receipts/000001.receipt", "seed": 7},
            },
        },
        "error": None,
    }
    bad = json.loads(failed("b", NotFound("no model", reason="UNKNOWN_MODEL", help="name another")))
    assert (bad["response"], bad["error"]["code"]) == (None, "UNKNOWN_MODEL")
    assert finished_ids(f"{good}\n{json.dumps(bad)}\n".encode()) == ["ä\n", "b"]
