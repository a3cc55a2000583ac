"""Requests that were answered: their token logs, and the receipts that a real target would sign for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from countersign.services.protocol.commit import LogState, Payload, encode
from countersign.services.target.receipts import ReceiptMaker
from countersign.v1.commit_pb2 import Assigned, Closed, Extended, Opened
from countersign.v1.router_pb2 import ModelInfo
from countersign.v1.sampling_pb2 import FINISH_REASON_LENGTH, SamplingParams, Usage
from countersign.verify.payload import Model
from countersign.verify.receipt import receipt_digest
from countersign.verify.testing import SALT_KEY, Asked, example_model, signing_key

STARTED_MS = 1_750_000_000_010


@dataclass(frozen=True, slots=True)
class Entry:
    """A record as the stream holds it."""

    sequence: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Done:
    """An answered request: the records of its log, the last of them Closed, and its receipt without openings."""

    request_id: str
    records: tuple[Entry, ...]
    receipt: bytes

    @property
    def digest(self) -> bytes:
        return receipt_digest(self.receipt)


def done(
    request_id: str,
    prompt: Sequence[int] = (1, 2, 3),
    output: Sequence[int] = (4, 5, 6, 7),
    *,
    model: Model | None = None,
    key: Ed25519PrivateKey | None = None,
    asked: Asked | None = None,
) -> Done:
    """A request that a target answered with ``output``, one token a pass."""
    asked, model = asked or Asked(), model or example_model()
    log, records = LogState(request_id), list[Entry]()

    def append(payload: Payload) -> None:
        nonlocal log
        data = encode(request_id, log.digest, payload)
        records.append(Entry(log.sequence + 1, data))
        log = log.apply(records[-1].sequence, data)

    sampling = SamplingParams(
        temperature=asked.temperature, top_k=asked.top_k, top_p=asked.top_p, seed=asked.seed, max_tokens=len(output)
    )
    append(Opened(model="m", prompt_token_ids=prompt, sampling=sampling, salt_key=SALT_KEY))
    append(Assigned(epoch=1, instance="target-1"))
    for base, token in enumerate(output):
        append(Extended(epoch=1, base=base, token_ids=[token]))
    info = ModelInfo(
        name=model.name,
        weights_sha256=model.weights,
        tokenizer_sha256=model.tokenizer,
        config_sha256=model.config,
        dtype=model.dtype,
    )
    maker = ReceiptMaker(key or signing_key(), info, model.build)
    receipt = maker.make(log, FINISH_REASON_LENGTH, STARTED_MS, STARTED_MS + 100)
    usage = Usage(prompt_tokens=len(prompt), output_tokens=len(output), target_passes=len(output))
    append(Closed(reason=FINISH_REASON_LENGTH, receipt_sha256=receipt_digest(receipt), usage=usage))
    return Done(request_id, tuple(records), receipt)
