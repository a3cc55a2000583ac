"""What a running stack leaves in its data folder for others to find: a lock, and stack.json once all is healthy."""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

import msgspec

from countersign.files import write_atomically
from countersign.services.runtime.errors import DataLoss, FailedPrecondition, Unavailable


@dataclass(frozen=True, slots=True)
class Stack:
    """The content of stack.json. ``started`` is Unix time in milliseconds."""

    router: str
    nats: str
    pid: int
    started: int


def stack_file(data_dir: Path) -> Path:
    return data_dir / "stack.json"


def write_stack(data_dir: Path, stack: Stack) -> None:
    """Atomically: a reader sees the old file, the new one or none."""
    write_atomically(stack_file(data_dir), msgspec.json.encode(stack))


def read_stack(data_dir: Path) -> Stack:
    """The stack that runs on this data folder.

    Raises:
        Unavailable: reason NO_STACK, when none does (or it is not healthy yet).
        DataLoss: the file is not what a stack writes.
    """
    none = Unavailable(f"no stack runs on {data_dir}", reason="NO_STACK", help="start one: countersign up")
    try:
        stack = msgspec.json.decode(stack_file(data_dir).read_bytes(), type=Stack)
    except (FileNotFoundError, NotADirectoryError):
        raise none from None
    except msgspec.DecodeError as error:
        raise DataLoss(f"{stack_file(data_dir)}: {error}", help="delete it and start again: countersign up") from None
    if not _lives(stack.pid):
        raise none
    return stack


def _lives(pid: int) -> bool:
    if pid <= 0:  # to kill(), these mean groups of processes
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it lives, under another user
        return True
    return True


class DataFolderLock:
    """Held by one stack at a time. The kernel releases it with the process, so that no stale lock can be left."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._file: int | None = None

    def acquire(self) -> None:
        """Take it or fail at once; makes the folder if need be.

        Raises:
            FailedPrecondition: reason DATA_FOLDER_IN_USE (metadata ``pid``) or DATA_FOLDER_UNUSABLE.
        """
        try:
            # For its owner only: the streams hold prompts and answers, the configuration may hold a password.
            self._data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            file = os.open(self._data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise FailedPrecondition(
                f"data folder {self._data_dir} cannot be used: {error.strerror}",
                reason="DATA_FOLDER_UNUSABLE",
                help="choose another with --data-dir",
            ) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(file, 20, 0).decode(errors="replace").strip()
            os.close(file)
            raise FailedPrecondition(
                f"data folder {self._data_dir} is in use by the stack of process {pid or 'unknown'}",
                reason="DATA_FOLDER_IN_USE",
                help="stop that one or choose another folder with --data-dir",
                pid=pid,
            ) from None
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
        self._file = file

    def release(self) -> None:
        # The file stays: to delete it would let two processes lock two files of one name.
        if self._file is not None:
            os.close(self._file)
            self._file = None
