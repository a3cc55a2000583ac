"""``countersign generate`` and the command line around it, against a scripted router on a real gRPC server."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from countersign.cli.generate import router_address
from countersign.cli.main import COMMANDS, main
from countersign.cli.render import AnswerPrinter
from countersign.client import DEFAULT_ADDRESS, Finished, FinishReason, Token, TokenSource, Usage
from countersign.services.runtime.errors import InvalidArgument, Unavailable
from countersign.services.runtime.rpc import RpcServer
from countersign.services.runtime.service import Call
from countersign.services.runtime.stack import Stack, write_stack
from countersign.v1 import router_pb2, sampling_pb2
from countersign.v1.router_pb2 import StreamEvent

RUN = [sys.executable, "-c", "from countersign.cli.main import main; main()"]
DEADLINE_S = 30

USAGE = {"prompt_tokens": 3, "output_tokens": 4, "drafted_tokens": 8, "accepted_tokens": 2, "target_passes": 2}
TEXTS = ["(x", "):\t\r\n", "", "中[bold]\n"]
DRAFTED, OWN = router_pb2.TOKEN_SOURCE_DRAFT, router_pb2.TOKEN_SOURCE_TARGET


def finished(reason: sampling_pb2.FinishReason.ValueType, receipt: bytes = b"signed", message: str = "") -> StreamEvent:
    usage = sampling_pb2.Usage(**USAGE)
    return StreamEvent(finished=router_pb2.Finished(reason=reason, usage=usage, receipt=receipt, message=message))


ACCEPTED = StreamEvent(accepted=router_pb2.Accepted(request_id="r1", model="demo", prompt_tokens=3))
TOKENS = StreamEvent(
    tokens=router_pb2.Tokens(
        tokens=[
            router_pb2.Token(id=i, text=text, source=source)
            for i, (text, source) in enumerate(zip(TEXTS, [DRAFTED, DRAFTED, OWN, OWN], strict=True))
        ]
    )
)
WHOLE: list[Any] = [ACCEPTED, TOKENS, finished(sampling_pb2.FINISH_REASON_LENGTH)]


@dataclass
class ScriptedRouter:
    """Replays its events for each Generate; an exception in them is raised, None waits until the client leaves."""

    events: list[Any] = field(default_factory=lambda: list(WHOLE))
    asked: list[router_pb2.GenerateRequest] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    address: str = ""
    descriptor = router_pb2.DESCRIPTOR.services_by_name["RouterService"]

    async def Generate(
        self, request: router_pb2.GenerateRequest, call: Call
    ) -> AsyncIterator[router_pb2.GenerateResponse]:
        self.asked.append(request)
        for event in self.events:
            if event is None:
                await asyncio.Event().wait()
            if isinstance(event, Exception):
                raise event
            yield router_pb2.GenerateResponse(event=event)

    async def Cancel(self, request: router_pb2.CancelRequest, call: Call) -> router_pb2.CancelResponse:
        self.cancelled.append(request.request_id)
        return router_pb2.CancelResponse(reason=sampling_pb2.FINISH_REASON_CANCELLED)

    async def Resume(self, request: router_pb2.ResumeRequest, call: Call) -> AsyncIterator[router_pb2.ResumeResponse]:
        raise NotImplementedError
        yield

    async def GetReceipt(self, request: router_pb2.GetReceiptRequest, call: Call) -> router_pb2.GetReceiptResponse:
        raise NotImplementedError

    async def OpenActivations(
        self, request: router_pb2.OpenActivationsRequest, call: Call
    ) -> router_pb2.OpenActivationsResponse:
        raise NotImplementedError

    async def OpenHidden(self, request: router_pb2.OpenHiddenRequest, call: Call) -> router_pb2.OpenHiddenResponse:
        raise NotImplementedError

    async def Tokenize(self, request: router_pb2.TokenizeRequest, call: Call) -> router_pb2.TokenizeResponse:
        raise NotImplementedError

    async def GetInfo(self, request: router_pb2.GetInfoRequest, call: Call) -> router_pb2.GetInfoResponse:
        raise NotImplementedError


@pytest.fixture
async def router() -> AsyncIterator[ScriptedRouter]:
    scripted, server = ScriptedRouter(), RpcServer("127.0.0.1:0")
    server.add(scripted)
    scripted.address = await server.start()
    yield scripted
    await server.stop(0)


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Command = Callable[..., Awaitable[Result]]


@pytest.fixture
def command(router: ScriptedRouter, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs ``countersign ARGS`` as the installed script does, beside the server's event loop."""

    async def run(*args: str, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "argv", ["countersign", *args])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = await asyncio.wait_for(asyncio.to_thread(_exit_code), DEADLINE_S)
        captured = capfd.readouterr()
        return Result(code, captured.out, captured.err)

    monkeypatch.setenv("CS_ROUTER", router.address)
    return run


