"""``countersign generate``: one prompt against a running stack."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from contextlib import aclosing, suppress
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from countersign import files
from countersign.services.runtime.errors import CountersignError, Internal, InvalidArgument, Unavailable

if TYPE_CHECKING:
    from countersign.cli.render import AnswerPrinter
    from countersign.client import Event, Finished, GenerateOptions, Token

ROUTER_VARIABLE = "CS_ROUTER"
DEFAULT_DATA_DIR = Path(".countersign")


class Draft(StrEnum):
    OFF = "off"
    MODEL = "model"


def generate(
    prompt: Annotated[str | None, typer.Argument(help="Text to continue, or - to read it from standard input.")] = None,
    *,
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from this file.", metavar="FILE")] = None,
    max_tokens: Annotated[int, typer.Option(help="The most tokens to generate.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep only the k likeliest tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens that make up this probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same tokens. Drawn here if needed.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this string. May be repeated.")] = None,
    draft: Annotated[Draft | None, typer.Option(help="Whether a draft model proposes. It changes only speed.")] = None,
    receipt: Annotated[Path | None, typer.Option(help="Write the signed receipt here.", metavar="FILE")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object when the answer is complete.")] = False,
    router: Annotated[
        str, typer.Option(help="Address of the router.", metavar="HOST:PORT", envvar=ROUTER_VARIABLE)
    ] = "",
    data_dir: Annotated[
        Path | None, typer.Option(help="Data folder of the stack to ask (.countersign).", metavar="FOLDER")
    ] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds after which the answer ends as it is.")] = None,
    model: Annotated[str, typer.Option(help="Which model, where more than one is served.")] = "",
    request_id: Annotated[str, typer.Option(help="A name of your own; asked again under it, the same goes on.")] = "",
) -> None:
    """Continue a prompt: text in two colours as it is committed, and a signed receipt."""
    text = read_prompt(prompt, prompt_file)
    check_writable(receipt)
    options: GenerateOptions = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "stop": stop or (),
        "drafting": None if draft is None else draft.value,
        "timeout": timeout,
        "model": model,
        "request_id": request_id,
    }
    printer = None if json_ else _printer()
    answer = Answering(text, receipt, printer)
    try:
        asyncio.run(_ask(router or router_address(data_dir), options, answer))
    finally:
        if printer is not None:
            printer.end()
    answer.conclude()


@dataclass(slots=True)
class Answering:
    """Takes the events of one answer: prints them, or keeps them for the JSON object; writes the receipt."""

    prompt: str
    receipt: Path | None
    printer: AnswerPrinter | None
    request_id: str = ""
    seed: int | None = None
    tokens: list[Token] = field(default_factory=list)
    hidden: int = 0
    finished: Finished | None = None
    seconds: float = 0.0
    _started: float = field(default_factory=time.perf_counter)

    def take(self, event: Event) -> None:
        from countersign.client import Accepted, Finished, Hidden, Tokens

        match event:
            case Accepted():
                self.request_id, self.seed = event.request_id, event.seed
                if self.printer is not None:  # not before: a refused prompt need not be read again
                    self.printer.prompt(self.prompt)
            case Tokens():
                self.tokens += event.tokens
                if self.printer is not None:
                    self.printer.tokens(event.tokens)
            case Hidden():
                self.hidden += event.count
            case Finished():
                self.finished, self.seconds = event, time.perf_counter() - self._started

    def conclude(self) -> None:
        """Write the receipt and print what stands at the end.

        Raises:
            Internal: reason ANSWER_FAILED, the target could not go on; NO_RECEIPT, one was wanted and none made.
            InvalidArgument: reason UNWRITABLE_FILE.
        """
        from countersign.client import FinishReason

        finished = self.finished
        if finished is None:
            raise Internal("the stream ended without its last event", reason="STREAM_ENDED")
        written = self.receipt if finished.receipt else None
        if written is not None:
            write_atomically(written, finished.receipt)
        if self.printer is None:
            print(json.dumps(self._summary(finished, written)))
        else:
            self.printer.footer(finished, self.seconds, written, hidden=self.hidden)
        if finished.reason is FinishReason.ERROR:
            raise Internal(f"the answer ended early: {finished.message}", reason="ANSWER_FAILED")
        if self.receipt is not None and written is None:
            raise Internal("the router could make no receipt for this answer", reason="NO_RECEIPT")

    def _summary(self, finished: Finished, written: Path | None) -> dict[str, Any]:
        return {
            "text": "".join(token.text for token in self.tokens),
            "token_ids": [token.id for token in self.tokens],
            "sources": [token.source for token in self.tokens],
            "hidden_tokens": self.hidden,
            "finish": finished.reason,
            "message": finished.message,
            "usage": asdict(finished.usage),
            "request_id": self.request_id,
            "seed": self.seed,
            "receipt": None if written is None else str(written),
            "seconds": round(self.seconds, 6),
        }


async def _ask(address: str, options: GenerateOptions, answer: Answering) -> None:
    from countersign.client import Client

    async with Client(address) as client:
        events = client.generate(answer.prompt, **options)
        try:
            async with aclosing(events):
                async for event in events:
                    answer.take(event)
        except asyncio.CancelledError:  # Ctrl-C: do not leave it to the router to notice that nobody listens
            with suppress(CountersignError):
                await client.cancel(answer.request_id)
            raise


def _printer() -> AnswerPrinter:
    from rich.console import Console

    from countersign.cli.render import AnswerPrinter

    return AnswerPrinter(Console(), Console(stderr=True))


def read_prompt(argument: str | None, file: Path | None) -> str:
    """The prompt from the command line, standard input ("-") or a file, exactly one of them.

    Raises:
        InvalidArgument: reason BAD_UTF8 or UNREADABLE_FILE.
        typer.BadParameter: none or two are given.

    """
    if (argument is None) == (file is None):
        raise typer.BadParameter("Give a PROMPT, - for standard input, or --prompt-file: one of them.")
    if argument is not None and argument != "-":
        return argument
    try:
        content = sys.stdin.buffer.read() if file is None else file.read_bytes()
    except OSError as error:
        raise InvalidArgument(f"{file} cannot be read: {error.strerror}", reason="UNREADABLE_FILE") from None
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        name = "standard input" if file is None else str(file)
        raise InvalidArgument(
            f"{name} is not valid UTF-8: byte {error.start} is 0x{content[error.start]:02x}",
            reason="BAD_UTF8",
            help="convert it to UTF-8 first",
        ) from None


def router_address(data_dir: Path | None) -> str:
    """Where the stack of a data folder has its router; without a folder named and without a stack, the usual place.

    Raises:
        Unavailable: reason NO_STACK, a folder was named and no stack runs there.

    """
    from countersign.client import DEFAULT_ADDRESS
    from countersign.services.runtime.stack import read_stack

    try:
        return read_stack(data_dir or DEFAULT_DATA_DIR).router
    except Unavailable:
        if data_dir is not None:
            raise
        return DEFAULT_ADDRESS


def check_writable(receipt: Path | None) -> None:
    """Find out before the answer is paid for. Raises InvalidArgument(UNWRITABLE_FILE)."""
    if receipt is not None and (receipt.is_dir() or not os.access(receipt.absolute().parent, os.W_OK)):
        raise _unwritable(receipt, "not a file in a folder that can be written to")


def write_atomically(file: Path, content: bytes) -> None:
    """Readers see the old file or the whole new one. Raises InvalidArgument(UNWRITABLE_FILE)."""
    try:
        files.write_atomically(file, content)
    except OSError as error:
        raise _unwritable(file, error.strerror or str(error)) from None


def _unwritable(file: Path, why: str) -> InvalidArgument:
    return InvalidArgument(
        f"{file} cannot be written: {why}", reason="UNWRITABLE_FILE", help="choose another --receipt"
    )
