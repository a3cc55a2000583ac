"""A rank's rows of queries, keys or values, found by sequence and index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from countersign.kernels.ring.errors import LayoutError
from countersign.kernels.ring.layout import Part, Parts, count


class Table:
    """Rows of a tensor (n, ...), those of ``parts`` in order.

    Raises:
        LayoutError: the tensor has another number of rows.
    """

    def __init__(self, parts: Parts, tensor: Tensor) -> None:
        if count(parts) != len(tensor):
            raise LayoutError(f"{len(tensor)} rows are given where the layout has {count(parts)}: {parts}")
        self.shape, self.dtype = tuple(tensor.shape[1:]), tensor.dtype
        self._empty = tensor[:0]
        self._entries = (
            list(zip(parts, torch.split(tensor, [len(part) for part in parts]), strict=True)) if parts else []
        )

    def and_also(self, parts: Parts, tensor: Tensor) -> Table:
        """A table of these and more; this one stays as it is.

        Raises:
            LayoutError: the tensor has another number of rows.
        """
        more = Table(parts, tensor)
        more._entries = self._entries + more._entries
        return more

    def take(self, parts: Sequence[Part]) -> Tensor:
        """The rows of ``parts`` in order, contiguous.

        Raises:
            LayoutError: some are not here.
        """
        found = [tensor for part in parts for tensor in self._cover(part)]
        if len(found) == 1:
            return found[0].contiguous()
        return torch.cat(found) if found else self._empty

    def _cover(self, part: Part) -> Iterator[Tensor]:
        """The pieces that make up the part."""
        at = part.first
        while at < part.end:
            for has, tensor in self._entries:
                if has.sequence == part.sequence and has.first <= at < has.end:
                    yield tensor[at - has.first : min(has.end, part.end) - has.first]
                    at = min(has.end, part.end)
                    break
            else:
                raise LayoutError(f"index {at} of sequence {part.sequence} is not on this rank")
