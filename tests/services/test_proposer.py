"""The draft's own books: what it holds, what it says it lacks, what it forgets when room is short."""

from __future__ import annotations

import pytest

from countersign.services.draft.proposer import Ask, Proposer
from countersign.services.engine.kv import PagedCache
from countersign.services.engine.model import Model, Span, load_model
from countersign.services.engine.reuse import Reuse
from countersign.services.engine.sampling import Sampling, sample
from countersign.verify.testing import write_tiny_model

GREEDY = Sampling(0.0, 0, 1.0, 0)
DRAWN = Sampling(0.9, 0, 1.0, 7)
PROMPT = tuple(b"def f(x): return x")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder)
    return load_model(folder)


def proposer(model: Model, tokens: int = 512) -> Proposer:
    return Proposer(model, PagedCache(model.config, "fp32", tokens=tokens))


def own_samples(model: Model, prompt: tuple[int, ...], count: int, sampling: Sampling) -> tuple[int, ...]:
    """What the model samples by itself, one token a pass."""
    cache = PagedCache(model.config, "fp32", tokens=512)
    sequence, tokens, fed = cache.sequence(), list(prompt), 0
    for _ in range(count):
        logits = model.forward(cache, [Span(sequence, tokens[fed:], 1)])
        fed = len(tokens)
        tokens.append(sample(logits[0], len(tokens), sampling))
    return tuple(tokens[len(prompt) :])


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
def test_it_proposes_its_own_samples_with_the_targets_noise(model: Model, sampling: Sampling) -> None:
    result = proposer(model).propose([Ask("a", 0, PROMPT, 5, sampling)])
    assert result == [own_samples(model, PROMPT, 5, sampling)]


def test_a_batch_gives_each_what_it_gets_alone(model: Model) -> None:
    asks = [Ask("a", 0, PROMPT, 3, DRAWN), Ask("b", 0, PROMPT[:5], 5, GREEDY), Ask("c", 0, PROMPT[:9], 1, DRAWN)]
    together = proposer(model).propose(asks)
    assert together == [proposer(model).propose([ask])[0] for ask in asks]


def test_only_what_is_new_is_sent_and_a_rejected_tail_is_replaced(model: Model) -> None:
    draft = proposer(model)
    (first,) = draft.propose([Ask("a", 0, PROMPT, 4, DRAWN)])
    assert isinstance(first, tuple)
    committed = (*first[:2], (first[2] + 1) % 256)
    (second,) = draft.propose([Ask("a", len(PROMPT), committed, 4, DRAWN)])
    assert second == own_samples(model, PROMPT + committed, 4, DRAWN)


def test_what_it_does_not_hold_it_asks_for(model: Model) -> None:
    draft = proposer(model)
    assert draft.propose([Ask("a", 3, PROMPT[3:], 2, GREEDY)]) == [0]
    draft.propose([Ask("a", 0, PROMPT[:5], 1, GREEDY)])
    assert draft.propose([Ask("a", 12, PROMPT[12:], 2, GREEDY)]) == [6]
    draft.forget("a")
    assert draft.sequences == 0
    assert draft.propose([Ask("a", 5, PROMPT[5:], 2, GREEDY)]) == [0]


def test_when_room_is_short_the_sequence_asked_for_longest_ago_goes(model: Model) -> None:
    draft = proposer(model, tokens=96)
    for name in ("a", "b", "c", "d"):
        (result,) = draft.propose([Ask(name, 0, PROMPT, 4, GREEDY)])
        assert result == own_samples(model, PROMPT, 4, GREEDY)
    assert draft.propose([Ask("a", len(PROMPT), (1,), 1, GREEDY)]) == [0]


EDITED = tuple(b"def g(y): return y\n\n")
LONG = tuple(b"import os\nimport sys\n\ndef main(): return os.getcwd() + sys.path[0]\n")


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_prompt_like_one_that_has_ended_is_proposed_for_from_its_kv(model: Model, share: float) -> None:
    cache = PagedCache(model.config, "fp32", tokens=512)
    draft = Proposer(model, cache, reuse=Reuse(model, cache, share))
    draft.propose([Ask("a", 0, LONG, 4, DRAWN)])
    assert draft.reused == 0
    draft.forget("a")
    (proposed,) = draft.propose([Ask("b", 0, EDITED + LONG, 4, DRAWN)])
    assert draft.reused >= len(LONG) - 1
    assert isinstance(proposed, tuple)
    assert len(proposed) == 4
    if share == 1:
        assert proposed == own_samples(model, EDITED + LONG, 4, DRAWN)
    draft.forget("b")
    cache.check_integrity()


def test_one_tenants_text_is_not_taken_for_another(model: Model) -> None:
    cache = PagedCache(model.config, "fp32", tokens=512)
    draft = Proposer(model, cache, reuse=Reuse(model, cache))
    draft.propose([Ask("a", 0, LONG, 4, DRAWN, tenant="x")])
    draft.forget("a")
    draft.propose([Ask("b", 0, LONG, 4, DRAWN, tenant="y")])
    assert draft.reused == 0
    draft.propose([Ask("c", 0, LONG, 4, DRAWN, tenant="x")])
    assert draft.reused == len(LONG) - 1


def test_what_is_kept_for_others_is_given_up_first_when_room_is_short(model: Model) -> None:
    cache = PagedCache(model.config, "fp32", tokens=192)
    draft = Proposer(model, cache, reuse=Reuse(model, cache))
    draft.propose([Ask("live", 0, PROMPT, 2, GREEDY)])
    for name in ("a", "b", "c"):
        draft.propose([Ask(name, 0, LONG, 2, GREEDY)])
        draft.forget(name)
    assert draft.propose([Ask("live", len(PROMPT), (1,), 1, GREEDY)]) != [0]
    draft.forget("live")
    cache.check_integrity()


def test_nothing_is_kept_unless_it_is_asked_for(model: Model) -> None:
    cache = PagedCache(model.config, "fp32", tokens=512)
    draft = Proposer(model, cache)
    draft.propose([Ask("a", 0, LONG, 4, DRAWN)])
    draft.forget("a")
    assert (cache.free_tokens, draft.reused) == (512, 0)


def test_a_batch_that_cannot_fit_gets_fewer_proposals_and_no_error(model: Model) -> None:
    draft = proposer(model, tokens=48)
    results = draft.propose([Ask(name, 0, PROMPT, 4, GREEDY) for name in ("a", "b", "c")])
    assert all(isinstance(result, tuple) for result in results)
    assert results[-1] == ()
