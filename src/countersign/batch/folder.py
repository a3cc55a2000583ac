"""Where a batch's results go, and what is there already: it can go on from whatever moment a process died at.

``output.jsonl``: a line an answer, in the order in which they ended. ``errors.jsonl``: of the last
run, since every line without an answer is tried again. ``receipts/NUMBER.receipt``: written before the line
that names it. ``batch.json``: which input this is of, and the salt of its seeds. ``lock``: held by who writes.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from countersign.batch.lines import finished_ids
from countersign.files import write_atomically
from countersign.services.runtime.errors import DataLoss, FailedPrecondition, InvalidArgument

OUTPUT, ERRORS, RECEIPTS, MANIFEST, LOCK = "output.jsonl", "errors.jsonl", "receipts", "batch.json", "lock"


class BatchFolder:
    """``done``: the custom_ids that have an answer. ``salt``: the same at every run.

    Raises:
        FailedPrecondition: BATCH_RUNS, another process writes here; OTHER_INPUT, the folder belongs to another file.
        DataLoss: BAD_OUTPUT, its output is not what a batch writes.
        InvalidArgument: UNWRITABLE_FOLDER.
    """

    def __init__(self, folder: Path, input_sha256: str) -> None:
        self._folder = folder
        with self._written():
            (folder / RECEIPTS).mkdir(parents=True, exist_ok=True)
            self._lock = (folder / LOCK).open("w")
        try:
            self._take_lock()
            with self._written():
                self.salt = self._manifest(input_sha256)
                self.done = self._recover()
                self._output: IO[bytes] = (folder / OUTPUT).open("ab")
                self._errors: IO[bytes] = (folder / ERRORS).open("wb")
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._output, self._errors, self._lock):
            file.close()

    @property
    def output(self) -> Path:
        return self._folder / OUTPUT

    @property
    def errors(self) -> Path:
        return self._folder / ERRORS

    def keep_receipt(self, number: int, receipt: bytes) -> str:
        """Its name, relative to the folder."""
        name = f"{RECEIPTS}/{number:06}.receipt"
        with self._written():
            write_atomically(self._folder / name, receipt)
        return name

    def answer(self, custom_id: str, line: str) -> None:
        """It stands when this returns."""
        with self._written():
            _append(self._output, line)
        self.done.add(custom_id)

    def refuse(self, line: str) -> None:
        """An error of this run."""
        with self._written():
            _append(self._errors, line)

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FailedPrecondition(
                f"another process writes to {self._folder}",
                reason="BATCH_RUNS",
                help="wait for it, or choose another --output",
            ) from None

    def _manifest(self, input_sha256: str) -> str:
        file = self._folder / MANIFEST
        if not file.exists():
            known = {"input_sha256": input_sha256, "salt": secrets.token_hex(16)}
            write_atomically(file, json.dumps(known).encode() + b"\n")
        try:
            known = json.loads(file.read_bytes())
            before, salt = str(known["input_sha256"]), str(known["salt"])
        except (ValueError, KeyError, TypeError):
            raise self._bad(file) from None
        if before != input_sha256:
            raise FailedPrecondition(
                f"{self._folder} holds the results of another input file, or the file was changed",
                reason="OTHER_INPUT",
                help="choose another --output",
            )
        return salt

    def _recover(self) -> set[str]:
        """A line that was being written when the process died has no end: it is cut off, and asked again."""
        file = self._folder / OUTPUT
        with suppress(FileNotFoundError):
            content = file.read_bytes()
            whole = content.rfind(b"\n") + 1
            os.truncate(file, whole)
            try:
                return set(finished_ids(content[:whole]))
            except (ValueError, KeyError, TypeError):
                raise self._bad(file) from None
        return set()

    def _bad(self, file: Path) -> DataLoss:
        return DataLoss(f"{file} is not what a batch writes", reason="BAD_OUTPUT", help="choose another --output")

    @contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InvalidArgument(
                f"{self._folder} cannot be written: {error.strerror or error}",
                reason="UNWRITABLE_FOLDER",
                help="choose another --output",
            ) from None


def _append(file: IO[bytes], line: str) -> None:
    file.write(line.encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())
