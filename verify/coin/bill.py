"""What may be billed for an answer: the tokens that its receipt signs for, and no others."""

from __future__ import annotations

from dataclasses import dataclass

from countersign.verify.errors import Inconsistent
from countersign.verify.payload import Receipt


@dataclass(frozen=True, slots=True)
class Bill:
    """What the provider charges for; None where the bill does not tell. Hidden tokens are among the output tokens."""

    output_tokens: int
    prompt_tokens: int | None = None
    hidden_tokens: int | None = None
    request_id: str | None = None


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
        ("hidden tokens", bill.hidden_tokens, output.hidden),
    ):
        if billed is not None and billed != signed:
            raise Inconsistent(f"the bill and the receipt differ in the {name}", billed=billed, signed=signed)
