"""What is written of a specification is refused where it could hide that nothing is checked."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from countersign.verify.spec.errors import SpecError
from countersign.verify.spec.manifest import load, names, read_cfg, specifications


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(specifications() / "commit", tmp_path / "commit"))


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


PROPERTIES = {
    "commit": {
        "Agreement",
        "ExactlyOnce",
        "Fenced",
        "OnlyVerified",
        "ClosedIsFinal",
        "OneReceipt",
        "BilledIsCommitted",
        "AppendOnly",
        "EventuallyClosed",
        "Delivered",
    },
    "cache": {
        "NoTornRead",
        "PrefixClosed",
        "PinnedStays",
        "NoSpeculativeSealed",
        "OneWriter",
        "BytesConserved",
        "TenantsApart",
        "IndexSound",
        "RefExact",
        "TransferAtomic",
        "RollbackComplete",
        "GenMonotone",
        "NobodyBlocked",
        "Reclaimed",
        "MovesEnd",
        "TransfersEnd",
    },
}
"""Those that must fall to a mutant: DESIGN.md sections 4 and 7, and what the specifications add."""


@pytest.mark.parametrize("name", names())
def test_the_committed_one_is_whole(name: str) -> None:
    manifest = load(name)
    assert len(manifest.mutants) >= 14
    assert {name for mutant in manifest.mutants for name in mutant.killers} >= PROPERTIES[name]
    assert set(manifest.unkilled) == {"TypeOK"}


def test_a_property_cannot_be_commented_out(folder: Path) -> None:
    edit(folder / "MCwriters.cfg", "  Fenced\n", "  \\* Fenced\n")
    with pytest.raises(SpecError, match=r"MCwriters\.cfg line \d+: a comment"):
        load(folder)


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ('witnesses = ["NeverTakenOver", "NeverCancelledMidway", "NeverOrphaned"]', "witnesses = []", "no witness"),
        ('fair = ["NeverFair"]', "", "no fair witness"),
        ('killers = ["AppendOnly"]', "killers = []", "names no property"),
        ('killers = ["AppendOnly"]', 'killers = ["Fenced"]', r"can fall: \['AppendOnly'\]"),
        ('killers = ["Fenced"]', 'killers = ["Delivered"]', "are not checked in writers"),
        ('base = "writers"', 'base = "nowhere"', "KeyError 'nowhere'"),
        ("[unkilled]", "[unkilled", "TOMLDecodeError"),
    ],
)
def test_a_manifest_that_lacks_something_is_refused(folder: Path, old: str, new: str, why: str) -> None:
    edit(folder / "manifest.toml", old, new)
    with pytest.raises(SpecError, match=why):
        load(folder)


def test_a_line_that_belongs_to_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.cfg").write_text("INVARIANCE\n  Fenced\n")
    with pytest.raises(SpecError, match=r"x\.cfg line 1: INVARIANCE is no keyword"):
        read_cfg(tmp_path / "x.cfg")
