"""A batch against a scripted router on a real gRPC server: what it asks again, what it gives up, what is in flight."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from countersign.batch.folder import BatchFolder
from countersign.batch.lines import read_lines
from countersign.batch.runner import BatchRunner, Progress
from countersign.client import Client
from countersign.services.runtime.errors import InvalidArgument, NotFound, ResourceExhausted, Unavailable
from countersign.services.runtime.rpc import RpcServer
from countersign.services.runtime.service import Call
from countersign.v1 import router_pb2, sampling_pb2
from countersign.v1.router_pb2 import Accepted, Finished, GenerateRequest, GenerateResponse, ModelInfo, StreamEvent

DEADLINE_S = 30


@dataclass
class Router:
    """Tokenizes a byte a token. ``script`` says what becomes of the n-th try of a prompt; by default it is answered.
    Nothing is, until ``gather`` of them were here at once.
    """

    script: Callable[[bytes, int], Finished | Exception] = lambda prompt, attempt: finished()
    asked: list[tuple[bytes, int]] = field(default_factory=list)
    tries: Counter[bytes] = field(default_factory=Counter)
    flying: int = 0
    most: int = 0
    gather: int = 1
    gathered: asyncio.Event = field(default_factory=asyncio.Event)
    address: str = ""
    descriptor = router_pb2.DESCRIPTOR.services_by_name["RouterService"]

    async def Generate(self, request: GenerateRequest, call: Call) -> AsyncIterator[GenerateResponse]:
        prompt = bytes(request.token_ids.ids)
        self.asked.append((prompt, request.sampling.seed))
        self.tries[prompt] += 1
        self.flying += 1
        self.most = max(self.most, self.flying)
        if self.most >= self.gather:
            self.gathered.set()
        try:
            await self.gathered.wait()
            await asyncio.sleep(0.01)
            end = self.script(prompt, self.tries[prompt])
            if isinstance(end, Exception):
                raise end
            yield GenerateResponse(event=StreamEvent(accepted=Accepted(request_id=f"r{len(self.asked)}")))
            yield GenerateResponse(event=StreamEvent(finished=end))
        finally:
            self.flying -= 1

    async def OpenActivations(
        self, request: router_pb2.OpenActivationsRequest, call: Call
    ) -> router_pb2.OpenActivationsResponse:
        raise NotImplementedError

    async def OpenHidden(self, request: router_pb2.OpenHiddenRequest, call: Call) -> router_pb2.OpenHiddenResponse:
        raise NotImplementedError

    async def Tokenize(self, request: router_pb2.TokenizeRequest, call: Call) -> router_pb2.TokenizeResponse:
        if request.text == "unreadable":
            raise InvalidArgument("no", reason="EMPTY_PROMPT")
        return router_pb2.TokenizeResponse(token_ids=request.text.encode())

    async def GetInfo(self, request: router_pb2.GetInfoRequest, call: Call) -> router_pb2.GetInfoResponse:
        return router_pb2.GetInfoResponse(models=[ModelInfo(name="demo", cache_tokens=320)])

    async def Resume(self, request: router_pb2.ResumeRequest, call: Call) -> AsyncIterator[router_pb2.ResumeResponse]:
        raise NotImplementedError
        yield

    async def Cancel(self, request: router_pb2.CancelRequest, call: Call) -> router_pb2.CancelResponse:
        raise NotImplementedError

    async def GetReceipt(self, request: router_pb2.GetReceiptRequest, call: Call) -> router_pb2.GetReceiptResponse:
        raise NotImplementedError


def finished(
    reason: sampling_pb2.FinishReason.ValueType = sampling_pb2.FINISH_REASON_LENGTH, receipt: bytes = b"signed"
) -> Finished:
    return Finished(reason=reason, usage=sampling_pb2.Usage(prompt_tokens=4, output_tokens=2), receipt=receipt)


@pytest.fixture
async def router() -> AsyncIterator[Router]:
    scripted, server = Router(), RpcServer("127.0.0.1:0")
    server.add(scripted)
    scripted.address = await server.start()
    yield scripted
    await server.stop(0)


def content(prompts: list[str], **body: Any) -> bytes:
    bodies = [{"prompt": prompt, "max_tokens": 8, **body} for prompt in prompts]
    lines = [{"custom_id": body["prompt"], "method": "POST", "url": "/v1/completions", "body": body} for body in bodies]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


async def run(router: Router, folder: Path, text: bytes, **options: Any) -> Progress:
    with BatchFolder(folder, "digest") as out:
        async with Client(router.address) as client, asyncio.timeout(DEADLINE_S):
            return await BatchRunner(client, out, **options).run(read_lines(text))


def errors(folder: Path) -> dict[str, str]:
    lines = (folder / "errors.jsonl").read_text().splitlines()
    return {entry["custom_id"]: entry["error"]["code"] for entry in map(json.loads, lines)}


async def test_a_full_or_absent_router_is_asked_again_with_the_same_seed(router: Router, tmp_path: Path) -> None:
    def script(prompt: bytes, attempt: int) -> Finished | Exception:
        refusals = [ResourceExhausted("full", reason="ROUTER_FULL"), Unavailable("gone", reason="NO_TARGET")]
        return refusals[attempt - 1] if attempt <= 2 and prompt.startswith(b"a") else finished()

    router.script = script
    progress = await run(router, tmp_path, content(["a1", "a2", "b"]))
    assert (progress.completed, progress.failed) == (3, 0)
    assert router.tries == {b"a1": 3, b"a2": 3, b"b": 1}
    assert len(set(router.asked)) == 3


async def test_a_router_that_stays_away_ends_the_batch_and_what_was_answered_stands(
    router: Router, tmp_path: Path
) -> None:
    def script(prompt: bytes, attempt: int) -> Finished | Exception:
        return finished() if prompt == b"good" else Unavailable("gone", reason="NO_TARGET")

    router.script = script
    with pytest.raises(Unavailable, match="run the same command again") as ended:
        await run(router, tmp_path, content(["good", "bad"]), patience=0.5)
    assert ended.value.reason == "NO_TARGET"
    assert errors(tmp_path) == {}
    router.script = lambda prompt, attempt: finished()
    progress = await run(router, tmp_path, content(["good", "bad"]))
    assert (progress.before, progress.completed) == (1, 1)
    assert router.tries[b"good"] == 1


async def test_an_answer_that_is_not_whole_or_has_no_receipt_is_an_error_of_its_line(
    router: Router, tmp_path: Path
) -> None:
    ends: dict[str, Finished | Exception] = {
        "DEADLINE": finished(sampling_pb2.FINISH_REASON_DEADLINE),
        "CANCELLED": finished(sampling_pb2.FINISH_REASON_CANCELLED),
        "ANSWER_FAILED": finished(sampling_pb2.FINISH_REASON_ERROR),
        "NO_RECEIPT": finished(receipt=b""),
        "UNKNOWN_MODEL": NotFound("no", reason="UNKNOWN_MODEL"),
    }
    router.script = lambda prompt, attempt: ends.get(prompt.decode(), finished())
    progress = await run(router, tmp_path, content([*ends, "unreadable", "good"]))
    assert (progress.completed, progress.failed) == (1, 6)
    assert errors(tmp_path) == {**{name: name for name in ends}, "unreadable": "EMPTY_PROMPT"}
    assert max(router.tries.values()) == 1


async def test_what_is_in_flight_follows_from_the_routers_cache_and_from_the_limit(
    router: Router, tmp_path: Path
) -> None:
    """A cache of 20 pages: ten lines of two run, and as many wait there; of lines that share one of them, 39."""

    async def most(folder: str, prompts: list[str], gather: int, **options: int) -> int:
        router.most, router.gather, router.gathered = 0, gather, asyncio.Event()
        await run(router, tmp_path / folder, content(prompts), **options)
        return router.most

    apart = [f"{number:02}" + "x" * 20 for number in range(50)]
    assert await most("a", apart, 20) == 20
    assert await most("b", ["x" * 20 + f"{number:02}" for number in range(60)], 39) == 39
    assert await most("c", apart, 4, most=4) == 4


async def test_lines_that_begin_alike_are_asked_one_after_the_other(router: Router, tmp_path: Path) -> None:
    prompts = [head * 20 + str(number) for number in range(6) for head in "abc"]
    await run(router, tmp_path, content(prompts), most=1)
    assert [prompt[:1] for prompt, _ in router.asked] == [b"a"] * 6 + [b"b"] * 6 + [b"c"] * 6
