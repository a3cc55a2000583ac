"""Makes the signed receipt of an answer from its log."""

from __future__ import annotations

from typing import Literal, cast

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from countersign.services.protocol.commit import LogState
from countersign.services.runtime.errors import Internal
from countersign.services.runtime.reasons import finish_name
from countersign.services.runtime.telemetry import tracing
from countersign.v1.commit_pb2 import Opened
from countersign.v1.router_pb2 import ModelInfo
from countersign.v1.sampling_pb2 import Drafting, FinishReason
from countersign.verify import receipt as receipts
from countersign.verify.logged import activations_of, markers_of, openings_of, segments_in
from countersign.verify.payload import FinishReason as SignedReason
from countersign.verify.payload import KvPolicy


class ReceiptMaker:
    """Signs with one key for one model.

    ``build`` names the release and the libraries that compute, ``kv_policy`` what may have been lost of the KV.
    """

    def __init__(self, key: Ed25519PrivateKey, model: ModelInfo, build: str, kv_policy: KvPolicy = "exact") -> None:
        self._kv_policy = kv_policy
        self._key = key
        self._build = build
        self._model = receipts.Model(
            name=model.name,
            weights=model.weights_sha256,
            tokenizer=model.tokenizer_sha256,
            config=model.config_sha256,
            dtype=cast('Literal["fp32", "bf16"]', model.dtype),
            numerics="invariant",
            build=build,
        )

    def make(self, log: LogState, reason: FinishReason.ValueType, started_unix_ms: int, finished_unix_ms: int) -> bytes:
        """The signed receipt, without openings, of the answer that ``log`` holds and that ends for ``reason``.

        Raises:
            VerificationError: the log does not add up to a receipt that a verifier would take; none is signed then.
            Internal: the log has no Opened record.
        """
        opened = _opened(log)
        receipt = receipts.Receipt(
            request_id=log.request_id,
            model=self._model,
            request=_request(opened),
            output=receipts.build_output(
                log.request_id,
                log.token_ids,
                opened.salt_key,
                finish_reason=cast(SignedReason, finish_name(reason)),
                segments=segments_in(log, opened),
            ),
            evidence=receipts.Evidence(
                commit=log.digest,
                records=log.records,
                drafting="off" if opened.drafting == Drafting.DRAFTING_OFF else "model",
                drafted=log.drafted,
                accepted=log.accepted,
                passes=log.passes,
                cached_prompt_tokens=log.cached_prompt_tokens,
                kv_policy=self._kv_policy,
                activations=activations_of(log),
            ),
            trace=_trace(opened.traceparent),
            usage=receipts.Usage(started_unix_ms, max(started_unix_ms, finished_unix_ms), joules="unavailable"),
        )
        # Signed with its openings so that it is checked against them, stored without: the log has them.
        return receipts.strip(receipts.sign(receipt, openings_of(log), self._key))


def _opened(log: LogState) -> Opened:
    if log.opened is None:
        raise Internal(f"request {log.request_id} has no Opened record, so there is nothing to sign")
    return log.opened


def _trace(traceparent: str) -> receipts.Trace | None:
    span = tracing.context_of(traceparent)
    if span is None:
        return None
    return receipts.Trace(
        span.trace_id.to_bytes(16, "big"), span.span_id.to_bytes(8, "big"), sampled=span.trace_flags.sampled
    )


def _request(opened: Opened) -> receipts.Request:
    params = opened.sampling
    seeded = params.HasField("seed")
    return receipts.Request(
        prompt=receipts.prompt_digest(opened.prompt_token_ids, opened.salt_key),
        prompt_tokens=len(opened.prompt_token_ids),
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        seed=params.seed if seeded else None,
        seed_source="client" if seeded else "none",
        max_tokens=params.max_tokens,
        stop_token_ids=tuple(params.stop_token_ids),
        ignore_eos=params.ignore_eos,
        stop=receipts.stop_digest(params.stop, opened.salt_key),
        coupling="gumbel",
        opened_unix_ms=opened.opened_unix_ms,
        hidden=markers_of(opened),
    )
