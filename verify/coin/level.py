"""The meaning level of one receipt: are the hidden tokens worth a closer look? It passes or doubts, and never fails."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from countersign.verify.coin.canonical import Spelling, spelling
from countersign.verify.coin.embedding import Embedder
from countersign.verify.coin.heads import Heads, Judge, blocks_of
from countersign.verify.difr import Reference
from countersign.verify.errors import NotCheckable
from countersign.verify.receipt import Openings, Receipt
from countersign.verify.segments import hidden_runs, visible_runs


@dataclass(frozen=True, slots=True)
class MeaningReport:
    """What gives rise to doubt (nothing, mostly), and the figures."""

    doubts: tuple[str, ...]
    figures: dict[str, float]


def audit_meaning(reference: Reference, receipt: Receipt, openings: Openings) -> MeaningReport:
    """The heads and the spelling, for a receipt with hidden tokens whose openings were found to be the signed ones.

    Raises:
        NotCheckable: another tokenizer, or the sentence embeddings are not installed.
    """
    tokenizer = reference.tokenizer
    if tokenizer is None or reference.model.digests.tokenizer != receipt.model.tokenizer:
        raise NotCheckable(
            "the hidden tokens cannot be read: the tokenizer here is not the receipt's",
            help="name the folder of the weights that the receipt wants (--model FOLDER)",
        )
    output, segments = openings.output_token_ids, receipt.output.segments
    hidden = [output[start:stop] for start, stop in hidden_runs(segments)]
    visible = [token for start, stop in visible_runs(segments) for token in output[start:stop]]
    spelled = [spelling(tokenizer, run) for run in hidden]
    written = Spelling(sum(one.tokens for one in spelled), sum(one.needed for one in spelled))
    judge = Judge(tokenizer, Embedder(), Heads.load())
    blocks = [block for run in hidden for block in blocks_of(run)]
    meaning = judge.meaning(blocks, visible or openings.prompt_token_ids, Random(receipt.output.root))
    found = (
        (meaning.doubtful, "the hidden text fits the answer worse than 99 in 100 honest ones do"),
        (written.doubtful, f"it is written in {written.excess} tokens more than its text needs"),
    )
    figures = {
        "blocks": float(len(blocks)),
        "score": meaning.score,
        "lowest_block": min(meaning.blocks),
        "limit": judge.limit,
        "hidden_tokens": float(written.tokens),
        "excess_tokens": float(written.excess),
    }
    return MeaningReport(tuple(message for doubtful, message in found if doubtful), figures)
