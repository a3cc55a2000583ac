"""Drafts, chunks and company change how many tokens a pass gives, and never the tokens nor what follows them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from countersign.services.engine.drafting import Ask, propose
from countersign.services.engine.kv import CachedSequence, PagedCache
from countersign.services.engine.model import Backend, Model, Span, load_model
from countersign.services.engine.runner import Outcome, Runner, Work
from countersign.services.engine.sampling import Allowed, Sampling, allow
from countersign.services.engine.speculation import Draft

VOCABULARY = 24
SAMPLINGS = (
    Sampling(),
    Sampling(0.8, seed=5),
    Sampling(0.8, 12, 0.9, 6),
    Sampling(0.8, 0, 0.7, 2**63 + 7),
    Sampling(0.8, 3, 1.0, 8),
)
PROMPTS = ([2, 3, 5, 7, 11, 13], list(range(20)), [9], [1, 4] * 30)
OUTPUT = 30


@pytest.fixture(scope="module")
def folders(build_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two unrelated random models over a vocabulary so small that they sometimes agree."""
    made = [tmp_path_factory.mktemp("pair") for _ in range(2)]
    for seed, folder in zip((21, 22), made, strict=True):
        build_model("mistral", seed, vocab_size=VOCABULARY, initializer_range=0.08, sliding_window=33).save_pretrained(
            folder
        )
    return made


@pytest.fixture(scope="module")
def pair(folders: list[Path], backend: Backend) -> tuple[Model, Model]:
    target, draft = (load_model(folder, backend=backend) for folder in folders)
    return target, draft


def next_masks(token_ids: Sequence[int]) -> Allowed | None:
    """What a small grammar lets follow: any token after a multiple of 5, else one of the same parity or a third."""
    last = token_ids[-1]
    if last % 5 == 0:
        return None
    return allow([token for token in range(VOCABULARY) if (token - last) % 2 == 0 or token % 3 == 0], VOCABULARY)


@dataclass
class Answer:
    """One request: what is known of it, and its sequence."""

    sequence: CachedSequence
    tokens: list[int]
    sampling: Sampling
    constrained: bool = False
    known: int = field(init=False)

    def __post_init__(self) -> None:
        self.known = len(self.tokens)

    @property
    def output(self) -> list[int]:
        return self.tokens[self.known :]

    @property
    def missing(self) -> int:
        """Tokens that are known and not computed."""
        return len(self.tokens) - self.sequence.length

    def work(self, count: int, draft: Draft) -> Work:
        """The next ``count`` tokens, and the draft if these are all."""
        fed = self.tokens[self.sequence.length :][:count]
        if len(fed) < self.missing:
            return Work(self.sequence, fed, self.sampling, samples=False)
        return Work(self.sequence, fed, self.sampling, draft, allowed=self.masks(draft) if self.constrained else None)

    def masks(self, draft: Draft) -> list[Allowed | None]:
        paths: list[list[int]] = []
        for node, token in enumerate(draft.token_ids):
            parent = node - 1 if draft.parents is None else draft.parents[node]
            paths.append([*(paths[parent] if parent >= 0 else self.tokens), token])
        return [next_masks(path) for path in (self.tokens, *paths)]


@dataclass(frozen=True)
class Plain:
    """Each prompt's answer without any draft, alone; as the pair has it."""

    tokens: dict[tuple[int, int, bool], list[int]]


@pytest.fixture(scope="module")
def plain(pair: tuple[Model, Model]) -> Plain:
    found = {}
    for prompt in range(len(PROMPTS)):
        for which, sampling in enumerate(SAMPLINGS):
            for constrained in (False, True):
                runner = Runner(pair[0], PagedCache(pair[0].config, "fp32", 200))
                answer = Answer(runner.cache.sequence(), list(PROMPTS[prompt]), sampling, constrained)
                while len(answer.output) < OUTPUT + 10:
                    (outcome,) = runner.run([answer.work(100, Draft())])
                    assert len(outcome.token_ids) == 1
                    answer.tokens += outcome.token_ids
                found[prompt, which, constrained] = answer.output
    return Plain(found)


