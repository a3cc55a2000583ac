"""CoIn: which share of answers with inflated hidden tokens each level catches, and how much of the thought it sees.

Honest answers of the demo target to held-out prompts: 128 tokens of reasoning, 48 that the client sees. An attack makes
the reasoning 10, 50 or 300 % longer and signs the result. The levels:

    count                 all leaves are opened and hashed (the content attacks have true leaves: nothing to find)
    spelling              more tokens than the text needs (triage)
    heads                 CoIn's two heads (triage)
    tokens, all opened    Token-DiFR over the whole answer
    tokens, one block     Token-DiFR over one drawn block and what stands before it
    tokens, block alone   matches with the noise in one drawn block of which nothing before it is known
    verdict               count or tokens, all opened: what an audit says

The count attacks bill tokens without leaves: with all leaves opened, and with 8 drawn ones.
"""

from __future__ import annotations

import hashlib
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random

import torch

from countersign.cli.bench import Row
from countersign.cli.prompts import Prompt, heldout_prompts
from countersign.services.engine.model import Model, load_model
from countersign.services.engine.sampling import Draws, Sampling, draw
from countersign.services.engine.text import Tokenizer
from countersign.services.runtime.config import load
from countersign.verify import envelope, payload
from countersign.verify.coin import attacks, challenge, forgeries
from countersign.verify.coin.answers import Ask, continued, prolonged
from countersign.verify.coin.attacks import Ids, Thought, Tools, inflate, splits_of
from countersign.verify.coin.canonical import spelling
from countersign.verify.coin.challenge import Demand
from countersign.verify.coin.embedding import Embedder
from countersign.verify.coin.heads import Heads, Judge, blocks_of
from countersign.verify.difr import THRESHOLDS, judge, teacher_forced, token_scores
from countersign.verify.errors import VerificationError
from countersign.verify.receipt import HiddenMarkers, ReceiptVerifier, SignedReceipt, parse
from countersign.verify.testing import Asked, example_receipt, signing_key

PROMPT, HIDDEN, VISIBLE = 64, 128, 48
ASKED = Asked(temperature=0.8, top_k=50, top_p=0.95)
BEGIN, END = 4094, 4095
HONEST_ALARMS = 0.01
KEY = signing_key()
LEVELS = ("count", "spelling", "heads", "tokens, all opened", "tokens, one block", "tokens, block alone", "verdict")


@dataclass(frozen=True, slots=True)
class Size:
    """How many answers: honest ones, and of each attack by how much longer it makes the thought."""

    honest: int
    attacked: dict[float, int]
    forged: int


FULL = Size(300, {0.1: 200, 0.5: 80, 3.0: 30}, 300)
QUICK = Size(24, {0.1: 4, 0.5: 2, 3.0: 1}, 30)


async def run(quick: bool) -> list[Row]:
    """Shares of answers that are caught, by attack and level; honest ones that are not spared; what is disclosed."""
    size = QUICK if quick else FULL
    bench = Bench(size)
    rows = list(bench.honest_rows())
    for name in attacks.NAMES:
        for share, count in size.attacked.items():
            rows += bench.attacked_rows(name, share, count)
    return [*rows, *bench.forged_rows()]


