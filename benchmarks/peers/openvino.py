"""OpenVINO GenAI as a worker: optimum's export in fp32, ``LLMPipeline`` and ``ContinuousBatchingPipeline``."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov  # type: ignore[import-not-found]
import openvino_genai as genai  # type: ignore[import-not-found]

from .protocol import Load, Speculation, Tokens, Unsupported, keep, serve

_FP32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


class OpenVINO:
    """fp32: weights, arithmetic and KV cache. default: its own choice (bf16 where the CPU has AVX-512 BF16)."""

    version = genai.__version__.split("-")[0]

    def __init__(self, load: Load) -> None:
        if load.precision == "int8":
            raise Unsupported("OpenVINO GenAI is measured in fp32 and at its default precision")
        folders = [folder and _export(load, folder) for folder in (load.model, load.draft)]
        self._model, self._draft = map(str, folders)
        self._properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": load.threads}
        self._properties |= _FP32 if load.precision == "fp32" else {}
        self._pipelines: dict[str, Any] = {}

    def generate(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, speculation: Speculation | None, drafted: int
    ) -> Tokens:
        """One prompt through LLMPipeline, several through continuous batching."""
        config = genai.GenerationConfig(max_new_tokens=new_tokens, ignore_eos=True, do_sample=False)
        if speculation:
            config.num_assistant_tokens = min(drafted, new_tokens)
        if speculation == "lookup":
            config.max_ngram_size = 3
        inputs = [ov.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        if len(prompts) > 1:
            if speculation:
                raise Unsupported("OpenVINO GenAI is measured with speculation on one stream only")
            results = self._pipeline("batch").generate(inputs, [config] * len(inputs))
            return [list(result.m_generation_ids[0]) for result in results]
        result = self._pipeline(speculation or "plain").generate(inputs[0], config)
        return [list(result.tokens[0])]

    def _pipeline(self, kind: str) -> Any:
        if kind not in self._pipelines:
            self._pipelines[kind] = self._make(kind)
        return self._pipelines[kind]

    def _make(self, kind: str) -> Any:
        # Its default keeps the prompt's KV for the next request of the same prompt; no other peer is measured so.
        scheduler = genai.SchedulerConfig()
        scheduler.enable_prefix_caching, scheduler.cache_size = False, 2
        if kind == "batch":
            return genai.ContinuousBatchingPipeline(self._model, scheduler, "CPU", self._properties)
        extra: dict[str, Any] = {"scheduler_config": scheduler}
        if kind == "draft":
            extra["draft_model"] = genai.draft_model(self._draft, "CPU", **self._properties)
        if kind == "lookup":
            extra["prompt_lookup"] = True
        return genai.LLMPipeline(self._model, "CPU", **self._properties, **extra)


def _export(load: Load, model: Path) -> Path:
    """optimum-intel wants older packages than the other peers: they lie apart (install.py)."""

    def make(out: Path) -> None:
        program = "import sys; from optimum.commands.optimum_cli import main; sys.exit(main())"
        task = ["--task", "text-generation-with-past", "--weight-format", "fp32"]
        command = [sys.executable, "-c", program, "export", "openvino", "--model", str(model), *task, str(out)]
        subprocess.run(command, env={**os.environ, "PYTHONPATH": str(Path(sys.prefix) / "convert")}, check=True)

    return keep(load.cache / "openvino" / model.name, make)


if __name__ == "__main__":
    serve(OpenVINO)
