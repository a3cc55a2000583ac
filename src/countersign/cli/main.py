"""The command ``countersign``. A subcommand's module is imported only when that subcommand runs."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from countersign import __version__
from countersign.services.runtime.errors import CountersignError


@dataclass(frozen=True, slots=True)
class Lazy:
    """A subcommand: a function with typer's annotations, or a group of them; ``help`` is for the overview."""

    module: str
    functions: tuple[str, ...]
    help: str
    group: bool = False

    def load(self, name: str) -> Any:
        """The command, of typer's own (private) base class."""
        module = import_module(self.module)
        app = typer.Typer(help=self.help, no_args_is_help=self.group, add_completion=False)
        for function in self.functions:
            app.command(function if self.group else name)(getattr(module, function))
        if self.group:
            app.callback()(_nothing)  # without one, typer takes a group of one command for that command
        command = typer.main.get_command(app)
        command.name = name
        return command


COMMANDS = {
    "generate": Lazy("countersign.cli.generate", ("generate",), "Continue a prompt on a running stack."),
    "batch": Lazy("countersign.cli.batch", ("batch",), "Answer a file of prompts, each shared prefix computed once."),
    "audit": Lazy("countersign.cli.audit", ("audit",), "Check a receipt: its form, and its every token."),
    "calibrate": Lazy("countersign.cli.calibrate", ("calibrate",), "Measure what honest answers of a model score."),
    "receipt": Lazy("countersign.cli.audit", ("show",), "Look into a receipt.", group=True),
    "log": Lazy(
        "countersign.cli.log", ("status", "prove", "check"), "The log of all receipts, and proofs from it.", group=True
    ),
    "status": Lazy("countersign.cli.status", ("status",), "Who is there on a running stack, and whether all is well."),
    "top": Lazy("countersign.cli.top", ("top",), "How a running stack is doing, second by second."),
    "trace": Lazy("countersign.cli.trace", ("trace",), "Where one request's time went, as a waterfall."),
    "receipts": Lazy("countersign.cli.receipts", ("receipts",), "What a running stack has signed, and the verdicts."),
    "up": Lazy("countersign.cli.up", ("up",), "Run the whole stack here until interrupted."),
    "bench": Lazy("countersign.cli.bench", ("bench",), "Measure; benchmarks of a checkout."),
    "spec": Lazy(
        "countersign.cli.spec",
        ("check", "replay", "record", "status"),
        "Model-check the protocols, and replay runs.",
        group=True,
    ),
    "demo": Lazy("countersign.cli.demo", ("demo",), "See all of it at work on real code, in a minute."),
}


class LazyGroup(TyperGroup):
    """Lists its subcommands without importing them."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name, command in COMMANDS.items():
            self.add_command(TyperCommand(name, callback=None, help=command.help))

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, _, rest = super().resolve_command(ctx, args)
        return name, None if name is None else COMMANDS[name].load(name), rest


def build() -> TyperGroup:
    """The whole command line."""
    app = typer.Typer(
        cls=LazyGroup,
        help="LLM inference whose every token can be audited.",
        no_args_is_help=True,
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    return typer.main.get_group(app)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"countersign {__version__}")
        raise typer.Exit


def _root(
    _: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Each subcommand does its own work."""


def _nothing() -> None:
    """Each subcommand does its own work."""


def explain(error: CountersignError) -> str:
    """One line for people: what happened, then what to do."""
    message = error.message.rstrip(".")
    if not error.help:
        return f"{message}."
    advice = error.help.rstrip(".")
    end = "" if advice.endswith(("?", "!")) else "."
    return f"{message}. {advice[0].upper()}{advice[1:]}{end}"


def main() -> None:
    """Exit codes: 0, 1 for a failure, 2 for wrong usage, 130 for Ctrl-C; a subcommand may have its own."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # no terminal is too old for an answer
    try:
        build()(prog_name="countersign")
    except CountersignError as error:
        print(f"countersign: {explain(error)}", file=sys.stderr)
        sys.exit(1)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("countersign"):
            raise  # a bug, not an installation of the verifier alone
        advice = "install it with: pip install 'countersign[stack]'"
        print(f"countersign: this command needs {error.name}, which is not installed; {advice}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