class Bench:
    """The models, the honest answers, and the limit of matches in a block alone."""

    def __init__(self, size: Size) -> None:
        config = load(None, {}, [])
        torch.set_num_threads(config.target.threads)
        self.size = size
        self.tokenizer = Tokenizer(config.tokenizer.model)
        self.target, self.draft = (load_model(part.model, dtype="fp32") for part in (config.target, config.draft))
        self.judge = Judge(self.tokenizer, Embedder(), Heads.load())
        self.splits = splits_of(self.tokenizer.vocabulary())
        self.random = Random(7)
        self.thoughts = self._think(heldout_prompts(config.draft.model.parent, size.honest))
        half = len(self.thoughts) // 2
        self.limit = _quantile([self._matches(i, one) for i, one in enumerate(self.thoughts[:half])], HONEST_ALARMS)

    def _think(self, prompts: Sequence[Prompt]) -> list[Thought]:
        ids = [tuple(self.tokenizer.encode(prompt.text)[-PROMPT:]) for prompt in prompts]
        answers = continued(self.target, [Ask(one, sampling(i)) for i, one in enumerate(ids)], HIDDEN + VISIBLE)
        pairs = zip(ids, answers, strict=True)
        return [Thought(one, tuple(answer[:HIDDEN]), tuple(answer[HIDDEN:])) for one, answer in pairs]

    def honest_rows(self) -> Iterator[Row]:
        """False alarms. A block alone is judged on the half of the answers that its limit does not come from."""
        found = [self.caught(i, one) for i, one in enumerate(self.thoughts)]
        half = found[len(found) // 2 :]
        for level in LEVELS:
            judged = half if level == "tokens, block alone" else found
            bar = HONEST_ALARMS if level == "verdict" else None
            yield _share("honest", f"false alarms, {level}", [one[level] for one in judged], most=bar)
        texts = [spelling(self.tokenizer, one.hidden) for one in self.thoughts]
        excess = sum(text.excess for text in texts) / sum(text.tokens for text in texts)
        yield Row("coin", "honest", "tokens in excess of what the text needs", excess, "share", len(texts))

    def attacked_rows(self, name: attacks.Name, share: float, count: int) -> Iterator[Row]:
        """What each level catches of one attack, and how many hidden tokens were opened for it."""
        case = f"{name}, {share:.0%} more"
        found: dict[str, list[bool]] = defaultdict(list)
        opened: list[float] = []
        grown: list[float] = []
        for index, thought in enumerate(self.thoughts[:count]):
            inflated = inflate(name, thought, share, self._tools(index), self.random)
            grown.append(len(inflated.hidden) / len(thought.hidden) - 1)
            opened.append(self._block(index, inflated)[1] / len(inflated.hidden))
            for level, caught in self.caught(index, inflated).items():
                found[level].append(caught)
        for level in LEVELS:
            bar = 0.947 if level == "verdict" and share == 0.1 else None
            yield _share(case, f"caught, {level}", found[level], least=bar)
        if name == "random":
            yield Row("coin", case, "hidden tokens opened, one block", statistics.mean(opened), "share", count)
        if name == "split":
            yield Row("coin", case, "hidden tokens added", statistics.mean(grown), "share", count)

    def caught(self, index: int, thought: Thought) -> dict[str, bool]:
        """Which levels object to an answer that claims to be the ``index``-th."""
        output = (*thought.hidden, *thought.visible)
        scores = token_scores(self.target, thought.prompt, output, sampling(index))
        thresholds = THRESHOLDS["fp32"]
        _, stop = self._block(index, thought)
        meaning = self.judge.meaning(blocks_of(thought.hidden), thought.visible, Random(index))
        found = {
            "count": not counts(thought),
            "spelling": spelling(self.tokenizer, thought.hidden).doubtful,
            "heads": meaning.doubtful,
            "tokens, all opened": judge(scores, thresholds).outcome == "fail",
            "tokens, one block": judge(scores[:stop], thresholds).outcome == "fail",
            "tokens, block alone": self._matches(index, thought) < self.limit,
        }
        return {**found, "verdict": found["count"] or found["tokens, all opened"]}

    def _block(self, index: int, thought: Thought) -> tuple[int, int]:
        """The hidden block that is drawn: first token and end."""
        blocks = blocks_of(thought.hidden)
        which = Random(index).randrange(len(blocks))
        start = sum(map(len, blocks[:which]))
        return start, start + len(blocks[which])

    def _matches(self, index: int, thought: Thought) -> float:
        """Of the second half of the drawn block, how many tokens the target draws too when it sees the block only."""
        start, stop = self._block(index, thought)
        block = thought.hidden[start:stop]
        wanted = len(block) // 2
        rows = torch.cat(list(teacher_forced(self.target, block[:-1], wanted)))
        first = len(thought.prompt) + stop - wanted
        drawn = draw(rows, [Draws(range(first, first + wanted), sampling(index))], self.target.team)
        return sum(a == b for a, b in zip(drawn, block[-wanted:], strict=True)) / wanted

    def _tools(self, index: int) -> Tools:
        """The attacker has the draft, the auditor's heads, and, to prolong a thought, the target."""
        return Tools(
            self.target.config.vocabulary_size,
            self.splits,
            partial(_said, self.draft, self.random),
            self._likes,
            lambda thought, hidden: prolonged(self.target, thought, hidden, sampling(index)),
        )

    def _likes(self, thought: Thought, passage: Ids) -> float:
        return self.judge.meaning([passage], thought.visible, Random(0)).score

    def forged_rows(self) -> Iterator[Row]:
        """Bills for tokens without leaves: one forgery of 10 % more for each answer."""
        for name in forgeries.NAMES:
            whole, few = [], []
            for index in range(self.size.forged):
                thought = self.thoughts[index % len(self.thoughts)]
                whole.append(not opens(name, thought, index, Demand(leaves=10_000)))
                few.append(not opens(name, thought, index, Demand(leaves=8)))
            case = f"count attack: {name}, 10% more"
            yield _share(case, "caught, all leaves opened", whole, least=1.0)
            yield _share(case, "caught, 8 leaves drawn", few, least=None if name == "empty" else 1.0)
        yield Row("coin", "count attacks", "hidden tokens opened, 8 leaves drawn", 8 / (1.1 * HIDDEN), "share", 1)


def sampling(index: int) -> Sampling:
    """Of the ``index``-th answer."""
    return Sampling(ASKED.temperature, ASKED.top_k, ASKED.top_p, index)


def counts(thought: Thought) -> bool:
    """Whether the answer, signed with all its leaves, stands up to counting."""
    receipt, openings = example_receipt(thought.prompt, _marked(thought), hidden=HiddenMarkers(BEGIN, END))
    data = envelope.seal(payload.encode(receipt), openings, KEY).encode()
    verifier = ReceiptVerifier([KEY.public_key()])
    try:
        verifier.count(verifier.form(data))
    except VerificationError:
        return False
    return True


def opens(name: forgeries.Name, thought: Thought, index: int, demand: Demand) -> bool:
    """Whether the forger's answer to a challenge is taken."""
    receipt, openings = example_receipt(thought.prompt, _marked(thought), hidden=HiddenMarkers(BEGIN, END))
    hidden = receipt.output.segments[0].tokens
    forged = forgeries.forge(name, receipt, openings, (0, hidden), round(0.1 * hidden))
    signed: SignedReceipt = parse(envelope.seal(payload.encode(forged.receipt), None, KEY).encode())
    asked = challenge.draw(signed, hashlib.sha256(b"bench %d" % index).digest(), demand)
    try:
        challenge.check(signed, asked, forged.respond(asked))
    except VerificationError:
        return False
    return True


def _marked(thought: Thought) -> Ids:
    """The output between the markers that hide its first part."""
    plain = {BEGIN: 0, END: 0}  # the same ids in the text would be markers too
    hidden, visible = (tuple(plain.get(i, i) for i in part) for part in (thought.hidden, thought.visible))
    return (BEGIN, *hidden, END, *visible)


def _said(draft: Model, random: Random, prefix: Ids, count: int) -> Sequence[int]:
    return continued(draft, [Ask(prefix[-512:], Sampling(0.8, 50, 0.95, random.getrandbits(32)))], count)[0]


def _share(
    case: str, metric: str, caught: Sequence[bool], least: float | None = None, most: float | None = None
) -> Row:
    value = statistics.mean(caught)
    if least is not None:
        return Row("coin", case, metric, value, "share", len(caught), bar=f">= {least:g}", met=value >= least)
    if most is not None:
        return Row("coin", case, metric, value, "share", len(caught), bar=f"<= {most:g}", met=value <= most)
    return Row("coin", case, metric, value, "share", len(caught))


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[int(share * len(values))]
