"""This engine as a worker, as the target service runs it, with the draft model in the same process."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from countersign import __version__
from countersign.services.draft.proposer import Ask, Proposer
from countersign.services.engine.config import Dtype
from countersign.services.engine.engine import Engine, kept_of
from countersign.services.engine.errors import EngineError
from countersign.services.engine.generation import Generation
from countersign.services.engine.kv import PagedCache
from countersign.services.engine.lookup import Lookup
from countersign.services.engine.model import load_model
from countersign.services.engine.speculation import Draft
from countersign.services.runtime.config import DraftConfig

from .protocol import Load, Speculation, Tokens, Unsupported, serve

TOKENS = 16384
# A proposal that leads the next best by less than this is a round's last; found on other prompts than those measured.
MARGIN = 0.6
LOOKUP = DraftConfig()


class Ours:
    """fp32, or bf16 as the default precision."""

    version = __version__

    def __init__(self, load: Load) -> None:
        torch.set_num_threads(load.threads)
        if load.precision == "int8":
            raise Unsupported("int8 is for drafts only")
        dtype: Dtype = "fp32" if load.precision == "fp32" else "bf16"
        self._target = load_model(load.model, dtype=dtype, threads=load.threads)
        self._cache = PagedCache(self._target.config, self._target.dtype, TOKENS)
        self._proposer = None
        if load.draft:
            draft = load_model(load.draft, dtype="bf16", threads=load.threads)  # what it proposes may be wrong anyway
            self._proposer = Proposer(draft, PagedCache(draft.config, draft.dtype, TOKENS), MARGIN)

    def generate(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, speculation: Speculation | None, drafted: int
    ) -> Tokens:
        """``drafted`` tokens at most are proposed a pass for each prompt of the batch."""
        if speculation == "lookup":
            raise Unsupported("no prompt lookup")
        engine = Engine.of(self._target, self._cache)
        generations = [Generation(str(i), list(prompt), new_tokens) for i, prompt in enumerate(prompts)]
        for generation in generations:
            engine.submit(generation)
        held: dict[str, int] = {}
        lookups = {generation.id: Lookup(LOOKUP.lookup) for generation in generations}
        while len(engine):
            drafts = self._propose(engine.decodes(), lookups, held, drafted) if speculation else {}
            ran = engine.run(engine.plan(drafts=drafts))
            for result in ran.results:
                if result.outcome.error:
                    raise EngineError(result.outcome.error)
            engine.settle(ran, {result.generation.id: kept_of(result) for result in ran.results})
            for result in ran.results:
                if len(result.generation.generated) == new_tokens:
                    engine.remove(result.generation.id)
        engine.sweep()
        for name in held:
            self._forget(name)
        return [generation.generated for generation in generations]

    def _propose(
        self, generations: Sequence[Generation], lookups: dict[str, Lookup], held: dict[str, int], count: int
    ) -> dict[str, Draft]:
        """What is offered to those that decode next: looked up, else from the draft model, as by the target service."""
        drafts, asks = {}, []
        for generation in generations:
            name, tokens = generation.id, generation.tokens
            # The pass itself adds a token, so that the last one is never worth a proposal.
            left = generation.left - 1
            if found := lookups[name].propose(tokens, min(LOOKUP.lookup_tokens, left)):
                drafts[name] = Draft(found)
            elif min(count, left) > 0:
                base = min(held.get(name, 0), len(tokens) - 1)
                held[name] = len(tokens)
                asks.append(Ask(name, base, tuple(tokens[base:]), min(count, left), generation.sampling))
        proposed = self._proposer.propose(asks) if asks and self._proposer is not None else []
        pairs = zip(asks, proposed, strict=False)
        return drafts | {ask.request_id: Draft(tokens) for ask, tokens in pairs if not isinstance(tokens, int)}

    def _forget(self, name: str) -> None:
        if self._proposer is not None:
            self._proposer.forget(name)


if __name__ == "__main__":
    serve(Ours)
