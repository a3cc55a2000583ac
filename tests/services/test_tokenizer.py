"""The tokenizer service: handlers called as the runtime calls them, and the served process over gRPC."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from countersign.services.engine.text import Tokenizer
from countersign.services.runtime.config import load
from countersign.services.runtime.errors import FailedPrecondition, InvalidArgument
from countersign.services.runtime.rpc import Channel, RpcServer
from countersign.services.runtime.service import Call, Context
from countersign.services.tokenizer.service import INLINE_SIZE, MAX_TEXT_BYTES, MAX_TOKENS, TokenizerService, create
from countersign.v1.tokenizer_pb2 import (
    CheckCanonicalRequest,
    DecodeRequest,
    DecodeResponse,
    EncodeRequest,
    EncodeResponse,
)

CALL = Call(deadline_unix_ms=2**53, transport="nats")


@pytest.fixture(scope="module")
def tokenizer(demo_models: dict[str, Path]) -> Tokenizer:
    return Tokenizer(demo_models["target"])


@pytest.fixture
def service(tokenizer: Tokenizer) -> TokenizerService:
    return TokenizerService(tokenizer)


@pytest.fixture
async def channel(service: TokenizerService) -> AsyncIterator[Channel]:
    server = RpcServer("127.0.0.1:0")
    server.add(service)
    channel = Channel(await server.start())
    yield channel
    await channel.close()
    await server.stop(0)


async def test_a_prompt_begins_with_the_begin_of_text_token_unless_plain(service: TokenizerService) -> None:
    whole = await service.Encode(EncodeRequest(text="def f(x):\n"), CALL)
    plain = await service.Encode(EncodeRequest(text="def f(x):\n", plain=True), CALL)
    assert list(whole.token_ids) == [0, *plain.token_ids]


async def test_text_comes_back_from_its_tokens_over_grpc(channel: Channel) -> None:
    text = "naïve = '中文😀'\r\n\tx\0"
    encode, decode = "/countersign.v1.TokenizerService/Encode", "/countersign.v1.TokenizerService/Decode"
    encoded = await channel.unary(encode, EncodeRequest(text=text, plain=True), EncodeResponse, timeout=10)
    request = DecodeRequest(token_ids=encoded.token_ids, final=True)
    decoded = await channel.unary(decode, request, DecodeResponse, timeout=10)
    assert len(decoded.pieces) == len(encoded.token_ids)
    assert "".join(decoded.pieces) == text


async def test_an_open_character_stays_with_the_caller_until_it_is_complete(service: TokenizerService) -> None:
    ids = list((await service.Encode(EncodeRequest(text="x😀", plain=True), CALL)).token_ids)
    first = await service.Decode(DecodeRequest(token_ids=ids[:-1]), CALL)
    done = len(first.pieces)
    rest = await service.Decode(DecodeRequest(context_ids=ids[:done], token_ids=ids[done:]), CALL)
    assert ("".join(first.pieces), "".join(rest.pieces)) == ("x", "😀")


async def test_long_texts_are_worked_on_off_the_event_loop(demo_models: dict[str, Path]) -> None:
    threads: list[int] = []

    class Noting(Tokenizer):
        def encode(self, text: str, plain: bool = False) -> list[int]:
            threads.append(threading.get_ident())
            return super().encode(text, plain)

    service = TokenizerService(Noting(demo_models["target"]))
    text = "x = 1\n" * INLINE_SIZE
    encoded = await service.Encode(EncodeRequest(text=text), CALL)
    decoded = await service.Decode(DecodeRequest(token_ids=encoded.token_ids, final=True), CALL)
    assert "".join(decoded.pieces) == text
    await service.Encode(EncodeRequest(text="x"), CALL)
    here = threading.get_ident()
    assert [thread == here for thread in threads] == [False, True]


async def test_an_empty_text_is_refused(channel: Channel) -> None:
    with pytest.raises(InvalidArgument) as refused:
        await channel.unary("/countersign.v1.TokenizerService/Encode", EncodeRequest(), EncodeResponse, timeout=10)
    assert refused.value.reason == "EMPTY_PROMPT"


async def test_a_text_beyond_the_bound_is_refused(service: TokenizerService) -> None:
    with pytest.raises(InvalidArgument) as refused:
        await service.Encode(EncodeRequest(text="é" * (MAX_TEXT_BYTES // 2) + "x"), CALL)
    assert refused.value.reason == "TEXT_TOO_LONG"


async def test_ids_outside_the_vocabulary_are_refused_by_name(service: TokenizerService) -> None:
    for request in (DecodeRequest(token_ids=[1, 4096]), DecodeRequest(context_ids=[4096])):
        with pytest.raises(InvalidArgument, match="4096") as refused:
            await service.Decode(request, CALL)
        assert refused.value.reason == "TOKEN_OUT_OF_VOCABULARY"
    with pytest.raises(InvalidArgument, match="4294967295") as refused:
        await service.CheckCanonical(CheckCanonicalRequest(token_ids=[2**32 - 1]), CALL)
    assert refused.value.reason == "TOKEN_OUT_OF_VOCABULARY"


async def test_more_tokens_than_the_bound_are_refused(service: TokenizerService) -> None:
    with pytest.raises(InvalidArgument) as refused:
        await service.Decode(DecodeRequest(token_ids=[1] * (MAX_TOKENS + 1)), CALL)
    assert refused.value.reason == "TOO_MANY_TOKENS"


async def test_no_tokens_have_no_text(service: TokenizerService) -> None:
    assert list((await service.Decode(DecodeRequest(final=True), CALL)).pieces) == []


async def test_canonical_ids_are_told_from_others(service: TokenizerService, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("return", plain=True)
    letters = [token for letter in "return" for token in tokenizer.encode(letter, plain=True)]
    assert letters != ids
    good = await service.CheckCanonical(CheckCanonicalRequest(token_ids=ids), CALL)
    bad = await service.CheckCanonical(CheckCanonicalRequest(token_ids=letters), CALL)
    assert (good.canonical, bad.canonical) == (True, False)
    assert list(bad.canonical_ids) == ids


async def test_a_service_without_a_tokenizer_says_what_is_missing_and_which_setting_to_change(tmp_path: Path) -> None:
    context = cast("Context", SimpleNamespace(config=load(None, {}, [f"tokenizer.model={tmp_path}"])))
    with pytest.raises(FailedPrecondition, match=r"no readable tokenizer\.json") as refused:
        await create(context)
    assert "tokenizer.model" in refused.value.help
