"""What ``countersign bench activations`` rests on: states as a provider had them, and groups of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from countersign.cli import bench
from countersign.services.engine.model import load_model
from countersign.services.target.faults import FAULTS, load_dishonest

ACTIVATIONS: Any = bench.load("activations")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    found: list[list[int]] = ACTIVATIONS.prompts_of(2)
    return found


def test_an_honest_providers_states_are_the_references_own(
    prompts: list[list[int]], demo_models: dict[str, Path]
) -> None:
    model = load_model(demo_models["target"])
    for answer in ACTIVATIONS.answers(model, prompts, 12):
        assert answer.states.shape == (12, model.config.hidden_size)
        assert torch.equal(answer.states, ACTIVATIONS.reference_states(model, answer))


@pytest.mark.parametrize("fault", ["int8", "truncated", "fp8-kv"])
def test_a_fault_shows_in_the_distances(fault: str, prompts: list[list[int]], demo_models: dict[str, Path]) -> None:
    reference = load_model(demo_models["target"])
    provider = load_dishonest(FAULTS[fault], demo_models["target"], demo_models["draft"])
    pool = ACTIVATIONS.pool(provider, reference, prompts, 12, fault)
    assert np.median(pool.scores(8)) > 1e-3


def test_groups_are_disjoint_and_leave_nothing_but_a_rest_out() -> None:
    groups = ACTIVATIONS.grouped(np.arange(32.0), 10)
    assert len(groups) == 3
    assert len(set(groups)) == 3
    assert ACTIVATIONS.grouped(np.arange(30.0), 10).sum() * 10 == sum(range(30))