def test_answers_differ_and_masks_are_obeyed(plain: Plain) -> None:
    assert len({tuple(tokens) for tokens in plain.tokens.values()}) > len(plain.tokens) * 0.8
    for (prompt, _, constrained), output in plain.tokens.items():
        last = PROMPTS[prompt][-1]
        if constrained:
            for token in output:
                assert last % 5 == 0 or (token - last) % 2 == 0 or token % 3 == 0
                last = token


@dataclass(frozen=True)
class Shape:
    """A draft as it is drawn: of each node the parent, and its token, None for the one that the target will sample."""

    nodes: list[tuple[int, int | None]]
    tree: bool

    def draft(self, future: Sequence[int]) -> Draft:
        parents: list[int] = []
        depths: list[int] = []
        token_ids: list[int] = []
        for pick, wrong in self.nodes:
            parent = min(pick, len(parents) - 1) if self.tree else len(parents) - 1
            depth = depths[parent] + 1 if parent >= 0 else 0
            if depth >= len(future):
                continue
            token = future[depth] if wrong is None else wrong
            if self.tree and (parent, token) in zip(parents, token_ids, strict=True):
                continue
            parents.append(parent)
            depths.append(depth)
            token_ids.append(token)
        return Draft(tuple(token_ids), tuple(parents) if self.tree else None)


NODES = st.lists(
    st.tuples(st.integers(-1, 9), st.one_of(st.none(), st.none(), st.integers(0, VOCABULARY - 1))), max_size=9
)
SHAPES = st.builds(Shape, NODES, st.booleans())


@settings(max_examples=40)
@given(
    chosen=st.lists(
        st.tuples(st.integers(0, len(PROMPTS) - 1), st.integers(0, len(SAMPLINGS) - 1), st.booleans()),
        min_size=1,
        max_size=4,
    ),
    shapes=st.lists(SHAPES, min_size=1, max_size=8),
    chunks=st.lists(st.integers(1, 40), min_size=1, max_size=5),
)
def test_generation_with_any_drafts_equals_generation_without(
    pair: tuple[Model, Model],
    plain: Plain,
    chosen: list[tuple[int, int, bool]],
    shapes: list[Shape],
    chunks: list[int],
) -> None:
    runner = Runner(pair[0], PagedCache(pair[0].config, "fp32", 1000))
    answers = [
        Answer(runner.cache.sequence(), list(PROMPTS[prompt]), SAMPLINGS[which], constrained)
        for prompt, which, constrained in chosen
    ]
    expected, turn = [plain.tokens[which] for which in chosen], 0
    while going := [i for i, answer in enumerate(answers) if len(answer.output) < OUTPUT]:
        works = []
        for i in going:
            future, turn = expected[i][len(answers[i].output) :], turn + 1
            works.append(answers[i].work(chunks[turn % len(chunks)], shapes[turn % len(shapes)].draft(future)))
        for i, work, outcome in zip(going, works, runner.run(works), strict=True):
            settle(answers[i], work, outcome)
            assert answers[i].output == expected[i][: len(answers[i].output)]
    runner.cache.check_integrity()
    for answer in answers:
        assert_continues_as_if_computed_at_once(runner, answer)


def settle(answer: Answer, work: Work, outcome: Outcome) -> None:
    """What a pass may and must give."""
    assert not outcome.error
    answer.tokens += outcome.token_ids
    if not work.samples:
        assert outcome == Outcome()
        return
    assert len(outcome.token_ids) == outcome.accepted + 1 <= len(work.draft) + 1
    assert answer.sequence.length == len(answer.tokens) - 1
    if outcome.accepted < len(work.draft) and work.draft.parents is None:
        assert outcome.token_ids[-1] != work.draft.token_ids[outcome.accepted]


