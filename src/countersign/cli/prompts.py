"""Real prompts for the demo pair: openings of functions in standard-library modules that its training never saw."""

from __future__ import annotations

import hashlib
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from countersign.services.runtime.errors import NotFound

LINES_BEFORE = 10
_FUNCTION = re.compile(r"^[ ]*(async )?def \w+\(")


@dataclass(frozen=True, slots=True)
class Prompt:
    """``text`` is a piece of ``origin`` (path in the standard library and line) that ends inside a function's head."""

    origin: str
    text: str


def heldout_prompts(models: Path, count: int) -> list[Prompt]:
    """``count`` prompts, the same at every call on one Python release, spread over the held-out modules.

    Args:
        models: the folder that holds the demo pair and its ``heldout.txt``.
        count: how many.

    Raises:
        NotFound: there is no such list, or the modules do not hold as many.
    """
    listing = models / "heldout.txt"
    if not listing.is_file():
        raise NotFound(
            f"{listing} is not there, so no held-out prompt is known",
            reason="NO_HELDOUT_LIST",
            help="run from a checkout with the demo models",
        )
    names = [line.strip() for line in listing.read_text().splitlines() if line.strip() and not line.startswith("#")]
    root = Path(sysconfig.get_paths()["stdlib"])
    found = [prompt for name in names if (root / name).is_file() for prompt in _of_file(root / name, name)]
    found.sort(key=lambda prompt: hashlib.sha256(prompt.origin.encode()).digest())
    if len(found) < count:
        raise NotFound(f"{count} held-out prompts are wanted, this Python has {len(found)}", reason="TOO_FEW_PROMPTS")
    return found[:count]


def _of_file(path: Path, name: str) -> list[Prompt]:
    """A prompt for each function whose head is one line: the ``LINES_BEFORE`` lines before it, and that line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    prompts = []
    for number, line in enumerate(lines):
        if number >= LINES_BEFORE and _FUNCTION.match(line) and line.rstrip().endswith(":"):
            text = "\n".join(lines[number - LINES_BEFORE : number + 1])
            prompts.append(Prompt(f"{name}:{number + 1}", text))
    return prompts
