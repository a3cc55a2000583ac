"""The target service: takes requests over from their logs and answers into them."""

from __future__ import annotations

import asyncio
import platform
import time
from contextlib import aclosing, suppress
from pathlib import Path

import torch
from google.protobuf.descriptor import ServiceDescriptor

from countersign import __version__
from countersign.kernels.fingerprint import Fingerprinter
from countersign.services.engine.config import ModelConfig
from countersign.services.engine.engine import Engine
from countersign.services.engine.errors import CheckpointError, EngineError, RankLost
from countersign.services.engine.generation import Generation
from countersign.services.engine.kv import PagedCache
from countersign.services.engine.model import Model, load_model
from countersign.services.engine.pages import PAGE_TOKENS
from countersign.services.engine.ranks.load import load_ranked_model
from countersign.services.engine.runner import Runner
from countersign.services.engine.sampling import Sampling
from countersign.services.engine.text import Tokenizer
from countersign.services.protocol.commit import LogState, replay
from countersign.services.protocol.errors import EpochShared, LogError, NotOwner
from countersign.services.protocol.events import CancelledByClient
from countersign.services.protocol.matching import arithmetic_of, same_arithmetic, same_weights
from countersign.services.protocol.subjects import commit_subject
from countersign.services.protocol.writer import Writer
from countersign.services.runtime.announcer import Announcer
from countersign.services.runtime.clock import wall_ms
from countersign.services.runtime.config import Role, TargetConfig
from countersign.services.runtime.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
    translated,
)
from countersign.services.runtime.journal import Journal
from countersign.services.runtime.service import Call, Context
from countersign.services.runtime.telemetry import metrics, tracing
from countersign.services.runtime.telemetry.energy import EnergyMeter, observe_energy
from countersign.services.target.committer import Committer
from countersign.services.target.drafts import Drafts
from countersign.services.target.faults import FAULTS, DishonestRunner, Dishonesty, load_dishonest
from countersign.services.target.hiding import markers
from countersign.services.target.loop import TargetLoop
from countersign.services.target.metering import observe_engine
from countersign.services.target.prefilling import PrefillJob, prefill_id
from countersign.services.target.prefixes import Prefixes, PrefixKeys
from countersign.services.target.receipts import ReceiptMaker
from countersign.services.target.session import Session
from countersign.services.target.stopping import Stopper
from countersign.services.target.tracing import AnswerTrace
from countersign.services.target.wire import Wire
from countersign.v1 import target_pb2
from countersign.v1.commit_pb2 import Opened
from countersign.v1.event_pb2 import Started
from countersign.v1.registry_pb2 import Instance, TargetRole
from countersign.v1.router_pb2 import ModelInfo
from countersign.v1.target_pb2 import (
    PrefillRequest,
    PrefillResponse,
    RefreshRequest,
    RefreshResponse,
    SetRoleRequest,
    SetRoleResponse,
    StartRequest,
    StartResponse,
)
from countersign.verify.errors import KeyFileError
from countersign.verify.fingerprints import SEED
from countersign.verify.keys import load_or_create_signing_key, write_public

# Layout of an exported block (engine/kv.py); another layout gets another name, and so other keys.
CACHE_FORMAT = "layers-kv-heads-page/2"
# Prefills at once, each of which is a call that waits: well below the calls that may run.
MAX_PREFILLS = 32
ROLES: dict[Role, TargetRole.ValueType] = {
    "mixed": TargetRole.TARGET_ROLE_MIXED,
    "prefill": TargetRole.TARGET_ROLE_PREFILL,
    "decode": TargetRole.TARGET_ROLE_DECODE,
}


