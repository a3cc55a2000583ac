"""A batch's folder after any end: what stands, stands once, and the rest is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from countersign.batch.folder import BatchFolder
from countersign.services.runtime.errors import DataLoss, FailedPrecondition, InvalidArgument


def entry(custom_id: str) -> str:
    return json.dumps({"custom_id": custom_id, "response": {"text": "a" * 50}})


def test_what_was_written_is_known_to_the_next_run_and_errors_are_tried_again(tmp_path: Path) -> None:
    with BatchFolder(tmp_path / "out", "digest") as folder:
        salt = folder.salt
        assert folder.keep_receipt(7, b"signed") == "receipts/000007.receipt"
        folder.answer("a", entry("a"))
        folder.refuse(entry("b"))
    with BatchFolder(tmp_path / "out", "digest") as folder:
        assert (folder.done, folder.salt) == ({"a"}, salt)
        assert folder.errors.read_bytes() == b""
        folder.answer("b", entry("b"))
    assert [json.loads(line)["custom_id"] for line in folder.output.read_text().splitlines()] == ["a", "b"]
    assert (tmp_path / "out" / "receipts" / "000007.receipt").read_bytes() == b"signed"


@given(cut=st.integers(0, 400))
def test_a_line_that_was_being_written_is_missing_and_those_before_it_are_not(
    cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("folder")
    with BatchFolder(out, "digest") as folder:
        for custom_id in "abc":
            folder.answer(custom_id, entry(custom_id))
    whole = folder.output.read_bytes()
    folder.output.write_bytes(whole[:cut])
    with BatchFolder(out, "digest") as folder:
        left = whole[:cut].count(b"\n")
        assert folder.done == set("abc"[:left])
        for custom_id in "abc"[left:]:
            folder.answer(custom_id, entry(custom_id))
    assert folder.output.read_bytes() == whole


def test_a_second_process_another_input_and_a_file_that_is_not_ours_are_refused(tmp_path: Path) -> None:
    with BatchFolder(tmp_path, "digest"), pytest.raises(FailedPrecondition, match="another process") as refused:
        BatchFolder(tmp_path, "digest")
    assert refused.value.reason == "BATCH_RUNS"
    with pytest.raises(FailedPrecondition) as refused:
        BatchFolder(tmp_path, "other")
    assert refused.value.reason == "OTHER_INPUT"
    (tmp_path / "output.jsonl").write_bytes(b"precious\n")
    with pytest.raises(DataLoss, match="not what a batch writes"):
        BatchFolder(tmp_path, "digest")
    assert (tmp_path / "output.jsonl").read_bytes() == b"precious\n"
    (tmp_path / "batch.json").write_text("[]")
    with pytest.raises(DataLoss):
        BatchFolder(tmp_path, "digest")
    (tmp_path / "file").touch()
    with pytest.raises(InvalidArgument) as unwritable:
        BatchFolder(tmp_path / "file", "digest")
    assert unwritable.value.reason == "UNWRITABLE_FOLDER"
