"""What a deployment can choose: one frozen tree, read from a file, the environment and flags, later ones winning.

    defaults  <  TOML file  <  COUNTERSIGN_TARGET__DTYPE=bf16  <  --set target.dtype=bf16

The bounds are part of the types. An unknown key is refused with the nearest right one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from countersign.services.runtime.layers import ConfigError, Layer, environment_layer, file_layer, flag_layer, merge

__all__ = [
    "FREE_PORTS",
    "AuditorConfig",
    "Config",
    "ConfigError",
    "DraftConfig",
    "KvConfig",
    "NatsConfig",
    "RouterConfig",
    "SidecarConfig",
    "TargetConfig",
    "TelemetryConfig",
    "TokenizerConfig",
    "dump",
    "load",
]

_SERVER = r"(nats|tls|ws|wss)://[^\s,]+"

# Each description completes "must be ...".
Port = Annotated[int, msgspec.Meta(ge=0, le=65535, description="a port, 0 to 65535")]
Amount = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1, description="an integer, 0 or more")]
Count = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1, description="an integer, 1 or more")]
RankUnit = Annotated[int, msgspec.Meta(ge=0, le=1 << 24, description="0, or 64 times a power of two")]
LookupSize = Annotated[int, msgspec.Meta(ge=0, le=16, description="an integer from 0 to 16")]
DraftTokens = Annotated[int, msgspec.Meta(ge=1, le=64, description="an integer from 1 to 64")]
Replicas = Annotated[int, msgspec.Meta(ge=1, le=5, description="an integer from 1 to 5")]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=1e9, description="a number of seconds, more than 0, at most 1e9")]
Milliseconds = Annotated[int, msgspec.Meta(ge=1, le=2**32 - 1, description="milliseconds, from 1 to 4294967295")]
Switch = Annotated[bool, msgspec.Meta(description="true or false")]
Text = Annotated[str, msgspec.Meta(description="text")]
Folder = Annotated[Path, msgspec.Meta(description="a folder")]
Dtype = Annotated[Literal["fp32", "bf16"], msgspec.Meta(description="fp32 or bf16")]
DraftDtype = Annotated[Literal["fp32", "bf16", "int8"], msgspec.Meta(description="fp32, bf16 or int8")]
Numerics = Annotated[Literal["invariant", "fast"], msgspec.Meta(description="invariant or fast")]
Role = Annotated[Literal["mixed", "prefill", "decode"], msgspec.Meta(description="mixed, prefill or decode")]
Reuse = Annotated[Literal["off", "pie", "blend"], msgspec.Meta(description="off, pie or blend")]
Leaves = Annotated[int, msgspec.Meta(ge=0, le=4096, description="an integer from 0 to 4096")]
Share = Annotated[float, msgspec.Meta(gt=0, le=1, description="a number above 0, at most 1")]
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1, description="a number from 0 to 1")]
Number = Annotated[float, msgspec.Meta(ge=0, le=1e9, description="a number, 0 or more")]
Size = Annotated[int, msgspec.Meta(ge=0, le=2**48, description="a number of bytes, 0 or more")]
Fault = Annotated[
    Literal[
        "none",
        "int4",
        "int8",
        "fp8-kv",
        "temperature-1.1",
        "temperature-1.05",
        "top-p-0.9",
        "seed",
        "bug-1",
        "draft-all",
        "draft-10",
        "draft-1",
        "skip-layer",
        "truncated",
        "evicted",
        "checkpoint",
        "repair",
        "inflate-10",
        "inflate-50",
        "inflate-300",
    ],
    msgspec.Meta(description="none, or a way to cheat of services/target/faults.py"),
]
FingerprintSize = Annotated[int, msgspec.Meta(ge=0, le=128, description="0, or a number from 2 to 128")]
KvWire = Annotated[Literal["exact", "fp8", "int8"], msgspec.Meta(description="exact, fp8 or int8")]
OtlpProtocol = Annotated[Literal["grpc", "http"], msgspec.Meta(description="grpc or http")]
LogFormat = Annotated[Literal["auto", "human", "json"], msgspec.Meta(description="auto, human or json")]
LogLevel = Annotated[
    Literal["debug", "info", "warning", "error"], msgspec.Meta(description="debug, info, warning or error")
]
Eviction = Annotated[Literal["cost", "lru"], msgspec.Meta(description="cost or lru")]
Listen = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9_.-]+):[0-9]{1,5}$",
        description="host:port such as 127.0.0.1:7411 or [::1]:7411, port 0 for a free one",
    ),
]
NatsUrl = Annotated[
    str,
    msgspec.Meta(
        pattern=rf"^$|^{_SERVER}(,{_SERVER})*$",
        description="nats://host:port, more of them after commas, or empty for a server of our own",
    ),
]

Markers = Annotated[
    str, msgspec.Meta(pattern=r"^$|^\S+ \S+$", description="two tokens with a space between, or empty for none")
]

_LOCAL = "127.0.0.1:0"
# Settings of a stack that shall be in nobody's way.
FREE_PORTS = (f"router.listen={_LOCAL}", f"router.metrics_listen={_LOCAL}")
_DEMO_TARGET = Path("infra/models/demo-target")
_DEMO_DRAFT = Path("infra/models/demo-draft")


@dataclass(frozen=True, slots=True)
class NatsConfig:
    """The message bus and its streams."""

    url: NatsUrl = ""  # empty: a server of our own on `port`
    port: Port = 0  # 0: a free one
    replicas: Replicas = 1
    commit_retention_s: Seconds = 86_400.0  # how long a request's log is kept


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """The front door."""

    listen: Listen = "127.0.0.1:7411"
    max_requests: Count = 256  # at once; more are refused
    default_timeout_ms: Milliseconds = 120_000
    max_timeout_ms: Milliseconds = 3_600_000
    split_prompt_tokens: Amount = 512  # from so many on prompts go to targets of role prefill, if there are; 0: never
    split_timeout_ms: Milliseconds = 30_000  # then whoever answers computes what is missing
    full_prompt_tokens: Count = 8192  # that wait at one target: others get the next prompt
    full_requests: Count = 64  # at one target: mixed ones get the next request
    open_hidden: Leaves = 16  # hidden tokens of an answer that a draw opens, at most a quarter of them; 0: none
    metrics_listen: Listen = "127.0.0.1:9464"  # /metrics of the router, and /targets: where all others serve theirs


@dataclass(frozen=True, slots=True)
class TokenizerConfig:
    """Text to tokens and back."""

    listen: Listen = _LOCAL
    model: Folder = _DEMO_TARGET  # folder with tokenizer.json


@dataclass(frozen=True, slots=True)
class DraftConfig:
    """The small model that proposes."""

    listen: Listen = _LOCAL
    enabled: Switch = True
    model: Folder = _DEMO_DRAFT
    dtype: DraftDtype = "fp32"
    threads: Count = 1
    tokens: DraftTokens = 4  # proposals a round
    margin: Number = 0.0  # a token that leads the next best by less is a round's last
    lookup: LookupSize = 3  # so many last tokens that stood in the request before propose what followed then; 0: never
    lookup_tokens: DraftTokens = 10  # proposals of such a round
    cache_tokens: Count = 65_536
    reuse: Reuse = "off"  # pie: KV of ended requests is moved to where their text stands now; blend: and mended
    reuse_share: Share = 0.15  # of the moved tokens that blend computes again


@dataclass(frozen=True, slots=True)
class TargetConfig:
    """The large model that countersigns."""

    listen: Listen = _LOCAL
    model: Folder = _DEMO_TARGET
    dtype: Dtype = "fp32"
    numerics: Numerics = "invariant"  # fast: torch may round otherwise for another batch
    threads: Count = 1
    cache_tokens: Count = 65_536
    ranks: Count = 1  # processes that a target spans, each with a part of the KV; 1: none but its own
    rank_unit: RankUnit = 0  # consecutive tokens whose KV one rank keeps; 0: by the context's length
    rank_timeout_ms: Milliseconds = 30_000  # of one step; then the ranks are started anew
    processes: Count = 1  # that `countersign up` runs; when one dies, another goes on with its requests
    role: Role = "mixed"  # prefill: computes long prompts for others; decode: answers; routers go by it when they can
    prefill_processes: Amount = 0  # that `countersign up` runs besides, of role prefill
    max_requests: Count = 256  # waiting ones included; more are refused
    max_running: Count = 256  # at once; fewer run when their KV does not fit
    token_budget: Count = 512  # tokens a forward pass
    prefill_chunk: Count = 256  # prompt tokens of one request a forward pass
    fingerprints: FingerprintSize = 8  # numbers a token of what it was sampled from, for audits; 0: none
    kv_store: Switch = True
    fault: Fault = "none"  # for tests of audits: answers otherwise than its receipts say
    kv_wire: KvWire = "exact"  # fp8 or int8: blocks are stored in a quarter of the room, and receipts say so
    hidden_markers: Markers = ""  # "<think> </think>": output between them is billed and signed, not shown


@dataclass(frozen=True, slots=True)
class KvConfig:
    """The store of KV blocks."""

    listen: Listen = _LOCAL
    ram_bytes: Count = 268_435_456  # of shared memory
    disk_bytes: Size = 0  # below data_dir/kv; 0: none, and a restart begins empty
    eviction: Eviction = "cost"  # what goes first when there is no room; lru: the least recently used
    peers: Switch = True  # ask other stores for what is not here


@dataclass(frozen=True, slots=True)
class AuditorConfig:
    """Checks receipts."""

    listen: Listen = _LOCAL
    model: Folder = _DEMO_TARGET  # the reference weights
    threads: Count = 1
    arithmetics: Text = ""  # "native fp32, ...": how targets compute, as agreed; empty: as their receipts say
    share: Fraction = 0.1  # of the receipts, drawn in public once they are in the log, are audited
    checkpoint_s: Seconds = 1.0  # between two checkpoints of a log that grows
    ledger: Text = ""  # empty: SQLite below data_dir/auditor; postgresql+psycopg://user:password@host/database
    origin: Text = ""  # the log's name; empty: made from its key
    http_listen: Listen = _LOCAL  # checkpoint, tiles and verdicts for everybody
    witnesses: Text = ""  # who cosigns this log: "KEY URL, KEY URL"
    follow: Text = ""  # other logs to witness: "KEY [URL], KEY [URL]"; those with a URL are fetched from there too
    follow_s: Seconds = 5.0  # between two looks at each


@dataclass(frozen=True, slots=True)
class SidecarConfig:
    """Checks the commit protocol while it runs."""

    listen: Listen = _LOCAL
    enabled: Switch = True  # false: it is not started, and nobody announces anything
    requests: Count = 4096  # whose runs it keeps in memory
    record: Switch = False  # write every closed request's run below data_dir/runs


@dataclass(frozen=True, slots=True)
class TelemetryConfig:
    """What processes tell of themselves."""

    otlp_endpoint: Text = ""  # where spans go: http://host:4317, over HTTP http://host:4318; empty: nowhere
    otlp_protocol: OtlpProtocol = "grpc"
    service_namespace: Text = "countersign"
    spans: Switch = True  # false: nothing is traced
    sample: Fraction = 1.0  # of the traces; those with errors, take-overs or failed audits are kept all the same
    kept_bytes: Size = 16_777_216  # spans of each process kept below data_dir/traces; 0: none
    content: Switch = False  # prompts and answers in spans
    metrics: Switch = True
    metrics_listen: Listen = _LOCAL  # where each process but the router serves /metrics
    log_format: LogFormat = "auto"  # human on a terminal, else JSON
    log_level: LogLevel = "info"


@dataclass(frozen=True, slots=True)
class Config:
    """The whole deployment."""

    data_dir: Folder = Path(".countersign")
    nats: NatsConfig = field(default_factory=NatsConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    draft: DraftConfig = field(default_factory=DraftConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    kv: KvConfig = field(default_factory=KvConfig)
    auditor: AuditorConfig = field(default_factory=AuditorConfig)
    sidecar: SidecarConfig = field(default_factory=SidecarConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)


def load(file: Path | None, environ: Mapping[str, str], overrides: Sequence[str]) -> Config:
    """The configuration that the layers make together; its paths are absolute.

    A file that `dump` wrote is final: the environment was part of it and is not read again. Relative model folders are
    looked for below the current folder, then below the checkout that this package runs from.

    Args:
        file: TOML, or what `dump` wrote; None for no file.
        environ: such as ``os.environ``; only names that start with ``COUNTERSIGN_`` are read.
        overrides: flags such as ``target.dtype=bf16``.

    Raises:
        ConfigError: an unreadable file, an unknown key, or a value that its key does not allow.
    """
    base = file_layer(file) if file is not None else Layer("defaults", {}, final=False)
    layers = [base]
    if not base.final:
        layers += environment_layer(environ)
    layers += flag_layer(overrides)
    tree = merge(Config, layers)
    try:
        return _resolved(msgspec.convert(tree, Config, strict=False, dec_hook=_decode_path))
    except msgspec.ValidationError as error:
        raise ConfigError.of_value(str(error), tree, Config, layers) from None


def dump(config: Config) -> str:
    """JSON that `load` reads back to an equal configuration: how a parent hands it to its child processes."""
    tree = {"resolved": True, **msgspec.to_builtins(config, enc_hook=str)}
    return msgspec.json.format(msgspec.json.encode(tree), indent=2).decode() + "\n"


def _decode_path(kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, str) and value and "\0" not in value:
        return Path(value)
    raise ValueError(f"{value!r} is no {kind.__name__}")  # msgspec adds the place and makes it a ValidationError


def _resolved(config: Config) -> Config:
    return dataclasses.replace(
        config,
        data_dir=config.data_dir.expanduser().absolute(),
        tokenizer=dataclasses.replace(config.tokenizer, model=_resolve_model(config.tokenizer.model)),
        draft=dataclasses.replace(config.draft, model=_resolve_model(config.draft.model)),
        target=dataclasses.replace(config.target, model=_resolve_model(config.target.model)),
        auditor=dataclasses.replace(config.auditor, model=_resolve_model(config.auditor.model)),
    )


def _resolve_model(folder: Path) -> Path:
    here = folder.expanduser().absolute()
    checkout = Path(__file__).resolve().parents[2] / folder
    return checkout if not here.exists() and checkout.exists() else here
