"""The alerts as Prometheus reads them: each fires in a case of rules_test.yml and is silent in another, and operators
are told what to do. What their expressions read, tests/integration/test_metrics.py asks a real stack.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus import INFRA, promtool

FOLDER = INFRA / "prometheus"
OPERATIONS = INFRA.parent / "docs" / "operations.md"


def alerts(rules: str) -> dict[str, dict[str, Any]]:
    """By name."""
    found = [rule for group in yaml.safe_load(rules)["groups"] for rule in group["rules"] if "alert" in rule]
    assert len({rule["alert"] for rule in found}) == len(found)
    return {rule["alert"]: rule for rule in found}


SOUND = "a sound stack is silent"


def cases(tests: str) -> tuple[set[str], set[str], set[str]]:
    """The alerts that fire in some case, that are silent in a case made for them, and that are over a sound stack."""
    fires, silent, sound = set[str](), set[str](), set[str]()
    for test in yaml.safe_load(tests)["tests"]:
        for case in test["alert_rule_test"]:
            kept = fires if case["exp_alerts"] else sound if test["name"] == SOUND else silent
            kept.add(case["alertname"])
    return fires, silent, sound


RULES, TESTS = ((FOLDER / name).read_text() for name in ("rules.yml", "rules_test.yml"))
ALERTS = alerts(RULES)


@pytest.mark.parametrize(
    "arguments",
    [("check", "rules", "rules.yml"), ("check", "config", "prometheus.yml"), ("test", "rules", "rules_test.yml")],
    ids=" ".join,
)
def test_promtool_takes_the_rules_and_the_configuration_and_sees_each_alert_as_its_cases_say(
    arguments: tuple[str, str, str],
) -> None:
    what, kind, name = arguments
    code, said = promtool(what, kind, FOLDER / name)
    assert code == 0, said


def test_each_alert_has_a_case_in_which_it_fires_one_beside_it_and_is_silent_over_a_sound_stack() -> None:
    assert cases(TESTS) == (set(ALERTS),) * 3


def test_promtool_notices_an_alert_that_can_no_longer_fire(tmp_path: Path) -> None:
    (tmp_path / "rules_test.yml").write_text(TESTS)
    broken = re.sub(r"(\))( > 0\.5\n +for: 5m)", r"\1 * 0\2", RULES)
    assert broken != RULES
    (tmp_path / "rules.yml").write_text(broken)
    code, said = promtool("test", "rules", tmp_path / "rules_test.yml")
    assert code != 0
    assert set(re.findall("alertname: (\\w+)", said)) == {"CountersignDraftFails"}


def test_each_alert_says_how_bad_it_is_and_what_is_wrong() -> None:
    for name, rule in ALERTS.items():
        assert rule["labels"].keys() == {"severity"}, name
        assert rule["labels"]["severity"] in {"warning", "critical"}, name
        assert rule["annotations"]["summary"], name


def test_operators_are_told_what_to_do_about_each_alert() -> None:
    told = re.findall(r"^\| `(Countersign\w+)` \| ([^|]+) \| ([^|]+) \|$", OPERATIONS.read_text(), re.MULTILINE)
    assert [name for name, _, _ in told] == list(ALERTS)
    assert {name: severity for name, severity, _ in told} == {
        name: rule["labels"]["severity"] for name, rule in ALERTS.items()
    }