def assert_continues_as_if_computed_at_once(runner: Runner, answer: Answer) -> None:
    again = runner.cache.sequence()
    runner.model.forward(runner.cache, [Span(again, answer.tokens[:-1], 0)])
    spans = [Span(sequence, [answer.tokens[-1], 3, 8], 3) for sequence in (answer.sequence, again)]
    first, second = (runner.model.forward(runner.cache, [span]) for span in spans)
    assert torch.equal(first, second)
    for index in range(len(answer.tokens) // 16):
        assert answer.sequence.export_block(index) == again.export_block(index)
    again.close()


def test_every_right_proposal_is_accepted_in_a_chain_and_in_a_tree(pair: tuple[Model, Model], plain: Plain) -> None:
    for (prompt, which, constrained), output in plain.tokens.items():
        branchy = [token for right in output[:5] for token in (right, (right + 1) % VOCABULARY)]
        parents = [parent for node in range(-1, 8, 2) for parent in (node - 1 if node > 0 else -1,) * 2]
        for draft in (Draft(tuple(output[:5])), Draft(tuple(branchy), tuple(parents))):
            runner = Runner(pair[0], PagedCache(pair[0].config, "fp32", 100))
            answer = Answer(runner.cache.sequence(), list(PROMPTS[prompt]), SAMPLINGS[which], constrained)
            (outcome,) = runner.run([answer.work(100, draft)])
            assert outcome.token_ids == tuple(output[:6])
            assert outcome.accepted == 5


@pytest.mark.parametrize("which", range(3))
def test_a_draft_models_proposals_are_accepted_now_and_then_and_change_nothing(
    pair: tuple[Model, Model], plain: Plain, which: int
) -> None:
    (target, small), sampling = pair, SAMPLINGS[which]
    runner, cache = Runner(target, PagedCache(target.config, "fp32", 1000)), PagedCache(small.config, "fp32", 1000)
    answers = [Answer(runner.cache.sequence(), list(prompt), sampling) for prompt in PROMPTS]
    drafters = [cache.sequence() for _ in PROMPTS]
    accepted = 0
    while any(len(answer.output) < OUTPUT for answer in answers):
        asks = []
        for drafter, answer in zip(drafters, answers, strict=True):
            drafter.truncate(min(drafter.length, len(answer.tokens) - 1))
            asks.append(Ask(drafter, answer.tokens[drafter.length :], sampling, 4))
        drafts = [Draft(tuple(tokens)) for tokens in propose(small, cache, asks)]
        works = [answer.work(100, draft) for answer, draft in zip(answers, drafts, strict=True)]
        for answer, work, outcome in zip(answers, works, runner.run(works), strict=True):
            settle(answer, work, outcome)
            accepted += outcome.accepted
    for index, answer in enumerate(answers):
        assert answer.output[:OUTPUT] == plain.tokens[index, which, False][:OUTPUT]
    assert accepted > 0


def test_a_target_that_drafts_for_itself_has_every_proposal_accepted(pair: tuple[Model, Model]) -> None:
    target, sampling = pair[0], Sampling(0.8, seed=5)
    runner, cache = Runner(target, PagedCache(target.config, "fp32", 200)), PagedCache(target.config, "fp32", 200)
    answer, drafter = Answer(runner.cache.sequence(), [1, 2, 3], sampling), cache.sequence()
    for _ in range(10):
        drafter.truncate(min(drafter.length, len(answer.tokens) - 1))
        (tokens,) = propose(target, cache, [Ask(drafter, answer.tokens[drafter.length :], sampling, 4)])
        (outcome,) = runner.run([answer.work(100, Draft(tuple(tokens)))])
        assert outcome.accepted == 4
        answer.tokens += outcome.token_ids


def test_each_request_of_a_pass_has_its_own_rules(pair: tuple[Model, Model]) -> None:
    runner = Runner(pair[0], PagedCache(pair[0].config, "fp32", 200))
    only = [allow([token], VOCABULARY) for token in (3, 4, 5, 6)]
    works = [
        Work(runner.cache.sequence(), [1, 2], allowed=[only[0]]),
        Work(runner.cache.sequence(), [1, 2], samples=False),
        Work(runner.cache.sequence(), [1, 2], Sampling(1.0), Draft((4, 6, 7), (-1, 0, -1)), allowed=[*only[1:], None]),
        Work(runner.cache.sequence(), [1, 2, 3], samples=False, proves=True),
        Work(runner.cache.sequence(), [1], draft=Draft((5, 4)), allowed=[only[2], None, only[0]]),
    ]
    outcomes = runner.run(works)
    assert outcomes[0] == Outcome((3,), sound=True)
    assert outcomes[1] == Outcome()
    assert outcomes[2] == Outcome((4, 5), 1, sound=True)
    assert outcomes[3] == Outcome(sound=True)
    assert outcomes[4].token_ids[0] == 5
    assert [work.sequence.length for work in works] == [2, 2, 3, 3, 1 + outcomes[4].accepted]


def test_a_mask_that_allows_nothing_ends_the_answer_with_an_error(pair: tuple[Model, Model]) -> None:
    runner = Runner(pair[0], PagedCache(pair[0].config, "fp32", 200))
    (outcome,) = runner.run([Work(runner.cache.sequence(), [1, 2], allowed=[allow([], VOCABULARY)])])
    assert outcome.token_ids == ()
    assert "position 2" in outcome.error


def poisoned(folder: Path, to: Path, backend: Backend, name: str, row: int) -> Model:
    """The model with a row of NaN in one of its matrices."""
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    tensors = load_file(to / "model.safetensors")
    tensors[name][row] = math.nan
    save_file(tensors, to / "model.safetensors")
    return load_model(to, backend=backend)


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("which", [0, 1])
def test_what_stands_before_a_failure_is_kept_and_the_error_names_position_and_layer(
    tree: bool, which: int, folders: list[Path], backend: Backend, plain: Plain, tmp_path: Path
) -> None:
    prompt, output, others = PROMPTS[0], plain.tokens[0, which, False], plain.tokens[2, which, False]
    # A token that the target samples after some others, and whose embedding is bad from now on.
    used = {*prompt, *PROMPTS[2], others[0], 3, 8}
    at, bad = next((i, token) for i, token in enumerate(output) if i and token not in {*used, *output[:i]})
    model = poisoned(folders[0], tmp_path, backend, "model.embed_tokens.weight", bad)
    right = tuple(output[: at + 3])
    draft = Draft((bad, *right), (-1, -1, *range(1, len(right)))) if tree else Draft(right)
    runner = Runner(model, PagedCache(model.config, "fp32", 300))
    answer = Answer(runner.cache.sequence(), list(prompt), SAMPLINGS[which])
    beside = Answer(runner.cache.sequence(), list(PROMPTS[2]), SAMPLINGS[which])
    failed, good = runner.run([answer.work(100, draft), beside.work(100, Draft((bad, others[0])))])
    # torch multiplies what a row does not see by 0, which keeps NaN: there, all rows of that span fail.
    kept = at + 1 if backend == "native" else 0
    assert failed.token_ids == tuple(output[:kept])
    assert failed.accepted == kept
    assert f"position {len(prompt) + kept} are not finite" in failed.error
    assert "layer 0 of 2" in failed.error
    assert answer.sequence.length == len(prompt) + kept
    if backend == "native":
        assert good == Outcome((others[0],), sound=True)
        beside.tokens += good.token_ids
        assert_continues_as_if_computed_at_once(runner, beside)
    runner.cache.check_integrity()


@pytest.mark.parametrize(
    ("name", "where"),
    [("model.layers.1.self_attn.o_proj.weight", "layer 1 of 2"), ("lm_head.weight", "the output head")],
)
def test_a_bad_weight_is_found_and_gives_no_token(
    name: str, where: str, folders: list[Path], backend: Backend, tmp_path: Path
) -> None:
    model = poisoned(folders[0], tmp_path, backend, name, 3)
    runner = Runner(model, PagedCache(model.config, "fp32", 300))
    works = [Work(runner.cache.sequence(), [1, 2, 3], draft=Draft((4, 5))), Work(runner.cache.sequence(), [7])]
    proof = Work(runner.cache.sequence(), [1, 2, 3], samples=False, proves=True)
    outcomes = runner.run([*works, proof])
    assert not any(outcome.sound for outcome in outcomes)
    for work, outcome, position in zip(works, outcomes, (3, 1), strict=False):
        assert (outcome.token_ids, outcome.accepted) == ((), 0)
        assert f"position {position} are" in outcome.error
        assert where in outcome.error
        assert work.sequence.length == position


def test_a_pass_that_cannot_be_computed_changes_nothing_and_says_why_to_all(pair: tuple[Model, Model]) -> None:
    runner = Runner(pair[0], PagedCache(pair[0].config, "fp32", 32))
    first, second = runner.cache.sequence(), runner.cache.sequence()
    outcomes = runner.run([Work(first, [1] * 20), Work(second, [1, 2], samples=False)])
    assert [outcome.token_ids for outcome in outcomes] == [(), ()]
    assert all("KV cache is full" in outcome.error for outcome in outcomes)
    assert first.length == second.length == 0
    runner.cache.check_integrity()
