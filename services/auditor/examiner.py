"""Runs audits, one at a time, in a thread that stands back for everything else on the machine."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from countersign.services.auditor.case import Disclosed
from countersign.services.runtime.errors import FailedPrecondition
from countersign.verify.audit import AuditReport, Dtype, Level, audit
from countersign.verify.errors import KeyFileError
from countersign.verify.keys import load_public
from countersign.verify.trust import TrustPolicy

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    from countersign.verify.difr import Reference

NICENESS = 19
_THREAD = "audit"


class Examiner:
    """Holds the reference weights, which are loaded at the first audit that reaches the tokens.

    ``key_file`` is read at each audit, so that the auditor may start before the target has written it; without it the
    form level is inconclusive. ``arithmetics``: as in ``TrustPolicy``.
    """

    def __init__(self, key_file: Path, model: Path, threads: int, arithmetics: Sequence[str] = ()) -> None:
        self._key_file = key_file
        self._model = model
        self._threads = threads
        self._arithmetics = tuple(arithmetics)
        self._references: dict[Dtype, Reference] = {}
        self.active = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=_THREAD, initializer=_stand_back)

    async def audit(self, case: Disclosed, levels: Collection[Level] = ()) -> AuditReport:
        """Audits a receipt, behind those that wait already.

        Raises:
            FailedPrecondition: reason KEY_FILE_UNUSABLE.
        """
        self.active += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._audit, case, levels)
        finally:
            self.active -= 1

    def trusted_keys(self) -> list[Ed25519PublicKey]:
        """The keys of receipts that count; none while there is no key file.

        Raises:
            FailedPrecondition: reason KEY_FILE_UNUSABLE.
        """
        try:
            return [load_public(self._key_file)] if self._key_file.exists() else []
        except KeyFileError as error:
            raise FailedPrecondition(str(error), reason="KEY_FILE_UNUSABLE") from error

    def close(self) -> None:
        """Takes no more. Who ends the process need not wait for the audit in hand: ``leave``."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _audit(self, case: Disclosed, levels: Collection[Level]) -> AuditReport:
        challenge = None
        if case.positions:
            from countersign.verify.activations import Challenge  # torch takes seconds to import

            challenge = Challenge(case.positions, case.answer)
        return audit(
            case.receipt,
            policy=TrustPolicy(tuple(self.trusted_keys()), arithmetics=self._arithmetics),
            reference=self._reference,
            levels=levels,
            challenge=challenge,
        )

    def _reference(self, dtype: Dtype) -> Reference:
        if dtype not in self._references:
            import torch  # seconds: only audits that reach the tokens pay them

            from countersign.verify.difr import load_reference

            # In this thread, because OpenMP counts threads for each thread that calls it.
            torch.set_num_threads(self._threads)
            self._references[dtype] = load_reference(self._model, dtype)
        return self._references[dtype]


def leave(code: int) -> NoReturn:
    """Ends the process, all being closed. Python would wait for an audit in hand; the ledger keeps it for next time."""
    if any(thread.name.startswith(_THREAD) for thread in threading.enumerate()):
        logging.shutdown()
        os._exit(code)
    sys.exit(code)


def _stand_back() -> None:
    """On Linux a thread has a priority of its own, and the threads that it starts inherit it."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
