"""``countersign status``: what its lines and its object say of services that are well, and of those that are not."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from countersign.cli.status import Seen, facts, models, report
from countersign.v1.auditor_pb2 import GetLogResponse
from countersign.v1.registry_pb2 import Instance, TargetRole
from countersign.v1.router_pb2 import ModelInfo
from countersign.v1.sidecar_pb2 import StatusResponse

NOW = 1_800_000_000_000
MODEL = ModelInfo(name="demo", weights_sha256=b"\x01" * 32, dtype="fp32", context_length=2048, cache_tokens=65536)


def instance(service: str, number: int = 1, **fields: object) -> Instance:
    about = {"address": f"127.0.0.1:{number}", "version": "0.1.0", "started_unix_ms": NOW - 60_000, **fields}
    return Instance(service=service, instance=f"{service}-{number}", **about)  # type: ignore[arg-type]  # by name


INSTANCES = [
    instance("kv", metrics_address="127.0.0.1:9000"),
    instance("router", active_requests=2),
    instance("target", 1, model=MODEL, role=TargetRole.TARGET_ROLE_DECODE, pending_prompt_tokens=300),
    instance("target", 2, model=MODEL, draining=True),
    instance("tokenizer"),
]
WELL = Seen("nats://h:1", "2.11.0", 0.001, INSTANCES, [True] * 5, GetLogResponse(size=3), StatusResponse(), NOW)


def printed(seen: Seen, width: int = 160) -> str:
    out = io.StringIO()
    report(Console(file=out, force_terminal=True, color_system=None, width=width), seen)
    return out.getvalue()


def test_each_instance_has_a_line_with_its_health_load_role_and_addresses() -> None:
    lines = printed(WELL).splitlines()
    assert lines[3].split() == (
        "target target-1 serving decode 300 prompt tokens 1 m 00 s 0.1.0 127.0.0.1:1".split()  # noqa: SIM905  as it reads
    )
    assert "draining" in lines[4]
    assert lines[1].endswith("127.0.0.1:9000")
    assert "2 requests" in lines[2]
    assert "model     demo: fp32, context 2048, 2 targets" in printed(WELL)
    assert "01" * 32 in printed(WELL)


def test_all_is_well_only_if_all_answer_nothing_is_missing_and_the_protocol_was_kept() -> None:
    silent = replace(WELL, serving=[True, True, True, False, True])
    gone = replace(WELL, instances=INSTANCES[:2], serving=[True, True])
    deaf = replace(WELL, serving=[True, False, True, True, True])
    broken = replace(WELL, watched=StatusResponse(violation_count=1))
    assert [each.well for each in (WELL, silent, gone, deaf, broken)] == [True, False, False, False, False]
    assert (gone.missing, deaf.missing) == (["tokenizer", "target"], ["router"])
    assert "target-2 does not answer at 127.0.0.1:2" in printed(silent)
    assert "there is no router that serves" in printed(deaf)
    assert "countersign spec status" in printed(broken)
    assert "does not answer" not in printed(WELL)


def test_two_models_of_one_name_and_other_weights_are_two() -> None:
    other = ModelInfo(name="demo", weights_sha256=b"\x02" * 32)
    found = models([*INSTANCES, instance("target", 3, model=other)])
    assert [(model.weights_sha256[:1], count) for model, count in found] == [(b"\x01", 2), (b"\x02", 1)]


def test_the_object_holds_all_that_the_lines_do() -> None:
    found = facts(replace(WELL, serving=[True, True, True, True, False], log=None))
    assert (found["well"], found["missing"], found["log"]) == (False, ["tokenizer"], None)
    assert [each["health"] for each in found["instances"]] == ["serving", "serving", "serving", "draining", "silent"]
    assert found["instances"][2]["role"] == "decode"
    assert found["models"][0]["weights_sha256"] == "01" * 32
    assert found["models"][0]["targets"] == 2


def test_a_hostile_name_is_harmless_at_any_width() -> None:
    evil = instance("kv", version="\x1b[2J\n")
    evil.instance = "kv-\x9b2J\u202e"
    for width in (30, 60, 160):
        text = printed(replace(WELL, instances=[evil], serving=[False]), width)
        assert all(line.isprintable() for line in text.splitlines())