class TargetService:
    """``Start`` makes a session of a log; ``run`` works on the sessions."""

    descriptor: ServiceDescriptor = target_pb2.DESCRIPTOR.services_by_name["TargetService"]

    def __init__(
        self,
        instance: str,
        info: ModelInfo,
        config: ModelConfig,
        tokenizer: Tokenizer,
        keys: PrefixKeys,
        journal: Journal,
        loop: TargetLoop,
        committer: Committer,
        announcer: Announcer,
        *,
        most: int,
        role: Role = "mixed",
        dishonesty: Dishonesty | None = None,
    ) -> None:
        self._instance = instance
        self._info = info
        self._config = config
        self._tokenizer = tokenizer
        self._keys = keys
        self._journal = journal
        self._loop = loop
        self._committer = committer
        self._announcer = announcer
        self._most = most
        self._role = ROLES[role]
        self._dishonesty = dishonesty
        self._tracer = tracing.tracer()
        self._prefilled = 0

    async def run(self) -> None:
        await self._loop.run()

    async def close(self) -> None:
        await self._loop.close()

    def describe(self, instance: Instance) -> None:
        instance.model.CopyFrom(self._info)
        instance.active_requests = self._loop.sessions
        instance.role = self._role
        instance.pending_prompt_tokens = self._loop.pending_prompt_tokens
        instance.prefilled_blocks = self._prefilled

    async def Start(self, request: StartRequest, call: Call) -> StartResponse:
        """Take a request over from its log, or do nothing when it is here.

        Raises:
            FailedPrecondition: the log gives the request to another, or asks for other weights.
            ResourceExhausted: the queue is full.
            DataLoss: the log is not as the protocol says.
        """
        held = self._loop.find(request.request_id)
        if held is not None and held.writer.epoch == request.epoch:
            return StartResponse(sequence=held.writer.log.sequence)
        if held is not None:
            await self._refresh(held)
            raise Unavailable(
                f"target {self._instance} still lets go of request {request.request_id}",
                reason="OLD_EPOCH",
                help="try again",
            )
        if self._loop.sessions >= self._most:
            raise self._full()
        writer = await self._take_over(request)
        # The same call may have come twice while the log was read.
        if writer.log.closed is None and self._loop.find(request.request_id) is None:
            session = self._session(writer, self._opened(writer.log))
            if isinstance(writer.stop, CancelledByClient):
                session.cancel()
            with translated(EngineError, FailedPrecondition, about=request.request_id, reason="TOO_LARGE"):
                self._loop.add(session, self._committer)
            started = Started(epoch=writer.epoch)
            await self._announcer.announce(session.party.says(writer.log.sequence, started=started))
        return StartResponse(sequence=writer.log.sequence)

    async def Refresh(self, request: RefreshRequest, call: Call) -> RefreshResponse:
        """Raises DataLoss when the log is not as the protocol says."""
        session = self._loop.find(request.request_id)
        if session is not None:
            await self._refresh(session)
        return RefreshResponse()

    async def Prefill(self, request: PrefillRequest, call: Call) -> PrefillResponse:
        """Compute a prompt for the store until that is done, or somebody has appended to the log since.

        Raises:
            ResourceExhausted: there are too many requests or prefills.
            Unavailable: reason NO_STORE.
            FailedPrecondition: other weights, or a prompt that this target cannot compute.
            DataLoss: the log is not as the protocol says.
            DeadlineExceeded: the request's deadline has passed.
        """
        log = await self._read(request.request_id)
        opened = self._opened(log)
        keys = self._keys(opened.tenant, opened.prompt_token_ids[:-1])
        if log.epoch or log.ended or not keys:
            return PrefillResponse()
        if self._loop.prefills >= MAX_PREFILLS or self._loop.sessions + self._loop.prefills >= self._most:
            raise self._full()
        prefill = PrefillJob(
            Generation(
                prefill_id(request.request_id),
                opened.prompt_token_ids[: len(keys) * PAGE_TOKENS],
                max_tokens=1,
                tenant=opened.tenant,
                deadline=opened.deadline_unix_ms or None,
                keys=keys,
            ),
            self._config.layers,
        )
        with translated(EngineError, FailedPrecondition, about=request.request_id, reason="NOT_COMPUTED"):
            done = await self._unless_it_grows(log, prefill)
        return PrefillResponse(offered_blocks=prefill.offered, found_blocks=prefill.found, done=done)

    async def SetRole(self, request: SetRoleRequest, call: Call) -> SetRoleResponse:
        """Raises InvalidArgument for no role."""
        if request.role not in ROLES.values():
            raise InvalidArgument(
                f"{request.role} is no role of a target", reason="UNKNOWN_ROLE", help="mixed, prefill or decode"
            )
        self._role = request.role
        return SetRoleResponse()

    async def _unless_it_grows(self, log: LogState, prefill: PrefillJob) -> bool:
        """Whether the prompt is in the store: False when the log grew before that."""
        async with aclosing(self._journal.tail(commit_subject(log.request_id), after=log.sequence)) as tail:
            growing = asyncio.ensure_future(anext(tail))
            computing = asyncio.ensure_future(self._loop.prefill(prefill))
            try:
                await asyncio.wait({growing, computing}, return_when=asyncio.FIRST_COMPLETED)
                if not computing.done():
                    return False
                computing.result()
            finally:
                growing.cancel()
                computing.cancel()
                await asyncio.gather(growing, computing, return_exceptions=True)
                self._prefilled += prefill.offered
        return True

    async def _refresh(self, session: Session) -> None:
        writer = session.writer
        entries = await self._journal.read(commit_subject(session.request_id), after=writer.log.sequence)
        if writer.in_flight is not None:
            return  # that append will be translated, and find out by itself
        about = f"the log of request {session.request_id} is damaged"
        with suppress(EpochShared), translated(LogError, DataLoss, about=about):  # who shares its epoch has stopped
            writer.tail(entries)
        if isinstance(writer.stop, CancelledByClient):
            session.cancel()
        if writer.stop is not None:
            self._loop.ended(session)

    async def _take_over(self, request: StartRequest) -> Writer:
        log = await self._read(request.request_id)
        with translated(NotOwner, FailedPrecondition, about=f"request {request.request_id}", reason="NOT_OWNER"):
            return Writer(log, epoch=request.epoch, instance=self._instance)

    async def _read(self, request_id: str) -> LogState:
        entries = await self._journal.read(commit_subject(request_id))
        with translated(LogError, DataLoss, about=f"the log of request {request_id} is damaged"):
            return replay(request_id, entries)

    def _full(self) -> ResourceExhausted:
        return ResourceExhausted(
            f"target {self._instance} has {self._most} requests, or {MAX_PREFILLS} prompts of others already",
            reason="TARGET_FULL",
            help="try again later",
        )

    def _opened(self, log: LogState) -> Opened:
        opened = log.opened
        if opened is None or not same_weights(self._info, log):
            raise FailedPrecondition(
                f"request {log.request_id} asks for other weights than those of {self._info.name}",
                reason="OTHER_WEIGHTS",
                help="start it on a target that serves them",
            )
        if not same_arithmetic(self._info, log):
            raise FailedPrecondition(
                f"request {log.request_id} was computed by {log.arithmetic}, and this is {arithmetic_of(self._info)}",
                reason="OTHER_ARITHMETIC",
                help="start it on a target that computes so",
            )
        return opened

    def _session(self, writer: Writer, opened: Opened) -> Session:
        params = opened.sampling
        prompt, committed = list(opened.prompt_token_ids), list(writer.log.token_ids)
        end = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._config.end_token_ids)
        stopper = Stopper(end, params.max_tokens, tuple(params.stop), self._tokenizer)
        stopper.prompt(prompt)
        unseen, sampling = 0, Sampling(params.temperature, params.top_k, params.top_p, params.seed)
        if self._dishonesty is not None:
            unseen, sampling = self._dishonesty.session(writer.log.request_id, len(prompt), sampling)
        session = Session(
            request_id=writer.log.request_id,
            opened=opened,
            writer=writer,
            stopper=stopper,
            generation=Generation(
                writer.log.request_id,
                prompt[unseen:] + committed,
                max(params.max_tokens - len(committed), 1),
                sampling,
                tenant=opened.tenant,
                deadline=opened.deadline_unix_ms or None,
                keys=self._keys(opened.tenant, prompt[unseen:]),
            ),
            started_unix_ms=wall_ms(),
            party=self._announcer.party(writer.log.request_id),
            unseen=unseen,
            trace=AnswerTrace(self._tracer, writer, self._instance),
            padding=None if self._dishonesty is None else self._dishonesty.padding(opened, committed),
        )
        # An earlier epoch may have committed the last token and died before it closed the log.
        _, reason = stopper.take(committed)
        if reason is not None:
            session.end(reason)
        return session


