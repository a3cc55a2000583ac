"""CTranslate2 as a worker: its own converter, ``Generator.generate_batch``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import ctranslate2  # type: ignore[import-not-found]
from ctranslate2.converters import TransformersConverter  # type: ignore[import-not-found]

from .protocol import Load, Speculation, Tokens, Unsupported, keep, serve


class CTranslate2:
    """fp32, or weights and activations in int8."""

    version = ctranslate2.__version__

    def __init__(self, load: Load) -> None:
        if load.precision == "default":
            raise Unsupported("CTranslate2 runs in the precision that it is told")
        folder = keep(load.cache / "ctranslate2" / load.model.name, lambda out: _convert(load.model, out))
        self._generator = ctranslate2.Generator(
            str(folder),
            "cpu",
            compute_type={"fp32": "float32"}.get(load.precision, load.precision),
            intra_threads=load.threads,
        )
        self._vocabulary: list[str] = json.loads((folder / "vocabulary.json").read_text())

    def generate(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, speculation: Speculation | None, _drafted: int
    ) -> Tokens:
        """A batch's prompts run together up to the length of the shortest, the rest of each a token at a time."""
        if speculation:
            raise Unsupported("CTranslate2 has no speculative decoding")
        results = self._generator.generate_batch(
            [[self._vocabulary[i] for i in prompt] for prompt in prompts],
            max_length=new_tokens,
            end_token=[len(self._vocabulary)],
            include_prompt_in_result=False,
        )
        return [list(result.sequences_ids[0]) for result in results]


def _convert(model: Path, out: Path) -> None:
    TransformersConverter(str(model)).convert(str(out), force=True)


if __name__ == "__main__":
    serve(CTranslate2)
