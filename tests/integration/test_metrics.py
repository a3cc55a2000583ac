"""Debian's Prometheus beside a real stack: what operators would see after a load, by our dashboard and rules."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

import pytest
import yaml
from prometheus import INFRA, Prometheus, prometheus
from stacks import Running, running_stack

from countersign.client import Client, Tokens
from countersign.services.runtime.bus import Bus
from countersign.services.runtime.errors import InvalidArgument, NotFound
from countersign.services.runtime.registry import Registry
from countersign.v1.registry_pb2 import Instance

SECRET = "the heron kept its grey coat"
TENANT, REQUEST = "acme-tenant", "metered"
SERVICES = {"router", "tokenizer", "draft", "target", "kv", "auditor", "sidecar"}
LONG = "def merge_sort(items):\n    if len(items) <= 1:\n        return items\n" * 8
WAIT_S = 120.0
# Of the load; requests of one wave that have a receipt.
WAVES, RECEIPTS = 4, 7
# As Grafana computes it: four scrapes, of which the test has one a second.
RATE_INTERVAL = "5s"
# A busy machine may miss a scrape.
RECENT = "1m"
# Where a machine has no counters of energy, the panels say so, by NaN.
UNAVAILABLE = re.compile(r"countersign_energy_available\) == bool 2")


@dataclass(frozen=True, slots=True)
class Watched:
    """A stack after its load, who lives there, and the Prometheus that looked on."""

    instances: list[Instance]
    prometheus: Prometheus
    began: float
    grown: list[set[str]]  # all series of ours after each wave of the load

    @property
    def seconds(self) -> float:
        return time.time() - self.began


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder, began = tmp_path_factory.mktemp("metrics"), time.time()
    with running_stack(folder / "data", "auditor.share=1", "auditor.checkpoint_s=0.2") as stack:
        instances = asyncio.run(everybody(stack))
        router = next(each for each in instances if each.service == "router")
        with prometheus(folder / "prometheus", f"http://{router.metrics_address}/targets") as server:
            until(lambda: len(server.now("up == 1")) == len(SERVICES), "all are scraped")
            grown = []
            for wave in range(1, WAVES + 1):  # a rate needs what rises between two looks
                asyncio.run(load(stack, wave))
                audited = partial(verdicts, server, wave * RECEIPTS)
                until(audited, f"{wave * RECEIPTS} receipts are audited")
                until(partial(all_scraped, server, time.time()), "all were scraped since")
                grown.append(series(server))
            yield Watched(instances, server, began, grown)


def all_scraped(server: Prometheus, since: float) -> bool:
    """Whether each process has told how it is after this time."""
    found = [each for each in server.ask("targets")["activeTargets"] if each["health"] == "up"]
    told = [datetime.fromisoformat(each["lastScrape"]).timestamp() > since for each in found]
    return told == [True] * len(SERVICES)


def verdicts(server: Prometheus, most: int) -> bool:
    return total(server, "countersign_auditor_verdicts_total") >= most


async def everybody(stack: Running) -> list[Instance]:
    """Once all are in the registry."""
    async with await Bus.connect(stack.nats, "test") as bus, Registry(bus) as registry, asyncio.timeout(WAIT_S):
        while {each.service for each in registry.everybody()} < SERVICES:  # noqa: ASYNC110  it offers no event
            await asyncio.sleep(0.05)
        return registry.everybody()


async def load(stack: Running, wave: int) -> None:
    """Four answers; and who is cancelled, leaves, is late, or is refused."""
    async with Client(stack.router) as client:
        answers = [
            client.complete(SECRET, max_tokens=32, seed=1, temperature=0.7, ignore_eos=True, tenant=TENANT),
            client.complete(LONG, max_tokens=24, ignore_eos=True, request_id=f"{REQUEST}-{wave}"),
            client.complete(LONG, max_tokens=24, ignore_eos=True, drafting="off"),
            client.complete("def f(", max_tokens=16, ignore_eos=True),
        ]
        await asyncio.gather(*answers)
        name = f"cancelled-{wave}"
        async with contextlib.aclosing(
            client.generate("x = 1", max_tokens=900, ignore_eos=True, request_id=name)
        ) as events:
            async for event in events:
                if isinstance(event, Tokens):
                    await client.cancel(name)
        async with contextlib.aclosing(client.generate("y = 2", max_tokens=900, ignore_eos=True)) as events:
            async for event in events:
                if isinstance(event, Tokens):
                    break
        await client.complete("z = 3", max_tokens=1500, ignore_eos=True, timeout=0.05)
        with pytest.raises(NotFound):
            await client.complete("z = 3", model=f"{SECRET} {wave}")
        with pytest.raises(InvalidArgument):
            await client.complete("", max_tokens=3)


def until(so: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not so():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)  # Prometheus looks once a second, and offers no event


def total(server: Prometheus, name: str) -> float:
    return sum(value for _, value in server.now(name))


def dashboard() -> list[tuple[str, str]]:
    """Title and expression of all that the dashboard shows."""
    panels = json.loads((INFRA / "grafana" / "countersign.json").read_text())["panels"]
    return [(panel["title"], each["expr"]) for panel in panels for each in panel.get("targets", ())]


def rules(kind: str) -> list[tuple[str, str]]:
    """Name and expression of the rules that record, or alert."""
    groups = yaml.safe_load((INFRA / "prometheus" / "rules.yml").read_text())["groups"]
    return [(rule[kind], rule["expr"]) for group in groups for rule in group["rules"] if kind in rule]


def names(expression: str) -> set[str]:
    """The series that an expression reads."""
    return set(re.findall(r"\b(?:countersign|gen_ai|process)_\w+|\bcountersign:[\w:]+|\bup\b", bare(expression)))


def bare(expression: str) -> str:
    """Without labels and what they are grouped by."""
    return re.sub(r"\b(?:by|on|without) \([^)]*\)|\{[^}]*\}", " ", expression)


def test_each_process_is_found_through_the_router_and_named_by_service_instance_and_role(watched: Watched) -> None:
    up = [labels for labels, _ in watched.prometheus.now(f"max_over_time(up[{RECENT}]) == 1")]
    # An empty label is none to Prometheus.
    found = {(each["service"], each["instance"], each.get("role", "")) for each in up}
    roles = {"target": "mixed"}
    assert found == {(each.service, each.instance, roles.get(each.service, "")) for each in watched.instances}
    assert {each.service for each in watched.instances} == SERVICES


def test_prometheus_takes_every_sample_that_is_offered(watched: Watched) -> None:
    until(partial(all_scraped, watched.prometheus, time.time()), "all are scraped without an error")
    sent, kept = (total(watched.prometheus, f"scrape_samples_{kind}") for kind in ("scraped", "post_metric_relabeling"))
    assert sent == kept > 0


def has_data(watched: Watched, expression: str) -> bool:
    """A number, at some time since the stack started."""
    series = watched.prometheus.over(expression.replace("$__rate_interval", RATE_INTERVAL), watched.seconds)
    told = [value for values in series for value in values]
    return any(map(math.isfinite, told)) or bool(told and UNAVAILABLE.search(expression))


def test_every_panel_has_data_after_the_load(watched: Watched) -> None:
    shown = dashboard()
    assert len(shown) > 80
    assert [(title, expression) for title, expression in shown if not has_data(watched, expression)] == []


def test_every_recorded_figure_has_data_after_the_load(watched: Watched) -> None:
    energy = total(watched.prometheus, "countersign_energy_available") > 0
    recorded = {name: has_data(watched, name) for name, _ in rules("record")}
    assert recorded == dict.fromkeys(recorded, True) | {"countersign:joules_per_output_token": energy}


def test_every_alert_reads_series_that_exist_and_none_fires_over_a_sound_stack(watched: Watched) -> None:
    for name, expression in rules("alert"):
        watched.prometheus.now(expression)
        read = names(expression)
        assert read, name
        missing = [series for series in read if not has_data(watched, series)]
        assert not missing, name
    assert watched.prometheus.now('ALERTS{alertstate="firing"}') == []


def count(watched: Watched, name: str, **labels: str) -> float:
    selector = ",".join(f'{key}="{value}"' for key, value in labels.items())
    return sum(value for _, value in watched.prometheus.now(f"max_over_time({name}{{{selector}}}[{RECENT}])"))


def test_the_numbers_are_those_of_the_load(watched: Watched) -> None:
    reason = "countersign_finish_reason"
    ends = {
        labels[reason]: value
        for labels, value in watched.prometheus.now(
            f"sum by ({reason}) (max_over_time(countersign_requests_total[{RECENT}]))"
        )
    }
    assert ends == {"length": 4 * WAVES, "cancelled": WAVES, "left": WAVES, "deadline": WAVES, "refused": 2 * WAVES}
    duration = "gen_ai_server_request_duration_seconds_count"
    known = {"gen_ai_operation_name": "text_completion", "gen_ai_provider_name": "countersign"}
    assert count(watched, duration, **known) == 9 * WAVES
    assert count(watched, duration, **known, error_type="UNKNOWN_MODEL") == WAVES
    assert count(watched, duration, **known, error_type="EMPTY_PROMPT") == WAVES
    assert count(watched, duration, **known, error_type="DEADLINE_EXCEEDED") == WAVES
    assert count(watched, duration, **known, gen_ai_request_model="demo-target") == RECEIPTS * WAVES
    assert count(watched, "gen_ai_server_time_per_output_token_seconds_count", **known) >= 4 * WAVES
    assert count(watched, "countersign_receipts_made_total") == RECEIPTS * WAVES
    assert count(watched, "countersign_auditor_receipts_total", countersign_outcome="logged") == RECEIPTS * WAVES
    assert count(watched, "countersign_protocol_watched_total") == RECEIPTS * WAVES
    assert count(watched, "countersign_protocol_violations_total") == 0
    assert count(watched, "countersign_auditor_verdicts_total", countersign_outcome="fail") == 0
    accepted, proposed = (count(watched, f"countersign_draft_{kind}_total") for kind in ("accepted", "proposed"))
    assert 0 < accepted < proposed
    assert accepted == count(watched, "countersign_round_accepted_sum")
    assert count(watched, "countersign_prefix_found_total") > 0
    assert count(watched, "countersign_commit_duration_seconds_count") > count(watched, "countersign_rounds_total")
    asked = count(watched, "countersign_request_tokens_sum", gen_ai_token_type="output")
    assert asked >= WAVES * (32 + 24 + 24 + 16)


def test_exemplars_lead_from_a_latency_to_a_trace(watched: Watched) -> None:
    found = watched.prometheus.ask(
        "query_exemplars",
        query="gen_ai_server_request_duration_seconds_bucket",
        start=watched.began,
        end=time.time(),
    )
    labels = [exemplar["labels"] for series in found for exemplar in series["exemplars"]]
    assert labels
    for each in labels:
        assert each.keys() == {"trace_id", "span_id"}
        assert re.fullmatch("[0-9a-f]{32}", each["trace_id"])
        assert re.fullmatch("[0-9a-f]{16}", each["span_id"])
    assert len({each["trace_id"] for each in labels}) > 1


def test_no_label_holds_a_request_a_tenant_or_a_text_and_more_load_makes_no_more_series(watched: Watched) -> None:
    server = watched.prometheus
    values = {value for name in server.ask("labels") for value in server.ask(f"label/{name}/values")}
    for forbidden in (SECRET, TENANT, REQUEST, "cancelled-1", "heron"):
        assert not [value for value in values if forbidden in value]
    assert watched.grown[-1] == watched.grown[-2]


def series(server: Prometheus) -> set[str]:
    """Those of ours that are there now."""
    selector = '{__name__=~"(countersign|gen_ai)_.*"}'  # not what a rule makes of them
    found: list[dict[str, Any]] = server.ask("series", **{"match[]": selector, "start": time.time() - 30})
    return {json.dumps(each, sort_keys=True) for each in found}
