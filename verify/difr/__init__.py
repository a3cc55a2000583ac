"""Token-DiFR: is every token the one that the reference weights sample with this seed? (arXiv 2511.20621)

One teacher-forced pass gives the reference's logits z for each output position, over the claimed prefix. With S the set
that top-k and top-p leave, T the temperature and G the request's Gumbel noise at that absolute position, the claimed
token c has

    score = max over i in S of (z_i + T G_i)  -  (z_c + T G_c)

0 when the reference samples c too, small when two arithmetics disagree about a near tie, large when c came from
elsewhere. A c outside S has no score and is counted apart. At T = 0 the score is max z - z_c.

This needs the coupling of the answer to the noise: under standard rejection sampling an honest answer scores badly.

    scores       tokens to scores, by the reference model
    statistics   how improbable scores are where their provider is honest: pure numbers
    profile      what honest scores look like, measured and signed
    verdict      scores and thresholds to pass, fail or inconclusive
    evidence     the same over many answers of one provider, valid whenever one looks
    level        the whole for one receipt
"""

from countersign.verify.difr.level import Reference, TokenReport, audit_tokens, load_reference
from countersign.verify.difr.scores import CHUNK, Kept, TokenScore, score_tokens, teacher_forced, token_scores
from countersign.verify.difr.verdict import THRESHOLDS, Power, Thresholds, Verdict, judge

__all__ = [
    "CHUNK",
    "THRESHOLDS",
    "Kept",
    "Power",
    "Reference",
    "Thresholds",
    "TokenReport",
    "TokenScore",
    "Verdict",
    "audit_tokens",
    "judge",
    "load_reference",
    "score_tokens",
    "teacher_forced",
    "token_scores",
]