async def create(context: Context) -> TargetService:
    """Load the model of ``target.model`` and the signing key, which is made at the first start.

    Raises FailedPrecondition when the folder is not understood (BAD_CHECKPOINT), cannot be computed here
    (BAD_CONFIGURATION), its vocabulary lacks the hidden markers (BAD_HIDDEN_MARKERS), or the key is unreadable
    (BAD_KEY_FILE).
    """
    config = context.config.target
    dishonesty = None if config.fault == "none" else Dishonesty(config.fault, FAULTS[config.fault], context.log)
    model, cache, tokenizer = _load(config, context.config.draft.model)
    prints = _fingerprinter(config, model)
    runner = Runner(model, cache, prints)
    if dishonesty is not None:
        runner = DishonestRunner(model, cache, dishonesty.fault, prints)
    engine = Engine.of(model, cache, config.token_budget, config.prefill_chunk, config.max_running, runner=runner)
    with translated(
        KeyFileError, FailedPrecondition, reason="BAD_KEY_FILE", help="mend the file, or remove it for a new key"
    ):
        key = load_or_create_signing_key(context.config.data_dir / "keys" / "receipts.key")
        write_public(context.config.data_dir / "keys" / "receipts.pub", key.public_key())
    info = ModelInfo(
        name=Path(config.model).name,
        weights_sha256=model.digests.weights,
        tokenizer_sha256=model.digests.tokenizer,
        config_sha256=model.digests.config,
        context_length=min(model.config.context_length, engine.scheduler.fits),
        vocabulary_size=model.config.vocabulary_size,
        dtype=config.dtype,
        executor=model.executor.name,
        receipt_key=key.public_key().public_bytes_raw(),
        drafting=context.config.draft.enabled,
        cache_tokens=config.cache_tokens,
    )
    hidden = markers(config.hidden_markers, tokenizer)
    if hidden is None and dishonesty is not None and dishonesty.fault.inflation:
        raise FailedPrecondition(
            f"target.fault={config.fault} adds hidden tokens, and this target hides none",
            reason="BAD_CONFIGURATION",
            help="set target.hidden_markers too",
        )
    if hidden is not None:
        info.hidden.CopyFrom(hidden)
    build = (
        f"countersign/{__version__} {model.executor.name} torch/{torch.__version__} python/{platform.python_version()}"
    )
    # Executors round differently, so that one's KV is not another's.
    wire = None
    cache_format = f"{CACHE_FORMAT}/{config.dtype}/{model.executor.name}"
    if config.kv_wire != "exact":
        wire = Wire(config.kv_wire, cache.dtype, PAGE_TOKENS * model.config.head_dim)
        cache_format += wire.suffix
    keys = PrefixKeys(info.weights_sha256, cache_format)
    prefixes = None
    if config.kv_store and dishonesty is None:
        prefixes = Prefixes(
            context.bus,
            context.instance,
            time.monotonic,
            context.log,
            keys=keys,
            block_bytes=cache.block_bytes,
            wire=wire,
        )
    drafts = Drafts(context.bus, context.config.draft, model.config.vocabulary_size, time.monotonic, context.log)
    announcer = Announcer(context.bus if context.config.sidecar.enabled else None, context.instance)
    loop = TargetLoop(engine, drafts, prefixes, keys, wall_ms=wall_ms, log=context.log, announcer=announcer)
    observe_engine(engine, model.executor, config.max_requests)
    observe_energy(EnergyMeter.open())
    metrics.observe(metrics.PENDING_PROMPT, lambda: loop.pending_prompt_tokens)
    maker = ReceiptMaker(key, info, build, config.kv_wire if config.kv_store else "exact")
    committer = Committer(context.journal, maker, wall_ms, loop.wake, context.log, announcer)
    return TargetService(
        context.instance,
        info,
        model.config,
        tokenizer,
        keys,
        context.journal,
        loop,
        committer,
        announcer,
        most=config.max_requests,
        role=config.role,
        dishonesty=dishonesty,
    )


