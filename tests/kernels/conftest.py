"""What the tests of the kernels share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Before anything imports Triton, which reads it once.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are too small to share out; on a busy machine the threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def device() -> str:
    """The GPU where there is one; Triton kernels are interpreted elsewhere."""
    return "cuda" if torch.cuda.is_available() else "cpu"
