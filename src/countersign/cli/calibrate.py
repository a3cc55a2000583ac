"""``countersign calibrate``: what honest answers of a model score, measured here and signed."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from countersign.services.runtime.errors import FailedPrecondition, InvalidArgument

if TYPE_CHECKING:
    from countersign.verify.difr.profile import Profile


def calibrate(
    model: Annotated[
        Path | None, typer.Option(help="Folder of the weights; the demo target by default.", metavar="FOLDER")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the profile and its key; the model's by default.", metavar="FOLDER")
    ] = None,
    key: Annotated[
        Path | None, typer.Option(help="Signing key, made if there is none (keys/calibration.key).", metavar="FILE")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="One prompt a line; held-out code by default.", metavar="FILE")
    ] = None,
    answers: Annotated[int, typer.Option(help="Prompts that each condition answers.", min=1)] = 384,
    tokens: Annotated[int, typer.Option(help="Tokens of each answer.", min=1)] = 100,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Run a model honestly in every way there is, count what an audit finds, and sign it as the model's profile."""
    import torch

    from countersign.services.engine.errors import EngineError
    from countersign.services.engine.text import Tokenizer
    from countersign.services.runtime.config import load
    from countersign.verify.difr import calibration, profile
    from countersign.verify.errors import KeyFileError
    from countersign.verify.keys import load_or_create_signing_key, write_public

    torch.set_num_threads(1)  # small passes: more threads mostly wait for each other
    config = load(None, os.environ, [])
    folder = model or config.target.model
    try:
        signer = load_or_create_signing_key(key or config.data_dir / "keys" / "calibration.key")
        tokenizer = Tokenizer(folder)
        asked = [tokenizer.encode(text, plain=True) for text in _prompts(prompts, folder.parent, answers)]
        made = calibration.calibrate(folder, asked, tokens, time.time_ns() // 1_000_000, _tell)
        target = out or folder
        target.mkdir(parents=True, exist_ok=True)
        (target / profile.FILE).write_bytes(profile.sign(made, signer))
        write_public(target / profile.KEY_FILE, signer.public_key())
    except EngineError as error:
        raise FailedPrecondition(
            f"{folder} cannot be calibrated: {error}", reason="NOT_CALIBRATED", help="name a Hugging Face folder"
        ) from error
    except (KeyFileError, OSError) as error:
        raise FailedPrecondition(str(error), reason="NOT_WRITTEN", help="name another file (--key, --out)") from error
    _print(made, target / profile.FILE, as_json=json_)


def _prompts(file: Path | None, models: Path, count: int) -> list[str]:
    if file is None:
        from countersign.cli.prompts import heldout_prompts

        return [prompt.text for prompt in heldout_prompts(models, count)]
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()][:count]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{file}: {error}", reason="BAD_PROMPTS", help="name a text file") from error
    if not lines:
        raise InvalidArgument(f"{file} has no prompt", reason="BAD_PROMPTS", help="write one a line")
    return lines


def _tell(line: str) -> None:
    print(f"countersign: {line}", file=sys.stderr, flush=True)


def _print(made: Profile, file: Path, *, as_json: bool) -> None:
    entries = [
        {
            "provider": str(entry.provider),
            "reference": str(entry.reference),
            "exact": entry.exact,
            "answers": entry.answers,
            "tokens": entry.tokens,
            "differing": entry.above[0] / entry.tokens,
            "out_of_support": entry.outside,
            "largest": entry.largest,
        }
        for entry in made.entries
    ]
    if as_json:
        print(json.dumps({"profile": str(file), "model": made.model, "entries": entries}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("provider", "reference", "tokens", "differing", "out of support", "largest score")
    for entry in made.entries:
        differing = "none: the same bits" if entry.exact else f"{entry.above[0] / entry.tokens:.3%}"
        cells = (str(entry.provider), str(entry.reference), str(entry.tokens), differing)
        table.add_row(*cells, str(entry.outside), f"{entry.largest:.3g}")
    Console().print(table)
    print(file)
