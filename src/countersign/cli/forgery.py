"""Three ways to cheat with a receipt, for the demo and the tests: all of them must be refused."""

from __future__ import annotations

from dataclasses import replace

from countersign.verify import payload
from countersign.verify.envelope import unseal
from countersign.verify.errors import NotCheckable
from countersign.verify.receipt import Openings, PartialOpenings

OVERBILLED = 100


def other_token(receipt: bytes) -> bytes:
    """One token of the disclosed answer is another. Raises NotCheckable when no token is disclosed."""
    envelope = unseal(receipt)
    match envelope.openings:
        case Openings(output_token_ids=ids) as openings if ids:
            return replace(envelope, openings=replace(openings, output_token_ids=_altered(ids))).encode()
        case PartialOpenings(leaves=leaves) as openings if leaves.token_ids:
            changed = replace(leaves, token_ids=_altered(leaves.token_ids))
            return replace(envelope, openings=replace(openings, leaves=changed)).encode()
    raise NotCheckable("the receipt discloses no token that could be changed")


def _altered(ids: tuple[int, ...]) -> tuple[int, ...]:
    middle = len(ids) // 2
    return (*ids[:middle], ids[middle] ^ 1, *ids[middle + 1 :])


def other_count(receipt: bytes) -> bytes:
    """A hundred prompt tokens more are billed, in a payload that is otherwise without contradiction."""
    envelope = unseal(receipt)
    claims = payload.decode(envelope.payload)
    request = replace(claims.request, prompt_tokens=claims.request.prompt_tokens + OVERBILLED)
    return replace(envelope, payload=payload.encode(replace(claims, request=request))).encode()


def other_signature(receipt: bytes) -> bytes:
    """One bit of the signature is flipped."""
    envelope = unseal(receipt)
    signature = bytes([envelope.signature[0] ^ 1]) + envelope.signature[1:]
    return replace(envelope, signature=signature).encode()


FORGERIES = {
    "one token of the answer changed": other_token,
    f"{OVERBILLED} more prompt tokens billed": other_count,
    "one bit of the signature flipped": other_signature,
}
