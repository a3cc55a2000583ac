"""What goes into a pass, and where an answer ends."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from countersign.services.engine.kv import PagedCache
from countersign.services.engine.model import Model, Span, load_model
from countersign.services.engine.sampling import Sampling
from countersign.services.engine.text import Tokenizer
from countersign.services.protocol.commit import LogState, encode
from countersign.services.protocol.writer import Writer
from countersign.services.target.batch import plan
from countersign.services.target.session import MAX_UNCOMMITTED, Pass, Session
from countersign.services.target.stopping import Stopper
from countersign.services.target.verifier import Verifier
from countersign.v1.commit_pb2 import Assigned, Opened
from countersign.v1.sampling_pb2 import FinishReason, SamplingParams
from countersign.verify.testing import END_TOKEN, write_tiny_model

STOP, LENGTH = FinishReason.FINISH_REASON_STOP, FinishReason.FINISH_REASON_LENGTH


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_model(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load_model(folder)


def session(cache: PagedCache, name: str, prompt: list[int], max_tokens: int = 50) -> Session:
    """A request that was opened and assigned to this target."""
    opened = Opened(prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=max_tokens))
    log = LogState(name).apply(1, encode(name, b"", opened))
    log = log.apply(2, encode(name, log.digest, Assigned(epoch=1, instance="t")))
    return Session(
        request_id=name,
        opened=opened,
        writer=Writer(log, epoch=1, instance="t"),
        sequence=cache.sequence(),
        sampling=Sampling(0.0, 0, 1.0, 0),
        stopper=Stopper(frozenset(), max_tokens),
        tokens=list(prompt),
    )


def test_decodes_come_first_and_prefill_takes_what_the_budget_leaves(model: Model) -> None:
    cache = PagedCache(model.config, "fp32", tokens=2048)
    decoding = session(cache, "d", [1, 2, 3])
    model.forward(cache, [Span(decoding.sequence, [1, 2], 0)])
    first, second = session(cache, "p", list(range(200))), session(cache, "q", list(range(100)))
    works = plan([first, decoding, second], {"d": (7, 8)}, chunk=64, budget=80)
    assert [(w.session.request_id, w.token_ids, w.proposals, w.rows) for w in works] == [
        ("d", (3,), (7, 8), 3),
        ("p", tuple(range(64)), (), 0),
        ("q", tuple(range(13)), (), 0),
    ]


def test_a_full_house_of_decodes_does_not_starve_a_prefill(model: Model) -> None:
    cache = PagedCache(model.config, "fp32", tokens=2048)
    decoding = session(cache, "d", [1])
    waiting = session(cache, "p", [1, 2, 3])
    works = plan([decoding, waiting], {"d": tuple(range(40))}, chunk=2, budget=8)
    assert [w.session.request_id for w in works] == ["d", "p"]
    assert [w.rows for w in works] == [41, 0]


def test_the_last_chunk_of_a_prefill_samples_and_who_waits_for_the_log_is_left_out(model: Model) -> None:
    cache = PagedCache(model.config, "fp32", tokens=2048)
    whole, stuck, ended = (session(cache, name, [1, 2, 3]) for name in "wse")
    stuck.uncommitted.extend([Pass((1,), 0, 0)] * MAX_UNCOMMITTED)
    ended.end(STOP)
    works = plan([whole, stuck, ended], {}, chunk=64)
    assert [(w.session.request_id, w.rows) for w in works] == [("w", 1)]


@given(st.lists(st.integers(0, 255), max_size=6), st.integers(0, 255))
def test_verification_yields_the_targets_own_tokens_whatever_is_proposed(
    model: Model, proposals: list[int], wrong: int
) -> None:
    cache = PagedCache(model.config, "fp32", tokens=2048)
    plain = session(cache, "plain", [5, 6, 7])
    verifier = Verifier(model, cache)
    while len(plain.tokens) < 24:
        (result,) = verifier.step(plan([plain], {}, chunk=64))
        assert result.sampled is not None
        plain.tokens.extend(result.sampled.token_ids)
    right = plain.tokens[3:]
    drafted = session(cache, "drafted", [5, 6, 7])
    offered = (*right[: len(proposals)], wrong, *proposals)
    drafted.tokens.append(right[0])
    model.forward(cache, [Span(drafted.sequence, [5, 6, 7], 0)])
    (result,) = verifier.step(plan([drafted], {"drafted": offered[1:]}, chunk=64))
    assert result.sampled is not None
    emitted = list(result.sampled.token_ids)
    assert emitted == right[1 : 1 + len(emitted)]
    assert result.sampled.accepted == len(emitted) - 1 >= max(0, len(proposals) - 1)
    assert drafted.sequence.length == 3 + len(emitted)


def test_an_answer_ends_at_the_first_end_token_stop_string_or_at_its_length(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    text = "if x:\n    return 1\n\nprint"
    tokens = tokenizer.encode(text, plain=True)
    whole = Stopper(frozenset({END_TOKEN}), 1000)
    assert whole.take(tokens) == (tokens, None)
    assert whole.take([END_TOKEN, 1]) == ([END_TOKEN], STOP)
    assert Stopper(frozenset(), 4).take(tokens) == (tokens[:4], LENGTH)
    stopper = Stopper(frozenset(), 1000, ("\n\n", "zzz"), tokenizer)
    taken, reason = stopper.take(tokens)
    assert reason == STOP
    assert tokenizer.decode(taken) == "if x:\n    return 1\n\n"


@given(st.lists(st.integers(1, 6), max_size=12))
def test_where_an_answer_ends_does_not_depend_on_how_many_tokens_a_pass_gave(folder: Path, cuts: list[int]) -> None:
    tokenizer = Tokenizer(folder)
    tokens = tokenizer.encode("naïve 🙂 text with a stop 🙂🙂 in it", plain=True)
    expected, _ = Stopper(frozenset(), 1000, ("🙂🙂",), tokenizer).take(tokens)
    stopper, taken, rest = Stopper(frozenset(), 1000, ("🙂🙂",), tokenizer), list[int](), tokens
    reason = None
    for cut in [*cuts, len(tokens)]:
        part, reason = stopper.take(rest[:cut])
        taken, rest = taken + part, rest[cut:]
        if reason is not None:
            break
    assert taken == expected
    assert reason == STOP
    assert len(taken) < len(tokens)