def _fingerprinter(config: TargetConfig, model: Model) -> Fingerprinter | None:
    if not config.fingerprints:
        return None
    unfit = "change target.fingerprints; 0 makes none"
    with translated(ValueError, FailedPrecondition, reason="BAD_CONFIGURATION", help=unfit):
        return Fingerprinter(SEED, model.config.hidden_size, config.fingerprints, model.team)


def _load(config: TargetConfig, draft: Path) -> tuple[Model, PagedCache, Tokenizer]:
    torch.set_num_threads(config.threads)
    unfit, bad = "change target.dtype, target.ranks or target.model", "set target.model to a Hugging Face folder"
    with (
        translated(EngineError, FailedPrecondition, reason="BAD_CONFIGURATION", help=unfit),
        translated(CheckpointError, FailedPrecondition, reason="BAD_CHECKPOINT", help=bad),
        translated(RankLost, Unavailable, reason="RANK_LOST", help="see the log of the target"),
    ):
        model, cache = _computed(config, draft)
        return model, cache, Tokenizer(config.model)


def _computed(config: TargetConfig, draft: Path) -> tuple[Model, PagedCache]:
    if config.fault != "none":
        if config.ranks > 1:
            raise EngineError("a target that cheats on purpose (target.fault) has one rank")
        model = load_dishonest(
            FAULTS[config.fault],
            config.model,
            draft,
            dtype=config.dtype,
            numerics=config.numerics,
            threads=config.threads,
        )
        return model, PagedCache(model.config, config.dtype, tokens=config.cache_tokens)
    if config.ranks > 1:
        return load_ranked_model(
            config.model,
            ranks=config.ranks,
            tokens=config.cache_tokens,
            unit=config.rank_unit,
            dtype=config.dtype,
            threads=config.threads,
            timeout=config.rank_timeout_ms / 1000,
        )
    model = load_model(config.model, dtype=config.dtype, numerics=config.numerics, threads=config.threads)
    return model, PagedCache(model.config, config.dtype, tokens=config.cache_tokens)
