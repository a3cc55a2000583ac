"""The lock on a data folder, and stack.json."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from countersign.services.runtime.errors import DataLoss, FailedPrecondition, Unavailable
from countersign.services.runtime.stack import DataFolderLock, Stack, read_stack, stack_file, write_stack


def dead_pid() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
        return process.pid


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    stack = Stack(router="127.0.0.1:7411", nats="nats://127.0.0.1:4222", pid=os.getpid(), started=1)
    write_stack(tmp_path, stack)
    assert read_stack(tmp_path) == stack
    assert [path.name for path in tmp_path.iterdir()] == ["stack.json"]


@pytest.mark.parametrize("pid", [0, -1, -(2**31)])
def test_an_impossible_process_id_is_no_stack(tmp_path: Path, pid: int) -> None:
    write_stack(tmp_path, Stack("r", "n", pid=pid, started=1))
    with pytest.raises(Unavailable):
        read_stack(tmp_path)


def test_a_dead_stack_is_no_stack(tmp_path: Path) -> None:
    write_stack(tmp_path, Stack("r", "n", pid=dead_pid(), started=1))
    with pytest.raises(Unavailable, match="countersign up") as caught:
        read_stack(tmp_path)
    assert caught.value.reason == "NO_STACK"


def test_a_folder_without_a_stack_says_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="countersign up"):
        read_stack(tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["", "{", "[]", json.dumps({"router": 1}), json.dumps({"pid": 2**70})])
def test_a_damaged_stack_file_is_a_typed_error(tmp_path: Path, content: str) -> None:
    stack_file(tmp_path).write_text(content)
    with pytest.raises(DataLoss, match=r"stack\.json"):
        read_stack(tmp_path)


def test_the_second_lock_on_a_folder_is_refused_with_the_pid_of_the_first(tmp_path: Path) -> None:
    first, second = DataFolderLock(tmp_path), DataFolderLock(tmp_path)
    first.acquire()
    with pytest.raises(FailedPrecondition, match=str(os.getpid())) as caught:
        second.acquire()
    assert caught.value.reason == "DATA_FOLDER_IN_USE"
    first.release()
    second.acquire()
    second.release()


def test_the_pid_in_the_lock_is_the_last_holders_alone(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("99999999999999999\n")
    lock = DataFolderLock(tmp_path)
    lock.acquire()
    assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
    lock.release()


def test_a_data_folder_that_is_a_file_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FailedPrecondition, match="--data-dir"):
        DataFolderLock(tmp_path / "file").acquire()


def test_a_new_data_folder_is_for_its_owner_only(tmp_path: Path) -> None:
    lock = DataFolderLock(tmp_path / "new")
    lock.acquire()
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    lock.release()
