from __future__ import annotations

import pytest

from countersign.services.engine.sampling import Sampling
from countersign.verify.coin.answers import Ask, continued, prolonged
from countersign.verify.coin.attacks import Thought
from countersign.verify.difr import THRESHOLDS, Reference, judge, load_reference, token_scores
from countersign.verify.testing import Asked, generate, write_tiny_model

ASKED = Asked()
SAMPLING = Sampling(ASKED.temperature, ASKED.top_k, ASKED.top_p, ASKED.seed)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return load_reference(write_tiny_model(tmp_path_factory.mktemp("tiny")), "fp32")


def test_many_answers_at_once_are_those_that_each_would_get_alone(reference: Reference) -> None:
    prompts = [[60 + i, 70, 80][: 1 + i % 3] for i in range(40)]
    answers = continued(reference.model, [Ask(prompt, SAMPLING) for prompt in prompts], 12)
    for prompt, answer in zip(prompts, answers, strict=True):
        alone = generate(reference, prompt, ASKED, 12)
        assert answer[: len(alone)] == alone


def test_a_prolonged_thought_deviates_at_one_token_which_the_tokens_level_sees(reference: Reference) -> None:
    (output,) = continued(reference.model, [Ask([60, 61], SAMPLING)], 40)
    thought = Thought((60, 61), tuple(output[:30]), tuple(output[30:]))
    longer = prolonged(reference.model, thought, 45, SAMPLING)
    assert (len(longer.hidden), len(longer.visible)) == (45, 10)
    assert longer.hidden[:30] == thought.hidden
    scores = token_scores(reference.model, longer.prompt, (*longer.hidden, *longer.visible), SAMPLING)
    assert [at for at, score in enumerate(scores) if score > 0] == [30]
    assert judge(scores, THRESHOLDS["fp32"]).outcome == "fail"
    assert judge(scores[:30], THRESHOLDS["fp32"]).outcome != "fail"
