"""This engine as a worker: prefill and decode of whole batches, speculation with the draft model in process."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch

from countersign import __version__
from countersign.services.engine.config import Dtype
from countersign.services.engine.kv import CachedSequence, PagedCache
from countersign.services.engine.model import Model, Span, load_model
from countersign.services.engine.speculation import Draft, walk

from .protocol import Load, Speculation, Tokens, Unsupported, serve

TOKENS = 16384


class Ours:
    """fp32, or bf16 as the default precision."""

    version = __version__

    def __init__(self, load: Load) -> None:
        torch.set_num_threads(load.threads)
        if load.precision == "int8":
            raise Unsupported("int8 is not measured here")
        dtype: Dtype = "fp32" if load.precision == "fp32" else "bf16"
        self._target = load_model(load.model, dtype=dtype)
        self._draft = load_model(load.draft, dtype=dtype) if load.draft else None
        self._caches = {id(m): PagedCache(m.config, m.dtype, TOKENS) for m in (self._target, self._draft) if m}

    def generate(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, speculation: Speculation | None, drafted: int
    ) -> Tokens:
        """``drafted`` tokens are proposed a pass for each prompt of the batch."""
        if speculation == "lookup":
            raise Unsupported("no prompt lookup")
        tokens = [list(prompt) for prompt in prompts]
        ends = [len(prompt) + new_tokens for prompt in prompts]
        target = _Feed(self._target, self._caches[id(self._target)], len(tokens))
        draft = _Feed(self._draft, self._caches[id(self._draft)], len(tokens)) if speculation and self._draft else None
        while live := [i for i, row in enumerate(tokens) if len(row) < ends[i]]:
            # The pass itself adds a token, so that the last one is never worth a proposal.
            wanted = {i: min(drafted, ends[i] - len(tokens[i]) - 1) for i in live}
            proposals = draft.propose(tokens, wanted) if draft else {i: [] for i in live}
            for i, sampled in target.verify(tokens, proposals).items():
                tokens[i] += walk(Draft(tuple(proposals[i])), sampled).token_ids
                target.truncate(i, len(tokens[i]) - 1)
        target.close()
        if draft:
            draft.close()
        return [row[len(prompt) :] for row, prompt in zip(tokens, prompts, strict=True)]


class _Feed:
    """One model's sequences: each pass feeds what a sequence does not hold yet."""

    def __init__(self, model: Model, cache: PagedCache, count: int) -> None:
        self._model, self._cache = model, cache
        self._sequences: list[CachedSequence] = [cache.sequence() for _ in range(count)]

    def propose(self, tokens: Sequence[list[int]], wanted: dict[int, int]) -> dict[int, list[int]]:
        """Greedy proposals, one pass of the batch a position."""
        proposals: dict[int, list[int]] = {i: [] for i in wanted}
        for i in wanted:
            self.truncate(i, min(self._sequences[i].length, len(tokens[i]) - 1))
        while live := [i for i in wanted if len(proposals[i]) < wanted[i]]:
            spans = [self._span(i, [*tokens[i], *proposals[i]], 1) for i in live]
            best = self._model.forward(self._cache, spans).argmax(dim=1).tolist()
            for i, token in zip(live, best, strict=True):
                proposals[i].append(token)
        return proposals

    def verify(self, tokens: Sequence[list[int]], proposals: dict[int, list[int]]) -> dict[int, list[int]]:
        """What follows each sequence and each of its proposals, of one pass over all."""
        spans = [self._span(i, [*tokens[i], *more], len(more) + 1) for i, more in proposals.items()]
        best = iter(self._model.forward(self._cache, spans).argmax(dim=1).tolist())
        return {i: list(islice(best, len(more) + 1)) for i, more in proposals.items()}

    def truncate(self, i: int, length: int) -> None:
        """Keeps the first ``length`` tokens of a sequence."""
        self._sequences[i].truncate(length)

    def close(self) -> None:
        """Gives all pages back."""
        for sequence in self._sequences:
            sequence.close()

    def _span(self, i: int, tokens: list[int], logits: int) -> Span:
        return Span(self._sequences[i], tokens[self._sequences[i].length :], logits)


if __name__ == "__main__":
    serve(Ours)
