"""The dashboard as Grafana reads it; what its expressions give, tests/integration/test_metrics.py asks Prometheus."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

INFRA = Path(__file__).resolve().parents[3] / "infra"
DASHBOARD: dict[str, Any] = json.loads((INFRA / "grafana" / "countersign.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]


def test_panels_have_their_own_names_numbers_and_places() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    shown = [panel["title"] for panel in PANELS if panel["type"] != "row"]
    assert len(set(shown)) == len(shown)
    for panel in PANELS:
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24, panel["title"]
    for one, other in combinations(PANELS, 2):
        assert not overlap(one["gridPos"], other["gridPos"]), (one["title"], other["title"])


def overlap(one: dict[str, int], other: dict[str, int]) -> bool:
    return all(one[at] < other[at] + other[size] and other[at] < one[at] + one[size] for at, size in ("xw", "yh"))


def test_every_panel_asks_the_prometheus_that_is_chosen_above() -> None:
    [choice] = DASHBOARD["templating"]["list"]
    assert (choice["name"], choice["type"], choice["query"]) == ("datasource", "datasource", "prometheus")
    for panel in PANELS:
        if panel["type"] == "row":
            continue
        assert panel["targets"], panel["title"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        for source in (panel["datasource"], *(target["datasource"] for target in panel["targets"])):
            assert source == {"type": "prometheus", "uid": "${datasource}"}


def test_the_house_has_a_row_for_each_of_its_parts() -> None:
    rows = [panel["title"] for panel in PANELS if panel["type"] == "row"]
    assert rows == [
        "Now",
        "Latency",
        "Throughput",
        "Queue and passes",
        "Acceptance",
        "Cache",
        "Commits",
        "Audits",
        "Violations",
        "Energy",
        "Processes",
    ]


def test_latencies_show_their_exemplars() -> None:
    shown = {panel["title"] for panel in PANELS for target in panel.get("targets", ()) if target.get("exemplar")}
    assert {"Time to first token", "Time per output token", "Request"} <= shown
