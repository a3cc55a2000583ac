"""The draft service: one model, one thread, proposals for a batch at a time."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor

from google.protobuf.descriptor import ServiceDescriptor

from countersign.services.draft.proposer import Ask, Proposer
from countersign.services.draft.tracing import DraftSpans
from countersign.services.engine.errors import CheckpointError, EngineError
from countersign.services.engine.sampling import Sampling
from countersign.services.runtime.errors import FailedPrecondition, InvalidArgument, translated
from countersign.services.runtime.service import Call, Context
from countersign.services.runtime.telemetry import metrics, tracing
from countersign.v1 import draft_pb2
from countersign.v1.draft_pb2 import (
    ForgetRequest,
    ForgetResponse,
    MissingPrefix,
    Proposal,
    ProposedTokens,
    ProposeRequest,
    ProposeResponse,
)
from countersign.v1.registry_pb2 import Instance

MAX_COUNT = 64


class DraftService:
    """Handlers over a ``Proposer``. Calls wait for the one thread that runs the model."""

    descriptor: ServiceDescriptor = draft_pb2.DESCRIPTOR.services_by_name["DraftService"]

    def __init__(self, proposer: Proposer, vocabulary_size: int, log: logging.Logger) -> None:
        self._proposer = proposer
        self._log = log
        self._vocabulary_size = vocabulary_size
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="draft")
        self._spans = DraftSpans(tracing.tracer())
        self._batches = metrics.histogram(metrics.DRAFT_BATCH_DURATION)

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def close(self) -> None:
        self._spans.close()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def describe(self, instance: Instance) -> None:
        instance.active_requests = self._proposer.sequences

    async def Propose(self, request: ProposeRequest, call: Call) -> ProposeResponse:
        """Raises InvalidArgument for ids beyond the vocabulary, repeated requests and counts beyond 64."""
        asks = [self._ask(sequence) for sequence in request.sequences]
        if len({ask.request_id for ask in asks}) != len(asks):
            raise InvalidArgument("Propose names a request twice", help="send each sequence once a batch")
        self._spans.asked(request.sequences)
        loop, before, began = asyncio.get_running_loop(), self._proposer.reused, time.monotonic()
        results = await loop.run_in_executor(self._thread, self._proposer.propose, asks)
        self._batches.record(time.monotonic() - began)
        if self._proposer.reused > before:
            self._log.info("KV of ended requests was taken", extra={"tokens": self._proposer.reused - before})
        response = ProposeResponse()
        for ask, result in zip(asks, results, strict=True):
            if isinstance(result, int):
                proposal = Proposal(request_id=ask.request_id, missing=MissingPrefix(held=result))
            else:
                proposal = Proposal(request_id=ask.request_id, tokens=ProposedTokens(ids=result))
            response.proposals.append(proposal)
        self._spans.answered(response.proposals, time.monotonic() - began)
        return response

    async def Forget(self, request: ForgetRequest, call: Call) -> ForgetResponse:
        loop = asyncio.get_running_loop()
        for request_id in request.request_ids:
            self._spans.ended(request_id)
            await loop.run_in_executor(self._thread, self._proposer.forget, request_id)
        return ForgetResponse()

    def _ask(self, sequence: draft_pb2.DraftSequence) -> Ask:
        if sequence.count > MAX_COUNT:
            raise InvalidArgument(f"Propose asks for {sequence.count} tokens", help=f"ask for at most {MAX_COUNT}")
        if any(token >= self._vocabulary_size for token in sequence.token_ids):
            raise InvalidArgument(
                f"Propose has a token id beyond the draft's vocabulary of {self._vocabulary_size}",
                reason="TOKEN_OUT_OF_VOCABULARY",
                help="draft and target must share one tokenizer",
            )
        params = sequence.sampling
        top_p = params.top_p if params.HasField("top_p") else 1.0
        sampling = Sampling(temperature=params.temperature, top_k=params.top_k, top_p=top_p, seed=params.seed)
        tokens = tuple(sequence.token_ids)
        return Ask(sequence.request_id, sequence.base, tokens, sequence.count, sampling, sequence.tenant)


async def create(context: Context) -> DraftService:
    """Load the model of ``draft.model``.

    Raises FailedPrecondition when the folder is not understood (BAD_CHECKPOINT) or cannot be computed here
    (BAD_CONFIGURATION).
    """
    import torch

    from countersign.services.engine.kv import PagedCache
    from countersign.services.engine.model import load_model
    from countersign.services.engine.reuse import Reuse

    config = context.config.draft
    torch.set_num_threads(config.threads)
    unfit, bad = "change draft.dtype or draft.model", "set draft.model to a Hugging Face folder"
    with (
        translated(EngineError, FailedPrecondition, reason="BAD_CONFIGURATION", help=unfit),
        translated(CheckpointError, FailedPrecondition, reason="BAD_CHECKPOINT", help=bad),
    ):
        model = load_model(config.model, dtype=config.dtype, threads=config.threads)
        cache = PagedCache(model.config, config.dtype, tokens=config.cache_tokens)
        reuse = None
        if config.reuse != "off":
            reuse = Reuse(model, cache, config.reuse_share if config.reuse == "blend" else 0.0)
    proposer = Proposer(model, cache, config.margin, reuse)
    metrics.observe(metrics.DRAFT_SEQUENCES, lambda: proposer.sequences)
    metrics.observe(metrics.DRAFT_REUSED, lambda: proposer.reused)
    return DraftService(proposer, model.config.vocabulary_size, context.log)
