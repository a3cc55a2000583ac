"""A draft's first proposals for a prompt that was edited at its beginning: prefilled, or with the KV of the old one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from itertools import takewhile

import torch

from countersign.cli.bench import Row
from countersign.cli.prompts import heldout_prompts
from countersign.services.draft.proposer import Ask, Proposer
from countersign.services.engine.kv import PagedCache
from countersign.services.engine.model import Model, load_model
from countersign.services.engine.reuse import Reuse
from countersign.services.engine.sampling import Sampling
from countersign.services.engine.text import Tokenizer
from countersign.services.runtime.config import load

BODY, EDIT, PROPOSED = 1500, 40, 8
MODES: dict[str, float | None] = {"prefilled": None, "pie": 0.0, "blend, 0.15 computed again": 0.15}


async def run(quick: bool) -> list[Row]:
    """Milliseconds, and how many proposals are those of a prefill, over 20 edits (quick: 5), modes in turns."""
    config = load(None, {}, [])
    torch.set_num_threads(config.draft.threads)
    model = load_model(config.draft.model, dtype=config.draft.dtype, threads=config.draft.threads)
    tokenizer = Tokenizer(config.tokenizer.model)
    texts = [prompt.text for prompt in heldout_prompts(config.draft.model.parent, 60)]
    body = tokenizer.encode("\n".join(texts[:30]))[:BODY]
    edits = [tokenizer.encode(text)[:EDIT] for text in texts[30 : 35 if quick else 50]]
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    same: dict[str, int] = dict.fromkeys(MODES, 0)
    for turn, edit in enumerate([edits[0], *edits]):
        proposed: dict[str, Sequence[int]] = {}
        for mode, share in MODES.items():
            spent, proposed[mode] = _edited(model, share, body, edit)
            if turn:  # the first warms up
                seconds[mode].append(spent)
        if turn:
            for mode in MODES:
                pairs = zip(proposed[mode], proposed["prefilled"], strict=True)
                same[mode] += sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return _rows(len(body), len(edits), seconds, same)


def _edited(model: Model, share: float | None, body: Sequence[int], edit: Sequence[int]) -> tuple[float, Sequence[int]]:
    """Seconds until the proposals are there, and they."""
    cache = PagedCache(model.config, model.dtype, tokens=4 * (BODY + EDIT))
    draft = Proposer(model, cache, reuse=None if share is None else Reuse(model, cache, share))
    draft.propose([Ask("before", 0, tuple(body), PROPOSED, Sampling())])
    draft.forget("before")
    begin = time.perf_counter()
    (proposed,) = draft.propose([Ask("after", 0, (*edit, *body), PROPOSED, Sampling())])
    spent = time.perf_counter() - begin
    if isinstance(proposed, int) or (share is not None and not draft.reused):
        raise AssertionError("the old prompt's KV was not taken")
    return spent, proposed


def _rows(body: int, n: int, seconds: dict[str, list[float]], same: dict[str, int]) -> list[Row]:
    case, rows = f"{body} tokens behind an edit of {EDIT}, demo draft", []
    for mode, spent in seconds.items():
        ratio = statistics.median(prefilled / ours for prefilled, ours in zip(seconds["prefilled"], spent, strict=True))
        peer, known = (None, None) if mode == "prefilled" else ("prefilled", ratio)
        value = statistics.median(spent) * 1e3
        rows.append(Row("reuse", case, f"first {PROPOSED} proposals, {mode}", value, "ms", n, peer=peer, ratio=known))
        if peer:
            share = same[mode] / (n * PROPOSED)
            rows.append(Row("reuse", case, f"proposals as prefilled, {mode}", share, "share", n * PROPOSED))
    return rows
