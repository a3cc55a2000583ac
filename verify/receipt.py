"""Signed receipts: made, read, verified. This is the door to ``payload``, ``openings`` and ``envelope``.

>>> data = sign(receipt, openings, private_key)                # doctest: +SKIP
>>> signed = ReceiptVerifier([public_key]).form(data)          # doctest: +SKIP
>>> ReceiptVerifier([public_key]).count(signed).output_token_ids   # doctest: +SKIP
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from countersign.verify import merkle, payload
from countersign.verify.cose import key_id
from countersign.verify.envelope import (
    MAX_PAYLOAD_BYTES,
    MAX_RECEIPT_BYTES,
    Envelope,
    check_signature,
    seal,
    unseal,
)
from countersign.verify.errors import Inconsistent, Malformed, NotCheckable, OpeningMismatch, Untrusted
from countersign.verify.openings import (
    Openings,
    build_output,
    prompt_digest,
    prompt_salt,
    salted_prompt,
    salted_stop,
    stop_digest,
    stop_salt,
    token_leaves,
)
from countersign.verify.partial import Disclosure, PartialOpenings, opened_root, withhold
from countersign.verify.payload import (
    Activations,
    Evidence,
    HiddenMarkers,
    Model,
    Output,
    Receipt,
    Request,
    Segment,
    Trace,
    Usage,
)
from countersign.verify.segments import Segmenter, segments_of, visible_runs

__all__ = [
    "MAX_RECEIPT_BYTES",
    "Activations",
    "Disclosure",
    "Evidence",
    "HiddenMarkers",
    "Model",
    "Openings",
    "Output",
    "PartialOpenings",
    "Receipt",
    "ReceiptVerifier",
    "Request",
    "Segment",
    "SignedReceipt",
    "Trace",
    "Usage",
    "attach",
    "attach_proofs",
    "build_output",
    "key_id",
    "parse",
    "prompt_digest",
    "receipt_digest",
    "sign",
    "stop_digest",
    "strip",
    "withheld",
]


@dataclass(frozen=True, slots=True)
class SignedReceipt:
    """A receipt that was read. The type does not say that the signature holds: ``ReceiptVerifier.form`` does.

    ``leaf`` is its leaf hash in a transparency log; ``proofs`` (COSE receipts) and ``checkpoint`` (a signed note) are
    what it carries of one, which ``trust`` checks.
    """

    receipt: Receipt
    openings: Disclosure | None
    key_id: bytes
    digest: bytes
    leaf: bytes
    proofs: tuple[bytes, ...] = ()
    checkpoint: bytes | None = None


class ReceiptVerifier:
    """All trust rules for receipts, in the order in which they are applied. No input or output, no clock.

    ``form`` (signed by whom we trust, and not nonsense):
        1. The receipt has at most 4 MiB, its payload at most 65,000 bytes.
        2. It is one COSE_Sign1 in deterministic CBOR, nothing before, after or beside it.
        3. The protected header names EdDSA, the content type of receipts and a key id, and nothing else.
        4. The payload fits the schema of version 1: all of its keys and no others, types, bounds.
        5. The claims do not contradict each other: hidden and visible add up, segments too, which take turns; nothing
           hidden without two different markers; no more accepted than drafted or answered, no token without a pass,
           nothing drafted with drafting off; not more tokens than max_tokens, "length" means exactly max_tokens,
           "stop" at least one token; what is drawn has a seed; nothing finishes before it starts; fingerprints are
           one a token.
        6. The key id is that of a trusted key.
        7. That key's signature over protected header and payload holds.

    ``count`` (the answer that is disclosed is the one that was signed and billed):
        8. Openings are there.
        9. Prompt and stop strings give the signed salted digests, the prompt has the signed number of tokens.
        10. The output has the signed number of tokens and gives the signed Merkle root. Of partial openings the visible
            tokens and the hashes in place of the hidden ones do, in a tree of the signed size.
        11. The segments are those that the markers give; of partial openings: no visible token begins a hidden segment,
            nor is the first one visible where the prompt ends inside one.

    Rules 1 to 5 come before the signature because they need no key, so that nonsense is told apart from an unknown
    signer. They read only what ``cbor`` has found to be small, shallow and plain.
    """

    def __init__(self, trusted_keys: Iterable[Ed25519PublicKey]) -> None:
        self._keys = {key_id(key): key for key in trusted_keys}

    def form(self, data: bytes) -> SignedReceipt:
        """Rules 1 to 7.

        Raises:
            NotCheckable: rules 1 to 5 hold and there is no trusted key at all.
            VerificationError: the rule that is broken.
        """
        envelope = unseal(data)  # 1, 2, 3
        signed = _read(envelope)  # 4
        self._agreement(signed.receipt)  # 5
        self._signed_by_trusted_key(envelope)  # 6, 7
        return signed

    def count(self, signed: SignedReceipt) -> Disclosure:
        """Rules 8 to 11; the openings, of which every token is now known to be the signed one.

        Raises:
            NotCheckable: there are no openings.
            OpeningMismatch: they are not of what was signed.
        """
        receipt, openings = signed.receipt, signed.openings
        if openings is None:
            raise NotCheckable(
                "the receipt carries no openings: its tokens are not disclosed",
                help="ask the client or the provider for the receipt with its openings",
            )
        self._request_opens(receipt.request, openings)
        if isinstance(openings, PartialOpenings):
            self._visible_opens(receipt, openings)
        else:
            self._output_opens(receipt, openings)
        return openings

    def _agreement(self, receipt: Receipt) -> None:
        for broken, message in (*_output_claims(receipt), *_speed_claims(receipt), *_request_claims(receipt)):
            if broken:
                raise Inconsistent(message, request=receipt.request_id)

    def _signed_by_trusted_key(self, envelope: Envelope) -> None:
        if not self._keys:
            raise NotCheckable(
                "no trusted key to check the signature with",
                help="get the provider's public key in a way that you trust and name it (--key FILE)",
                signer=envelope.key_id,
            )
        key = self._keys.get(envelope.key_id)
        if key is None:
            raise Untrusted(
                "signed by a key that is not trusted",
                signer=envelope.key_id,
                trusted=" ".join(k.hex() for k in self._keys),
            )
        check_signature(envelope, key)

    def _request_opens(self, request: Request, openings: Disclosure) -> None:
        if len(openings.prompt_token_ids) != request.prompt_tokens:
            raise OpeningMismatch(
                "the opened prompt has another length",
                signed=request.prompt_tokens,
                opened=len(openings.prompt_token_ids),
            )
        of_prompt, of_stop = _salts(openings)
        prompt = salted_prompt(openings.prompt_token_ids, of_prompt)
        if prompt != request.prompt:
            raise OpeningMismatch("the opened prompt is not the signed one", signed=request.prompt, opened=prompt)
        stop = salted_stop(openings.stop, of_stop)
        if stop != request.stop:
            raise OpeningMismatch("the opened stop strings are not the signed ones", signed=request.stop, opened=stop)

    def _output_opens(self, receipt: Receipt, openings: Openings) -> None:
        output, opened = receipt.output, openings.output_token_ids
        if len(opened) != output.tokens:
            raise OpeningMismatch("another number of output tokens is opened", signed=output.tokens, opened=len(opened))
        root = merkle.root(token_leaves(receipt.request_id, opened, openings.salt_key))
        if root != output.root:
            raise OpeningMismatch("the opened output is not the signed one", signed=output.root, opened=root)
        if output.segments != segments_of(openings.prompt_token_ids, opened, receipt.request.hidden):
            raise OpeningMismatch("the signed segments are not those that the markers of hidden tokens give")

    def _visible_opens(self, receipt: Receipt, openings: PartialOpenings) -> None:
        output, markers = receipt.output, receipt.request.hidden
        root = opened_root(receipt.request_id, output.tokens, visible_runs(output.segments), openings.leaves)
        if root != output.root:
            raise OpeningMismatch("the opened visible tokens are not the signed ones", signed=output.root, opened=root)
        if markers is not None and markers.begin in openings.leaves.token_ids:
            raise OpeningMismatch("a token that begins a hidden segment is signed as visible", token_id=markers.begin)
        begins = openings.leaves.token_ids[:1] if output.segments and output.segments[0].kind == "visible" else ()
        if any(map(Segmenter(markers, openings.prompt_token_ids).feed, begins)):
            raise OpeningMismatch("the prompt ends inside a hidden segment, and the output begins as visible")


def sign(receipt: Receipt, openings: Openings | None, private_key: Ed25519PrivateKey) -> bytes:
    """The signed receipt, openings included.

    Raises:
        VerificationError: the verifier would refuse it; such a receipt is never signed.
    """
    verifier = ReceiptVerifier([private_key.public_key()])
    data = seal(payload.encode(receipt), openings, private_key).encode()
    signed = verifier.form(data)
    if openings is not None:
        verifier.count(signed)
    return data


def parse(data: bytes) -> SignedReceipt:
    """Reads a receipt and believes nothing: rules 1 to 4.

    Raises:
        Malformed: it cannot be read.
    """
    return _read(unseal(data))


def strip(data: bytes) -> bytes:
    """The bare receipt: without openings, proofs or checkpoint; the signature stays valid. It is the receipt's entry in
    a transparency log, and ``receipt_digest`` its SHA-256.

    Raises:
        Malformed: it cannot be read.
    """
    return unseal(data).bare()


def withheld(receipt: Receipt, openings: Openings) -> Disclosure:
    """What the client of this answer is given: all, or all but what its hidden tokens are."""
    if not receipt.output.hidden:
        return openings
    return withhold(openings, receipt.request_id, visible_runs(receipt.output.segments))


def attach(data: bytes, openings: Disclosure) -> bytes:
    """The same receipt with these openings, which are checked to be its own.

    Raises:
        VerificationError: it cannot be read, or they are not.
    """
    envelope = replace(unseal(data), openings=openings)
    ReceiptVerifier(()).count(_read(envelope))
    return envelope.encode()


def attach_proofs(data: bytes, proofs: Sequence[bytes], checkpoint: bytes | None = None) -> bytes:
    """The same receipt with proofs that it is in a log (COSE receipts) and the log's signed checkpoint, both in place
    of those it had. Neither is checked.

    Raises:
        Malformed: it cannot be read, or the verifier would not read it with these.
    """
    attached = replace(unseal(data), proofs=tuple(proofs), checkpoint=checkpoint).encode()
    unseal(attached)
    return attached


def receipt_digest(data: bytes) -> bytes:
    """SHA-256 (32 bytes) of the bare receipt, as the Closed record holds it.

    Raises:
        Malformed: it cannot be read.
    """
    return unseal(data).digest()


def _read(envelope: Envelope) -> SignedReceipt:
    if len(envelope.payload) > MAX_PAYLOAD_BYTES:
        raise Malformed("the payload is larger than any receipt's", size=len(envelope.payload), limit=MAX_PAYLOAD_BYTES)
    return SignedReceipt(
        receipt=payload.decode(envelope.payload),
        openings=envelope.openings,
        key_id=envelope.key_id,
        digest=envelope.digest(),
        leaf=merkle.leaf_hash(envelope.bare()),
        proofs=envelope.proofs,
        checkpoint=envelope.checkpoint,
    )


def _salts(openings: Disclosure) -> tuple[bytes, bytes]:
    if isinstance(openings, PartialOpenings):
        return openings.prompt_salt, openings.stop_salt
    return prompt_salt(openings.salt_key), stop_salt(openings.salt_key)


def _output_claims(receipt: Receipt) -> tuple[tuple[bool, str], ...]:
    output, most = receipt.output, receipt.request.max_tokens
    by_kind = {"hidden": 0, "visible": 0}
    for segment in output.segments:
        by_kind[segment.kind] += segment.tokens
    return (
        (output.hidden + output.visible != output.tokens, "hidden and visible tokens do not add up to the tokens"),
        (by_kind != {"hidden": output.hidden, "visible": output.visible}, "the segments do not add up to the counts"),
        (
            any(one.kind == other.kind for one, other in pairwise(output.segments)),
            "two segments in a row are of one kind",
        ),
        (output.hidden > 0 and receipt.request.hidden is None, "hidden tokens without markers that hide them"),
        (output.tokens > most, "more tokens than max_tokens"),
        (output.finish_reason == "length" and output.tokens != most, 'ended by "length" before max_tokens'),
        (output.finish_reason == "stop" and output.tokens == 0, 'ended by "stop" without a token'),
    )


def _speed_claims(receipt: Receipt) -> tuple[tuple[bool, str], ...]:
    evidence, tokens = receipt.evidence, receipt.output.tokens
    activations = evidence.activations
    return (
        (activations is not None and activations.count != tokens, "another number of fingerprints than of tokens"),
        (evidence.accepted > evidence.drafted, "more tokens accepted than drafted"),
        (evidence.accepted > tokens, "more tokens accepted than answered"),
        (tokens > evidence.accepted + evidence.passes, "more tokens than accepted ones and one for each pass"),
        (evidence.passes > tokens, "more passes than tokens"),
        (evidence.drafting == "off" and evidence.drafted > 0, "tokens drafted with drafting off"),
        (evidence.cached_prompt_tokens > receipt.request.prompt_tokens, "more prompt tokens cached than there are"),
    )


def _request_claims(receipt: Receipt) -> tuple[tuple[bool, str], ...]:
    request, usage = receipt.request, receipt.usage
    joules, hidden = usage.joules, request.hidden
    return (
        (hidden is not None and hidden.begin == hidden.end, "one marker begins and ends hidden tokens"),
        (request.temperature > 0 and request.seed is None, "tokens were drawn without a seed"),
        (
            (request.seed is None) != (request.seed_source == "none"),
            "a seed without a source, or a source without a seed",
        ),
        (isinstance(joules, float) and not math.isfinite(joules), "the energy is not a number"),
        (usage.finished_unix_ms < usage.started_unix_ms, "finished before it started"),
    )
