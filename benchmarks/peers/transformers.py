"""Hugging Face transformers as a worker: ``generate`` as people call it, with SDPA attention and a dynamic cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from .protocol import Load, Speculation, Tokens, Unsupported, serve


class Transformers:
    """fp32 only: the numbers that the others are checked against."""

    version = transformers.__version__

    def __init__(self, load: Load) -> None:
        if load.precision != "fp32":
            raise Unsupported("transformers is measured in fp32 only")
        torch.set_num_threads(load.threads)
        self._model = _model(load.model)
        self._draft = _model(load.draft) if load.draft else None

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, speculation: Speculation | None, drafted: int
    ) -> Tokens:
        """Shorter prompts are padded on the left; speculation takes one prompt at a time."""
        if speculation and len(prompts) > 1:
            raise Unsupported("transformers' assisted generation takes one prompt at a time")
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        extra: dict[str, Any] = {}
        if speculation == "lookup":
            extra = {"prompt_lookup_num_tokens": drafted}
        elif speculation == "draft":
            if self._draft is None:
                raise Unsupported("no draft was loaded")
            self._draft.generation_config.num_assistant_tokens = drafted
            extra = {"assistant_model": self._draft}
        out = self._model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, **extra)
        rows: Tokens = out[:, width:].tolist()
        return rows


def _model(folder: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.generation_config
    config.eos_token_id, config.pad_token_id = None, 0
    # As a draft: always so many proposals, however sure it is, as with every other peer.
    config.num_assistant_tokens_schedule, config.assistant_confidence_threshold = "constant", 0.0
    return model


if __name__ == "__main__":
    serve(Transformers)
