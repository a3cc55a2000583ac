"""How a provider could bill hidden tokens that its model never said, for tests, benches and faults on purpose.

Each attack gives a longer run of hidden tokens, which is then signed like any other: every leaf opens, so counting
finds nothing. CoIn (arXiv 2505.13778) has the first four and the adaptive one, arXiv 2605.30040 the split; the last is
ours.

    repeat      passages of the reasoning, said again where they stand
    random      ids drawn from the vocabulary
    prompt      passages of the prompt
    answer      passages of the answer
    resample    what a cheap model says there: fluent, on the subject
    adaptive    of many such passages those that a judge of meaning likes best
    split       the same text in more tokens
    prolong     the model itself, its wish to end the thought overruled once
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Literal, TypeAlias, get_args

Name = Literal["repeat", "random", "prompt", "answer", "resample", "adaptive", "split", "prolong"]
NAMES: tuple[Name, ...] = get_args(Name)
PASSAGE = 16
CANDIDATES = 8

Ids: TypeAlias = tuple[int, ...]
Splits: TypeAlias = Mapping[int, Sequence[tuple[int, int]]]


@dataclass(frozen=True, slots=True)
class Thought:
    """One answer: token ids of the prompt, of the reasoning that stays hidden, and of what the client sees."""

    prompt: Ids
    hidden: Ids
    visible: Ids


@dataclass(frozen=True, slots=True)
class Tools:
    """What the attacker has besides the answer.

    Attributes:
        vocabulary_size: Number of token ids.
        splits: For each token the pairs of tokens of the same text; see ``splits_of``.
        say: A cheap model's continuation of these tokens, so many of them.
        likes: How well a passage goes with the thought, higher is better: the attacker's copy of the auditor's heads.
        prolong: The thought as the model itself gives it when it may not end before so many hidden tokens.
    """

    vocabulary_size: int
    splits: Splits
    say: Callable[[Ids, int], Sequence[int]]
    likes: Callable[[Thought, Ids], float]
    prolong: Callable[[Thought, int], Thought]


def inflate(name: Name, thought: Thought, share: float, tools: Tools, random: Random) -> Thought:
    """The thought with ``share`` (0.1 for 10 %) more hidden tokens, or as many as a split can make of them."""
    more = max(1, round(share * len(thought.hidden)))
    if name == "prolong":
        return tools.prolong(thought, len(thought.hidden) + more)
    if name == "split":
        return replace(thought, hidden=_split(thought.hidden, more, tools.splits, random))
    hidden = list(thought.hidden)
    while more:
        size = min(more, PASSAGE)
        place = random.randint(1, len(hidden))
        hidden[place:place] = _passage(name, replace(thought, hidden=tuple(hidden)), place, size, tools, random)
        more -= size
    return replace(thought, hidden=tuple(hidden))


def splits_of(vocabulary: Mapping[str, int]) -> dict[int, list[tuple[int, int]]]:
    """Every way to write a token as two others. ``vocabulary``: ids by the tokens' own spelling."""
    found: dict[int, list[tuple[int, int]]] = {}
    for text, token in vocabulary.items():
        halves = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        pairs = [(vocabulary[a], vocabulary[b]) for a, b in halves if a in vocabulary and b in vocabulary]
        if pairs:
            found[token] = pairs
    return found


def _passage(name: Name, thought: Thought, place: int, size: int, tools: Tools, random: Random) -> Ids:
    """``size`` tokens to put into the hidden ones at ``place``."""
    if name == "repeat":
        return _cycle(thought.hidden[max(0, place - size) : place], size, 0)
    if name == "random":
        return tuple(random.randrange(tools.vocabulary_size) for _ in range(size))
    if name == "resample":
        return tuple(tools.say((*thought.prompt, *thought.hidden[:place]), size))
    if name == "adaptive":
        kinds: Sequence[Name] = ("repeat", "prompt", "answer", "resample")
        drawn = [_passage(random.choice(kinds), thought, place, size, tools, random) for _ in range(CANDIDATES)]
        return max(drawn, key=lambda passage: tools.likes(thought, passage))
    source = thought.prompt if name == "prompt" else thought.visible
    return _cycle(source, size, random.randrange(max(1, len(source) - size + 1)))


def _cycle(source: Ids, size: int, start: int) -> Ids:
    return tuple(source[(start + i) % len(source)] for i in range(size))


def _split(hidden: Ids, more: int, splits: Splits, random: Random) -> Ids:
    tokens = list(hidden)
    while more:
        places = [place for place, token in enumerate(tokens) if token in splits]
        if not places:
            break
        random.shuffle(places)
        for place in sorted(places[:more], reverse=True):
            tokens[place : place + 1] = random.choice(splits[tokens[place]])
        more -= min(more, len(places))
    return tuple(tokens)
