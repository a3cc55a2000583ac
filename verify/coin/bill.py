"""What may be billed for an answer: the tokens that its receipt signs for, and no others."""

from __future__ import annotations

from dataclasses import dataclass

from countersign.verify.errors import Inconsistent
from countersign.verify.payload import Receipt


@dataclass(frozen=True, slots=True)
class Bill:
    """What the provider charges for. ``hidden_tokens``: of the output tokens; None where the bill does not tell."""

    request_id: str
    prompt_tokens: int
    output_tokens: int
    hidden_tokens: int | None = None


def check(receipt: Receipt, bill: Bill) -> None:
    """Whether the bill is the receipt's. That the receipt's counts are true is for ``count`` and ``challenge``.

    Raises:
        Inconsistent: it names another request or another number of tokens.
    """
    output = receipt.output
    for name, billed, signed in (
        ("request", bill.request_id, receipt.request_id),
        ("prompt tokens", bill.prompt_tokens, receipt.request.prompt_tokens),
        ("output tokens", bill.output_tokens, output.tokens),
        ("hidden tokens", output.hidden if bill.hidden_tokens is None else bill.hidden_tokens, output.hidden),
    ):
        if billed != signed:
            raise Inconsistent(f"the bill and the receipt differ in the {name}", billed=billed, signed=signed)