def _exit_code() -> int:
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


async def test_text_goes_out_byte_for_byte_where_there_is_no_terminal(command: Command) -> None:
    result = await command("generate", "def f")
    assert result.code == 0
    assert result.out == "def f" + "".join(TEXTS)
    assert "\x1b" not in result.out + result.err


async def test_the_footer_tells_rate_acceptance_and_reason(command: Command) -> None:
    footer = (await command("generate", "def f")).err
    for part in ("4 tokens in", "tokens/s", "accepted 2 of 8 drafted (25%)", "2.00 tokens per pass", "ended by length"):
        assert part in footer
    assert footer.count("\n") == 1


async def test_every_option_reaches_the_router(command: Command, router: ScriptedRouter) -> None:
    options = "--max-tokens 7 --temperature 0.5 --top-k 40 --top-p 0.9 --seed 18446744073709551615"
    more = "--stop x --stop y --draft off --timeout 2 --model demo --request-id mine"
    assert (await command("generate", "def", *options.split(), *more.split())).code == 0
    assert router.asked == [
        router_pb2.GenerateRequest(
            request_id="mine",
            model="demo",
            text="def",
            sampling=sampling_pb2.SamplingParams(
                temperature=0.5, top_k=40, top_p=0.9, seed=2**64 - 1, max_tokens=7, stop=["x", "y"]
            ),
            drafting=sampling_pb2.DRAFTING_OFF,
            timeout_ms=2000,
            on_disconnect=router_pb2.ON_DISCONNECT_CANCEL,
        )
    ]


async def test_json_is_one_object_with_all_of_the_answer(
    command: Command, router: ScriptedRouter, tmp_path: Path
) -> None:
    receipt = tmp_path / "answer.receipt"
    result = await command("generate", "def", "--json", "--temperature", "1", "--receipt", str(receipt))
    answer = json.loads(result.out)
    assert answer.pop("seconds") > 0
    assert answer == {
        "text": "".join(TEXTS),
        "token_ids": [0, 1, 2, 3],
        "sources": ["draft", "draft", "target", "target"],
        "hidden_tokens": 0,
        "finish": "length",
        "message": "",
        "usage": {**USAGE, "cached_prompt_tokens": 0},
        "request_id": "r1",
        "seed": router.asked[0].sampling.seed,
        "receipt": str(receipt),
    }
    assert (result.code, result.err) == (0, "")


async def test_the_receipt_is_written_whole_or_not_at_all(command: Command, tmp_path: Path) -> None:
    receipt = tmp_path / "answer.receipt"
    receipt.write_bytes(b"an older one")
    result = await command("generate", "def", "--receipt", str(receipt))
    assert (result.code, receipt.read_bytes()) == (0, b"signed")
    assert str(receipt) in result.err
    assert names_in(tmp_path) == ["answer.receipt"]


async def test_a_receipt_that_cannot_be_written_is_refused_before_the_answer(
    command: Command, router: ScriptedRouter, tmp_path: Path
) -> None:
    for path in (tmp_path, tmp_path / "missing" / "answer.receipt"):
        result = await command("generate", "def", "--receipt", str(path))
        assert result.code == 1
        assert str(path) in result.err
    assert router.asked == []


