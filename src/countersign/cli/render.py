"""An answer on a terminal: who had each token first is told by its colour."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style

from countersign.cli.printable import PICTURES
from countersign.client import Finished, Token, TokenSource

PROMPT = Style(dim=True)
NOTE = Style(dim=True)
# Cyan and yellow stay apart for colour-blind readers, on dark and light backgrounds alike.
SOURCES = {
    TokenSource.DRAFT: Style(color="cyan"),
    TokenSource.TARGET: Style(color="yellow"),
    TokenSource.UNKNOWN: Style.null(),
}


class AnswerPrinter:
    """Prints one answer as it comes: the text to ``console``, the footer to ``notes`` (the same console by default).

    Without a terminal the text goes out byte for byte, uncoloured. With NO_COLOR it is uncoloured too.
    """

    def __init__(self, console: Console, notes: Console | None = None) -> None:
        self._console = console
        self._notes = notes or console
        self._line_open = False

    def prompt(self, text: str) -> None:
        self._write(self._console, text, PROMPT)

    def tokens(self, tokens: Iterable[Token]) -> None:
        for token in tokens:
            self._write(self._console, token.text, SOURCES[token.source])

    def end(self) -> None:
        """End the line, so that what is printed next starts a new one."""
        if self._line_open:
            self._write(self._console, "\n", Style.null())

    def footer(self, finished: Finished, seconds: float, receipt: Path | None = None, *, hidden: int = 0) -> None:
        """One line: tokens, rate, drafts, tokens per target pass, why it ended, where the receipt is."""
        self.end()
        if _coloured(self._notes):
            for source in (TokenSource.DRAFT, TokenSource.TARGET):
                self._write(self._notes, f"■ {source} ", SOURCES[source])
        parts = [*figures(finished, seconds), f"ended by {finished.reason}"]
        if hidden:
            parts.insert(1, f"{hidden} of them hidden")
        if receipt is not None:
            parts.append(f"receipt {receipt}")
        self._write(self._notes, " · ".join(parts) + "\n", NOTE)
        if finished.message:
            self._write(self._notes, finished.message + "\n", Style.null())

    def _write(self, console: Console, text: str, style: Style) -> None:
        if not text:
            return
        shown = text.translate(PICTURES) if console.is_terminal else text
        # Segments pass through as they are: no markup, no wrapping, no tabs made into spaces.
        segment = Segment(shown, style if _coloured(console) else None)
        console.print(Segments([segment]), soft_wrap=True, end="")
        if console is self._console:
            self._line_open = not text.endswith("\n")


def figures(finished: Finished, seconds: float) -> list[str]:
    """The numbers of the footer, each as a phrase."""
    usage = finished.usage
    rate = usage.output_tokens / seconds if seconds > 0 else 0.0
    parts = [f"{usage.output_tokens} tokens in {seconds:.2f} s ({rate:.1f} tokens/s)"]
    if usage.drafted_tokens:
        share = usage.accepted_tokens / usage.drafted_tokens
        parts.append(f"accepted {usage.accepted_tokens} of {usage.drafted_tokens} drafted ({share:.0%})")
    else:
        parts.append("nothing drafted")
    if usage.target_passes:
        parts.append(f"{usage.output_tokens / usage.target_passes:.2f} tokens per pass")
    return parts


def _coloured(console: Console) -> bool:
    return console.color_system is not None and not console.no_color
