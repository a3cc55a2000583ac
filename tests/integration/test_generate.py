"""The main job over a real stack: answers, stops, deadlines, cancels, resumes, bad input."""

from __future__ import annotations

import asyncio
import math
from contextlib import aclosing
from functools import partial
from pathlib import Path

import grpc
import pytest
from stacks import Running

from countersign.cli.prompts import heldout_prompts
from countersign.client import Accepted, Client, Finished, FinishReason, Tokens, TokenSource
from countersign.services.engine.text import Tokenizer
from countersign.services.runtime.errors import AlreadyExists, InvalidArgument, NotFound
from countersign.v1.router_pb2 import GenerateRequest
from countersign.v1.sampling_pb2 import SamplingParams
from countersign.verify.audit import audit
from countersign.verify.difr import load_reference
from countersign.verify.keys import load_public

PROMPT = "def fibonacci(n):\n    "


async def test_an_answer_streams_committed_tokens_and_ends_with_a_receipt_that_passes_every_level(
    stack: Running, demo_models: dict[str, Path]
) -> None:
    async with Client(stack.router) as client:
        events = [event async for event in client.generate(PROMPT, max_tokens=24, temperature=0.8, seed=3)]
    accepted, *middle, finished = events
    assert isinstance(accepted, Accepted)
    assert isinstance(finished, Finished)
    tokens = [token for event in middle if isinstance(event, Tokens) for token in event.tokens]
    assert len(tokens) == finished.usage.output_tokens
    assert finished.usage.prompt_tokens == accepted.prompt_tokens
    sources = [token.source for token in tokens]
    assert sources.count(TokenSource.DRAFT) == finished.usage.accepted_tokens
    report = audit(
        finished.receipt,
        trusted_keys=[load_public(stack.data_dir / "keys" / "receipts.pub")],
        reference=partial(load_reference, demo_models["target"]),
    )
    assert report.verdict == "pass", report
    assert report.levels[-1].figures["exact_matches"] == len(tokens)


async def test_the_text_is_what_the_tokens_say(stack: Running, demo_models: dict[str, Path]) -> None:
    async with Client(stack.router) as client:
        answer = await client.complete(PROMPT, max_tokens=32)
    assert answer.text == Tokenizer(demo_models["target"]).decode([token.id for token in answer.tokens])