async def test_an_answer_without_its_receipt_is_a_failure_if_one_was_wanted(
    command: Command, router: ScriptedRouter, tmp_path: Path
) -> None:
    router.events[-1] = finished(sampling_pb2.FINISH_REASON_LENGTH, receipt=b"")
    result = await command("generate", "def", "--json", "--receipt", str(tmp_path / "answer.receipt"))
    assert result.code == 1
    assert json.loads(result.out)["receipt"] is None
    assert names_in(tmp_path) == []
    assert (await command("generate", "def")).code == 0


async def test_an_answer_that_the_target_could_not_finish_is_a_failure(
    command: Command, router: ScriptedRouter
) -> None:
    router.events[-1] = finished(sampling_pb2.FINISH_REASON_ERROR, message="the logits are not finite")
    result = await command("generate", "def")
    assert result.code == 1
    assert "the logits are not finite" in result.err
    assert "Traceback" not in result.err


async def test_the_prompt_comes_from_standard_input_or_a_file(
    command: Command, router: ScriptedRouter, tmp_path: Path
) -> None:
    (tmp_path / "prompt.py").write_bytes("def é(\r\n".encode())
    await command("generate", "-", stdin="def 中(\n".encode())
    await command("generate", "--prompt-file", str(tmp_path / "prompt.py"))
    assert [request.text for request in router.asked] == ["def 中(\n", "def é(\r\n"]


@pytest.mark.parametrize(
    "args", [["generate"], ["generate", "def", "--prompt-file", "x"], ["generate", "def", "--nope"]]
)
async def test_wrong_usage_exits_2_and_says_how_to_get_help(command: Command, args: list[str]) -> None:
    result = await command(*args)
    assert (result.code, result.out) == (2, "")
    assert "--help" in result.err or "-h" in result.err


async def test_text_that_is_not_utf8_is_refused_wherever_it_comes_from(
    command: Command, router: ScriptedRouter, tmp_path: Path
) -> None:
    (tmp_path / "latin1.py").write_bytes("naïve".encode("latin-1"))
    for result in (
        await command("generate", "-", stdin=b"a\xffb"),
        await command("generate", "--prompt-file", str(tmp_path / "latin1.py")),
        await command("generate", os.fsdecode(b"a\xffb")),
    ):
        assert result.code == 1
        assert result.err.startswith("countersign: ")
        assert "not valid UTF-8" in result.err
        assert "Traceback" not in result.err
    assert router.asked == []


async def test_a_prompt_file_that_is_not_there_is_named(command: Command, tmp_path: Path) -> None:
    result = await command("generate", "--prompt-file", str(tmp_path / "nowhere.py"))
    assert result.code == 1
    assert "nowhere.py cannot be read: No such file" in result.err


async def test_a_refusal_is_one_line_with_what_to_do(command: Command, router: ScriptedRouter) -> None:
    router.events = [InvalidArgument("the prompt is empty", reason="EMPTY_PROMPT", help="send some text to continue")]
    result = await command("generate", "")
    assert (result.code, result.out) == (1, "")
    assert result.err == "countersign: the prompt is empty. Send some text to continue.\n"


async def test_a_failure_in_the_middle_keeps_the_text_and_starts_a_line_of_its_own(
    command: Command, router: ScriptedRouter
) -> None:
    router.events = [ACCEPTED, StreamEvent(tokens=router_pb2.Tokens(tokens=TOKENS.tokens.tokens[:1]))]
    result = await command("generate", "def f")
    assert (result.code, result.out) == (1, "def f(x\n")
    assert result.err.startswith("countersign: the router ended the stream")


async def test_nobody_at_the_address_is_an_error_with_help(command: Command) -> None:
    result = await command("generate", "def", "--router", "127.0.0.1:1")
    assert result.code == 1
    assert "127.0.0.1:1" in result.err
    assert "Traceback" not in result.err


def test_the_router_of_a_data_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert router_address(None) == DEFAULT_ADDRESS
    with pytest.raises(Unavailable) as raised:
        router_address(tmp_path)
    assert raised.value.reason == "NO_STACK"
    stack = Stack(router="127.0.0.1:5000", nats="nats://127.0.0.1:4222", pid=os.getpid(), started=0)
    for folder in (tmp_path, tmp_path / ".countersign"):
        folder.mkdir(exist_ok=True)
        write_stack(folder, stack)
    assert router_address(None) == router_address(tmp_path) == "127.0.0.1:5000"


