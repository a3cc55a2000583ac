"""The dashboard as Grafana reads it; what its expressions give, tests/integration/test_metrics.py asks Prometheus."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

INFRA = Path(__file__).resolve().parents[3] / "infra"
DASHBOARD: dict[str, Any] = json.loads((INFRA / "grafana" / "countersign.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
SHOWN = [panel for panel in PANELS if panel["type"] != "row"]
# Of Grafana's: those that are used here.
TYPES = {"stat", "timeseries", "heatmap"}
UNITS = {"short", "s", "percentunit", "reqps", "bytes", "Bps", "joule", "watt"}
BUILT_IN = {"__rate_interval"}


def test_panels_have_their_own_names_numbers_and_places() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    assert len({panel["title"] for panel in SHOWN}) == len(SHOWN)
    for panel in PANELS:
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24, panel["title"]
        assert place["y"] >= 0 < place["h"], panel["title"]
    for one, other in combinations(PANELS, 2):
        assert not overlap(one["gridPos"], other["gridPos"]), (one["title"], other["title"])


def overlap(one: dict[str, int], other: dict[str, int]) -> bool:
    return all(one[at] < other[at] + other[size] and other[at] < one[at] + one[size] for at, size in ("xw", "yh"))


def test_every_panel_asks_the_prometheus_that_is_chosen_above() -> None:
    [choice] = DASHBOARD["templating"]["list"]
    assert (choice["name"], choice["type"], choice["query"]) == ("datasource", "datasource", "prometheus")
    for panel in SHOWN:
        assert panel["targets"], panel["title"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        for source in (panel["datasource"], *(target["datasource"] for target in panel["targets"])):
            assert source == {"type": "prometheus", "uid": "${datasource}"}


def test_every_panel_says_what_it_shows_and_in_which_unit() -> None:
    for panel in SHOWN:
        assert panel["type"] in TYPES, panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]


def test_every_variable_is_one_of_the_dashboard_s_or_of_grafana_s() -> None:
    known = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD)))
    assert used == known | BUILT_IN


def test_what_names_a_line_is_a_label_that_the_line_has() -> None:
    for panel in SHOWN:
        for target in panel["targets"]:
            named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            kept = {label for group in re.findall(r"by \(([^)]*)\)", target["expr"]) for label in group.split(", ")}
            recorded = {"service"} if target["expr"] == "countersign:instances" else set()
            assert named <= kept | recorded, panel["title"]


def test_lines_of_one_panel_have_their_own_names() -> None:
    for panel in SHOWN:
        names = [target["legendFormat"] for target in panel["targets"]]
        assert all(names), panel["title"]
        assert len(set(names)) == len(names), panel["title"]


def test_alerts_are_marked_in_every_panel() -> None:
    [alerts] = DASHBOARD["annotations"]["list"]
    assert alerts["enable"]
    assert alerts["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


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
