"""What the tests of the kernels share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch


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


@pytest.fixture(scope="module")
def dot_by_row() -> Iterator[None]:
    """The interpreter's dot is NumPy's, whose BLAS rounds a row by its place in the matrix. Tensor cores do not, and
    neither does einsum.
    """

    from triton.runtime.interpreter import InterpreterBuilder

    def dot(_: Any, a: Any, b: Any, d: Any, *__: Any) -> Any:
        return type(d)(np.einsum("mk,kn->mn", a.data, b.data) + d.data, d.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", dot)
        yield
