"""The meaning level of one receipt: are its tokens worth a closer look? It passes or doubts, and never fails.

The spelling of all tokens, since visible text can be written in too many as well; CoIn's heads where some are hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import TypeAlias

from countersign.services.engine.text import Tokenizer
from countersign.verify.coin.canonical import Spelling, spelling
from countersign.verify.coin.embedding import Embedder
from countersign.verify.coin.heads import Heads, Judge, blocks_of
from countersign.verify.difr import Reference
from countersign.verify.difr.level import check_length
from countersign.verify.errors import NotCheckable
from countersign.verify.receipt import Openings, Receipt
from countersign.verify.segments import hidden_runs, visible_runs

_Found: TypeAlias = tuple[tuple[str, ...], dict[str, float]]


@dataclass(frozen=True, slots=True)
class MeaningReport:
    """What gives rise to doubt (nothing, mostly), and the figures."""

    doubts: tuple[str, ...]
    figures: dict[str, float]


def audit_meaning(reference: Reference, receipt: Receipt, openings: Openings) -> MeaningReport:
    """The heads and the spelling, for a receipt whose openings were found to be the signed ones.

    Raises:
        NotCheckable: another tokenizer, a text too long for the reference, or no sentence embeddings here.
    """
    tokenizer = reference.tokenizer
    if tokenizer is None or reference.model.digests.tokenizer != receipt.model.tokenizer:
        raise NotCheckable(
            "the tokens cannot be read: the tokenizer here is not the receipt's",
            help="name the folder of the weights that the receipt wants (--model FOLDER)",
        )
    check_length(reference, receipt)
    doubts, figures = _spelled(tokenizer, receipt, openings)
    if receipt.output.hidden:
        more, found = _meant(tokenizer, receipt, openings)
        doubts, figures = doubts + more, figures | found
    return MeaningReport(doubts, figures)


def _spelled(tokenizer: Tokenizer, receipt: Receipt, openings: Openings) -> _Found:
    segments = receipt.output.segments
    runs = [openings.output_token_ids[start:stop] for start, stop in (*hidden_runs(segments), *visible_runs(segments))]
    parts = [spelling(tokenizer, run) for run in runs]
    whole = Spelling(sum(part.tokens for part in parts), sum(part.needed for part in parts))
    doubts = (f"it is written in {whole.excess} tokens more than its text needs",) if whole.doubtful else ()
    return doubts, {"tokens": float(whole.tokens), "excess_tokens": float(whole.excess)}


def _meant(tokenizer: Tokenizer, receipt: Receipt, openings: Openings) -> _Found:
    output, segments = openings.output_token_ids, receipt.output.segments
    visible = [token for start, stop in visible_runs(segments) for token in output[start:stop]]
    blocks = [block for start, stop in hidden_runs(segments) for block in blocks_of(output[start:stop])]
    judge = Judge(tokenizer, Embedder(), Heads.load())
    meaning = judge.meaning(blocks, visible or openings.prompt_token_ids, Random(receipt.output.root))
    doubts = ("the hidden text fits the answer worse than 99 in 100 honest ones do",) if meaning.doubtful else ()
    figures = {
        "blocks": float(len(blocks)),
        "score": meaning.score,
        "lowest_block": min(meaning.blocks),
        "limit": judge.limit,
    }
    return doubts, figures