async def test_a_stop_string_ends_the_answer_with_its_token_and_is_cut_from_the_text(stack: Running) -> None:
    async with Client(stack.router) as client:
        whole = await client.complete(PROMPT, max_tokens=40, ignore_eos=True)
        stop = whole.text[len(whole.text) // 2 :][:3]
        answers = [
            await client.complete(PROMPT, max_tokens=40, stop=stop, drafting=drafting) for drafting in ("model", "off")
        ]
    for answer in answers:
        assert answer.finish is FinishReason.STOP
        assert answer.text == whole.text[: whole.text.index(stop)]
        assert len(answer.tokens) < 40
        assert [t.id for t in answer.tokens] == [t.id for t in whole.tokens][: len(answer.tokens)]
    assert [t.id for t in answers[0].tokens] == [t.id for t in answers[1].tokens]


async def test_a_stop_token_ends_the_answer_with_itself(stack: Running) -> None:
    async with Client(stack.router) as client:
        whole = await client.complete(PROMPT, max_tokens=12)
        token = whole.tokens[6].id
        answer = await client.complete(PROMPT, max_tokens=12, stop_token_ids=[token])
    ids = [t.id for t in whole.tokens]
    assert [t.id for t in answer.tokens] == ids[: ids.index(token) + 1]
    assert answer.finish is FinishReason.STOP


async def test_a_deadline_ends_the_answer_as_it_is_with_a_receipt(stack: Running) -> None:
    async with Client(stack.router) as client:
        answer = await client.complete(PROMPT, max_tokens=1900, ignore_eos=True, timeout=0.5, drafting="off")
    assert answer.finish is FinishReason.DEADLINE
    assert len(answer.tokens) == answer.usage.output_tokens < 1900
    report = audit(
        answer.receipt,
        trusted_keys=[load_public(stack.data_dir / "keys" / "receipts.pub")],
        reference=None,
        levels=["form", "count"],
    )
    assert report.verdict == "pass", report


async def test_leaving_the_stream_cancels_the_request_and_what_was_committed_stands(stack: Running) -> None:
    async with Client(stack.router) as client:
        request_id = ""
        async with aclosing(client.generate(PROMPT, max_tokens=1900, ignore_eos=True)) as stream:
            async for event in stream:
                if isinstance(event, Accepted):
                    request_id = event.request_id
                if isinstance(event, Tokens):
                    break
        async with asyncio.timeout(20):
            events = [event async for event in client.resume(request_id, 0)]
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert finished.reason is FinishReason.CANCELLED
    assert 0 < finished.usage.output_tokens < 1900
    assert finished.receipt


async def test_cancel_ends_a_running_request_and_leaves_an_ended_one_as_it_is(stack: Running) -> None:
    async with Client(stack.router) as client:
        stream = client.generate(PROMPT, max_tokens=1900, ignore_eos=True, on_disconnect="continue")
        async for event in stream:
            if isinstance(event, Accepted):
                request_id = event.request_id
            if isinstance(event, Tokens):
                break
        assert await client.cancel(request_id) is FinishReason.CANCELLED
        assert await client.cancel(request_id) is FinishReason.CANCELLED
        answer = await client.complete(PROMPT, max_tokens=2)
        assert await client.cancel(answer.request_id) is FinishReason.LENGTH


async def test_an_answer_can_be_read_again_from_any_position(stack: Running) -> None:
    async with Client(stack.router) as client:
        answer = await client.complete(PROMPT, max_tokens=20, temperature=0.8, seed=5)
        for position in (0, 7, 20):
            events = [event async for event in client.resume(answer.request_id, position)]
            tokens = [token for event in events if isinstance(event, Tokens) for token in event.tokens]
            assert tuple(tokens) == answer.tokens[position:]
        assert await client.receipt(answer.request_id) == answer.receipt


async def test_a_request_that_goes_on_without_its_client_can_be_resumed(stack: Running) -> None:
    async with Client(stack.router) as client:
        async with aclosing(
            client.generate(PROMPT, max_tokens=48, ignore_eos=True, on_disconnect="continue")
        ) as stream:
            async for event in stream:
                if isinstance(event, Accepted):
                    request_id = event.request_id
                    break
        events = [event async for event in client.resume(request_id, 0)]
    assert isinstance(events[-1], Finished)
    assert events[-1].reason is FinishReason.LENGTH
    assert events[-1].usage.output_tokens == 48


async def test_a_prompt_seen_before_comes_from_the_store_and_gives_the_same_tokens(stack: Running, root: Path) -> None:
    prompt = heldout_prompts(root / "infra" / "models", 4)[3].text
    async with Client(stack.router) as client:
        cold = await client.complete(prompt, max_tokens=16, temperature=0.8, seed=1, tenant="warmth")
        warm = cold
        async with asyncio.timeout(20):
            while not warm.usage.cached_prompt_tokens:
                warm = await client.complete(prompt, max_tokens=16, temperature=0.8, seed=1, tenant="warmth")
        other = await client.complete(prompt, max_tokens=16, temperature=0.8, seed=1, tenant="another")
    assert cold.usage.cached_prompt_tokens == 0
    assert warm.usage.cached_prompt_tokens >= 16
    assert other.usage.cached_prompt_tokens == 0, "one tenant's blocks must not serve another"
    assert [t.id for t in cold.tokens] == [t.id for t in warm.tokens] == [t.id for t in other.tokens]


async def test_a_request_id_names_one_question(stack: Running) -> None:
    async with Client(stack.router) as client:
        first = await client.complete(PROMPT, max_tokens=4, request_id="once")
        again = await client.complete(PROMPT, max_tokens=4, request_id="once")
        assert again.tokens == first.tokens
        assert again.receipt == first.receipt
        with pytest.raises(AlreadyExists) as caught:
            await client.complete(PROMPT, max_tokens=5, request_id="once")
    assert caught.value.reason == "REQUEST_ID_TAKEN"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"prompt": ""}, "EMPTY_PROMPT"),
        ({"prompt": "x = 1\n" * 2000}, "PROMPT_TOO_LONG"),
        ({"temperature": -1.0}, "BAD_TEMPERATURE"),
        ({"temperature": math.nan}, "BAD_TEMPERATURE"),
        ({"top_p": 0.0}, "BAD_TOP_P"),
        ({"max_tokens": 0}, "BAD_MAX_TOKENS"),
        ({"max_tokens": 2**31}, "MAX_TOKENS_TOO_LARGE"),
        ({"prompt": [4096]}, "TOKEN_OUT_OF_VOCABULARY"),
        ({"request_id": "no spaces"}, "BAD_REQUEST_ID"),
    ],
)
async def test_bad_input_is_refused_by_reason_with_what_to_do(
    stack: Running, options: dict[str, object], reason: str
) -> None:
    arguments: dict[str, object] = {"prompt": PROMPT, "max_tokens": 4, **options}
    async with Client(stack.router) as client:
        with pytest.raises(InvalidArgument) as caught:
            await client.complete(**arguments)  # type: ignore[arg-type]  # drawn by name
    assert caught.value.reason == reason
    assert caught.value.help


async def test_an_unknown_model_and_an_unknown_request_are_not_found(stack: Running) -> None:
    async with Client(stack.router) as client:
        with pytest.raises(NotFound, match="gpt-9") as caught:
            await client.complete(PROMPT, model="gpt-9")
        assert "demo-target" in caught.value.help
        for call in (client.receipt("nobody"), client.cancel("nobody")):
            with pytest.raises(NotFound):
                await call


async def test_bytes_that_are_not_utf8_are_refused_and_nothing_is_lost(stack: Running) -> None:
    good = GenerateRequest(text="abc", sampling=SamplingParams(max_tokens=1))
    broken = good.SerializeToString().replace(b"abc", b"a\xffc")
    async with grpc.aio.insecure_channel(stack.router) as channel:
        call: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(
            "/countersign.v1.RouterService/Generate"
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(broken).read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "UTF-8" in (caught.value.details() or "") or "GenerateRequest" in (caught.value.details() or "")
