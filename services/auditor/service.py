"""The auditor service: the same audit as on the command line, against its own copy of the reference weights."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from google.protobuf.descriptor import ServiceDescriptor

from countersign.services.runtime.errors import FailedPrecondition, InvalidArgument
from countersign.services.runtime.service import Call, Context
from countersign.v1 import auditor_pb2
from countersign.v1.auditor_pb2 import AuditLevel, AuditOutcome, AuditRequest, AuditResponse, LevelResult
from countersign.v1.registry_pb2 import Instance
from countersign.verify.audit import LEVELS, AuditReport, Dtype, Level, audit
from countersign.verify.errors import KeyFileError
from countersign.verify.keys import load_public

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    from countersign.verify.difr import Reference

_LEVELS: dict[AuditLevel.ValueType, Level] = {
    AuditLevel.Value(f"AUDIT_LEVEL_{level.upper()}"): level for level in LEVELS
}
_LEVEL_NUMBERS = {level: number for number, level in _LEVELS.items()}
_OUTCOMES = {
    "pass": AuditOutcome.AUDIT_OUTCOME_PASS,
    "fail": AuditOutcome.AUDIT_OUTCOME_FAIL,
    "inconclusive": AuditOutcome.AUDIT_OUTCOME_INCONCLUSIVE,
}


class AuditorService:
    """Audits wait for one thread: it runs the model, which is loaded at the first audit that reaches the tokens.

    ``key_file`` is read at each audit, so that the auditor may start before the target has written it; without it the
    form level is inconclusive.
    """

    descriptor: ServiceDescriptor = auditor_pb2.DESCRIPTOR.services_by_name["AuditorService"]

    def __init__(self, key_file: Path, model: Path, threads: int) -> None:
        self._key_file = key_file
        self._model = model
        self._threads = threads
        self._references: dict[Dtype, Reference] = {}
        self._active = 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="audit")

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def describe(self, instance: Instance) -> None:
        instance.active_requests = self._active

    async def Audit(self, request: AuditRequest, call: Call) -> AuditResponse:
        """Raises InvalidArgument for an unknown level, FailedPrecondition when the trusted key's file is unusable."""
        levels = [_level(number) for number in request.levels]
        self._active += 1
        try:
            loop = asyncio.get_running_loop()
            report = await loop.run_in_executor(self._thread, self._audit, request.receipt, levels)
        finally:
            self._active -= 1
        return _response(report)

    def _audit(self, receipt: bytes, levels: list[Level]) -> AuditReport:
        return audit(receipt, trusted_keys=self._trusted_keys(), reference=self._reference, levels=levels)

    def _trusted_keys(self) -> list[Ed25519PublicKey]:
        try:
            return [load_public(self._key_file)] if self._key_file.exists() else []
        except KeyFileError as error:
            raise FailedPrecondition(str(error), reason="KEY_FILE_UNUSABLE") from error

    def _reference(self, dtype: Dtype) -> Reference:
        if dtype not in self._references:
            import torch  # seconds: only audits that reach the tokens pay them

            from countersign.verify.difr import load_reference

            # In this thread, because OpenMP counts threads for each thread that calls it.
            torch.set_num_threads(self._threads)
            self._references[dtype] = load_reference(self._model, dtype)
        return self._references[dtype]


async def create(context: Context) -> AuditorService:
    config = context.config.auditor
    key_file = context.config.data_dir / "keys" / "receipts.pub"
    return AuditorService(key_file, config.model, config.threads)


def _level(number: AuditLevel.ValueType) -> Level:
    level = _LEVELS.get(number)
    if level is None:
        known = ", ".join(AuditLevel.Name(known) for known in _LEVELS)
        raise InvalidArgument(f"there is no audit level {number}", reason="UNKNOWN_LEVEL", help=f"known are {known}")
    return level


def _response(report: AuditReport) -> AuditResponse:
    levels = [
        LevelResult(
            level=_LEVEL_NUMBERS[part.level],
            outcome=_OUTCOMES[part.outcome],
            summary=part.summary,
            figures=part.figures,
        )
        for part in report.levels
    ]
    return AuditResponse(verdict=_OUTCOMES[report.verdict], levels=levels)
