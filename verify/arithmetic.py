"""How a model was computed, as far as that changes bits; what a receipt says of it is the provider's word.

A name is the executor's and the dtype's: "native fp32". Audits are judged by what honest answers of that arithmetic
score, so that a provider who may name any names the roughest. Who knows what a deployment runs pins it
(``TrustPolicy.arithmetics``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from countersign.verify.payload import Name, Receipt

Dtype = Literal["fp32", "bf16"]


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """The dtype, and the executor's name (engine/model.py), or another engine's."""

    dtype: Dtype
    executor: Name

    def __str__(self) -> str:
        return f"{self.executor} {self.dtype}"


def arithmetic_of(receipt: Receipt) -> Arithmetic:
    """What the receipt says computed it: ``build`` names the executor after the release."""
    _, _, rest = receipt.model.build.partition(" ")
    return Arithmetic(receipt.model.dtype, rest.partition(" ")[0] or "unknown")
