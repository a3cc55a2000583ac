"""Which form of an op is chosen."""

from __future__ import annotations

import pytest
import torch

from countersign.kernels import dispatch
from countersign.kernels.dispatch import choose

X = torch.zeros(1)


def test_tensors_on_the_cpu_go_to_the_reference() -> None:
    assert choose(None, X) == "reference"


def test_a_backend_that_is_named_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("reference", X) == "reference"
    assert choose("triton", X) == "triton"


def test_triton_on_the_cpu_is_refused_unless_it_is_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="computes on a GPU; the tensors are on cpu"):
        choose("triton", X)


def test_triton_that_is_not_installed_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_installed", lambda: False)
    with pytest.raises(ValueError, match="pip install triton"):
        choose("triton", X)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tensors_on_a_gpu_go_to_triton() -> None:
    assert choose(None, X.cuda()) == "triton"