async def test_ctrl_c_cancels_the_request_and_exits_130(router: ScriptedRouter) -> None:
    router.events = [ACCEPTED, TOKENS, None]
    process = await asyncio.create_subprocess_exec(
        *RUN,
        "generate",
        "def f",
        "--router",
        router.address,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        await asyncio.wait_for(process.stdout.readuntil(TEXTS[-1].encode()), DEADLINE_S)
        process.send_signal(signal.SIGINT)
        _, err = await asyncio.wait_for(process.communicate(), DEADLINE_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    assert (process.returncode, router.cancelled) == (130, ["r1"])
    assert b"Traceback" not in err


async def test_help_shows_each_command_without_importing_any(command: Command) -> None:
    program = (
        "import sys\nfrom countersign.cli.main import main\nsys.argv = ['countersign', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'nats', 'grpc', 'tokenizers', 'numpy', 'cwt'} & sys.modules.keys()), file=sys.stderr)"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await asyncio.wait_for(process.communicate(), DEADLINE_S)
    assert err.decode().strip() == "[]"
    for name in ("generate", "audit", "receipt", "up", "demo"):
        assert f" {name} " in out.decode()


@pytest.mark.parametrize("name", list(COMMANDS))
async def test_each_command_explains_its_own_options(command: Command, name: str) -> None:
    result = await command(name, "--help")
    assert result.code == 0
    assert f"countersign {name}" in result.out
    assert {
        "generate": "--receipt",
        "batch": "--cache-tokens",
        "audit": "--model",
        "calibrate": "--tokens",
        "receipt": "show",
        "log": "prove",
        "up": "--set",
        "demo": "--json",
        "bench": "--quick",
        "spec": "replay",
        "status": "--nats",
        "top": "--once",
        "trace": "REQUEST",
        "receipts": "--verdict",
    }[name] in result.out


async def test_a_mistyped_command_is_answered_with_the_right_one(command: Command) -> None:
    result = await command("genrate", "def")
    assert result.code == 2
    assert "Did you mean 'generate'" in result.err


async def test_the_version_is_told(command: Command) -> None:
    assert (await command("--version")).out == "countersign 0.1.0\n"


TERMINAL_ANSWER = Finished(FinishReason.STOP, Usage(**USAGE), b"signed")


def printed(*, no_color: bool = False, tokens: list[Token], footer: bool = False) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="standard", no_color=no_color, width=20)
    printer = AnswerPrinter(console)
    printer.prompt("def")
    printer.tokens(tokens)
    if footer:
        printer.footer(TERMINAL_ANSWER, 2.0)
    return out.getvalue()


def test_on_a_terminal_the_colour_of_a_token_tells_who_had_it_first() -> None:
    tokens = [Token(1, TokenSource.DRAFT, " a"), Token(2, TokenSource.TARGET, " b")]
    assert printed(tokens=tokens) == "\x1b[2mdef\x1b[0m\x1b[36m a\x1b[0m\x1b[33m b\x1b[0m"
    assert printed(tokens=tokens, no_color=True) == "def a b"


def test_the_footer_has_a_legend_where_there_are_colours() -> None:
    assert "\x1b[36m■ draft \x1b[0m\x1b[33m■ target \x1b[0m" in printed(tokens=[], footer=True)
    plain = printed(tokens=[], footer=True, no_color=True)
    assert plain.startswith("def\n4 tokens in 2.00 s (2.0 tokens/s) · accepted 2 of 8")


def test_an_answer_cannot_steer_the_terminal_or_be_taken_for_markup() -> None:
    hostile = Token(1, TokenSource.UNKNOWN, "\x1b]0;x\x07[red]\x9b2J\r" + "long " * 10 + "\ttab\n")
    assert printed(tokens=[hostile], no_color=True) == "def␛]0;x␇[red]\ufffd2J␍" + "long " * 10 + "\ttab\n"
