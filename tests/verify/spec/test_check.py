"""The specifications hold, in small models, and every planted bug falls: ``countersign spec check --quick``."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from countersign.verify.spec import tlc
from countersign.verify.spec.check import Check, checks, judge, perform
from countersign.verify.spec.errors import SpecError
from countersign.verify.spec.manifest import Manifest, load, names
from countersign.verify.spec.story import tell

COMMAND = str(Path(sys.executable).parent / "countersign")


@pytest.fixture(scope="module")
def commit() -> Manifest:
    return load("commit")


def found(manifest: Manifest, kind: str, name: str) -> Check:
    return next(one for one in checks(manifest, quick=False) if (one.kind, one.name) == (kind, name))


@pytest.mark.timeout(900)
def test_everything_is_as_the_manifest_says() -> None:
    done = subprocess.run(
        [COMMAND, "spec", "check", "--quick", "--json"], capture_output=True, text=True, timeout=880, check=False
    )
    report = json.loads(done.stdout)
    assert [one for one in report["configs"] if not one["ok"]] == []
    assert [one for one in report["mutants"] if not one["killed"]] == []
    assert report["ok"]
    assert done.returncode == 0
    assert len({one["name"] for one in report["mutants"]}) >= 14 + 30
    assert all(one["states"] for one in report["configs"])


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_everything_is_as_the_manifest_says_in_large_models() -> None:
    results = perform([one for name in names() for one in checks(load(name), quick=False)])
    assert [(one.check.name, one.why) for one in results if not one.ok] == []
    assert sum(one.states for one in results if one.check.kind == "configuration") >= 10_000_000


def test_a_mutant_that_lives_is_reported(commit: Manifest) -> None:
    mutant = replace(commit.mutants[0], replace={})
    manifest = replace(commit, mutants=(mutant,))
    result = judge(found(manifest, "mutant", mutant.name))
    assert not result.ok
    assert "should be violated, and is not" in result.why


def test_a_specification_that_breaks_is_told_as_a_story(commit: Manifest) -> None:
    broken = next(one for one in commit.mutants if one.name == "no_fencing")
    outcome = tlc.check(broken.module, broken.base.cfg.text(("Fenced",), broken.replace))
    assert (outcome.code, outcome.violated) == (tlc.INVARIANT, "Fenced")
    story = tell(outcome.trace)
    assert story.startswith("  0. in the beginning")
    assert "Extends\n" in story
    assert 'log.r1[1] = [k |-> "Opened"]' in story


def test_more_states_than_are_written_is_a_failure(commit: Manifest) -> None:
    small = replace(commit.configurations[0], states=1)
    result = judge(found(replace(commit, configurations=(small,)), "configuration", small.name))
    assert "distinct states, and 1 are written" in result.why


def test_a_specification_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "Bad.tla").write_text("---- MODULE Bad ----\nEXTENDS Nothing\n====\n")
    with pytest.raises(SpecError, match=r"Bad\.tla"):
        tlc.check(tmp_path / "Bad.tla", "SPECIFICATION Spec\n")


def test_liveness_falls_where_fairness_is_all_there_is(commit: Manifest) -> None:
    rescue = next(one for one in commit.mutants if one.name == "never_rescued")
    outcome = tlc.check(rescue.module, rescue.base.cfg.text(("EventuallyClosed",), rescue.replace))
    assert outcome.code == tlc.PROPERTY
    assert tell(outcome.trace).endswith(tlc.AGAIN)


@pytest.mark.parametrize(("option", "help_"), [("--spec", "There are: cache, commit"), ("--only", "Leave --only out")])
def test_what_there_is_not_is_said_not_to_be_there(option: str, help_: str) -> None:
    done = subprocess.run(
        [COMMAND, "spec", "check", option, "x"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert help_ in done.stderr


def test_one_specification_can_be_checked_alone() -> None:
    done = subprocess.run(
        [COMMAND, "spec", "check", "--spec", "cache", "--only", "speculation", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert [(one["kind"], one["ok"]) for one in json.loads(done.stdout)["configs"]] == [
        ("configuration", True),
        ("witness", True),
    ]
