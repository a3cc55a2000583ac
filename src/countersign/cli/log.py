"""``countersign log``: the transparency log that the auditor of a stack keeps, and logs anywhere."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from google.protobuf.message import Message

from countersign.cli.generate import DEFAULT_DATA_DIR
from countersign.files import write_atomically
from countersign.services.runtime.bus import Bus
from countersign.services.runtime.call import M
from countersign.services.runtime.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
    translated,
)
from countersign.services.runtime.fetching import ask
from countersign.services.runtime.stack import read_stack
from countersign.v1.auditor_pb2 import GetInclusionRequest, GetInclusionResponse, GetLogRequest, GetLogResponse
from countersign.verify.cose_receipt import Included, verify_inclusion
from countersign.verify.errors import Inconsistent, VerificationError
from countersign.verify.log.checkpoint import MAX_NOTE_BYTES, Checkpoint, KeyKind, NoteKey, verify
from countersign.verify.log.proofs import TileTree
from countersign.verify.log.tiles import Tile
from countersign.verify.receipt import MAX_RECEIPT_BYTES, attach_proofs, parse, receipt_digest
from countersign.verify.trust import TrustPolicy, TrustRules

if TYPE_CHECKING:
    from collections.abc import Sequence

_TIMEOUT_S = 5.0
_AGAIN_S = 0.25

DataDir = Annotated[Path, typer.Option(help="Data folder of the running stack.", metavar="FOLDER")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def status(data_dir: DataDir = DEFAULT_DATA_DIR, json_: Json = False) -> None:
    """How far the log of a running stack is, and the keys with which others check it."""
    found = asyncio.run(_ask(data_dir, "GetLog", GetLogRequest(), GetLogResponse))
    facts = {
        "origin": found.origin,
        "url": found.url,
        "log_key": found.log_key,
        "witness_key": found.witness_key,
        "auditor_key": found.auditor_key.hex(),
        "size": found.size,
        "refused": found.refused,
        "waiting": found.waiting,
        "outcomes": dict(found.outcomes),
        "equivocations": found.equivocations,
    }
    if json_:
        print(json.dumps(facts))
        return
    for name, value in facts.items():
        print(f"{name:<14}{', '.join(f'{n} {k}' for k, n in value.items()) if isinstance(value, dict) else value}")


def prove(
    receipt: Annotated[Path, typer.Argument(help="File with a receipt of a running stack.", metavar="RECEIPT")],
    wait: Annotated[float, typer.Option(help="Seconds to wait until the log has it.", min=0)] = 10.0,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    json_: Json = False,
) -> None:
    """Put the proof that a receipt is in the log, and the log's checkpoint, into its file, to hold offline."""
    data = _read(receipt)
    with translated(VerificationError, InvalidArgument, about=str(receipt), reason="NOT_A_RECEIPT"):
        digest = receipt_digest(data)
    log, found = asyncio.run(_proof(data_dir, digest, wait))
    with translated(VerificationError, DataLoss, about="the auditor's proof does not hold", reason="WRONG_PROOF"):
        proven = attach_proofs(data, [found.cose_receipt], found.checkpoint)
        included = _included(parse(proven).leaf, found, NoteKey.parse(log.log_key))
    with translated(OSError, FailedPrecondition, about=f"{receipt} cannot be written"):
        write_atomically(receipt, proven)
    if json_:
        facts = {"receipt": str(receipt), "origin": log.origin, "index": included.index, "size": included.size}
        print(json.dumps({**facts, "log_key": log.log_key}))
    else:
        print(f"{receipt}: entry {included.index} of {included.size} in {log.origin}")
        print(f"check it anywhere with: countersign audit {receipt} --log-key {log.log_key}")


def check(
    url: Annotated[str, typer.Argument(help="Where the log is served, http://host:port.", metavar="URL")],
    key: Annotated[str, typer.Option(help="The log's key (name+hash+base64).", metavar="KEY")],
    state: Annotated[
        Path | None,
        typer.Option(help="Keeps the checkpoint; the next check demands that the log only grew.", metavar="FILE"),
    ] = None,
    json_: Json = False,
) -> None:
    """Check a log from outside: its signature, that its tiles give its root, that it only grew. Exits 1 if not."""
    with translated(VerificationError, InvalidArgument, about="--key", reason="NOT_A_KEY"):
        log = NoteKey.parse(key)
    try:
        note, checkpoint = _checkpoint(url.rstrip("/"), log)
        earlier = _grew(url.rstrip("/"), log, checkpoint, state)
    except VerificationError as error:
        print(json.dumps({"ok": False, "error": str(error)}) if json_ else f"{url}: NOT as a log should be: {error}")
        raise typer.Exit(1) from None
    if state is not None:
        with translated(OSError, FailedPrecondition, about=f"{state} cannot be written"):
            write_atomically(state, note)
    if json_:
        print(json.dumps({"ok": True, "origin": log.name, "size": checkpoint.size, "before": earlier}))
    else:
        print(f"{log.name}: {checkpoint.size} entries, {checkpoint.size - earlier} more than when last seen; all holds")


async def _ask(data_dir: Path, method: str, request: Message, reply: type[M]) -> M:
    bus = await Bus.connect(read_stack(data_dir).nats, "countersign log")
    try:
        return await bus.call("auditor", method, request, reply, timeout=_TIMEOUT_S)
    finally:
        await bus.close()


async def _proof(data_dir: Path, digest: bytes, wait: float) -> tuple[GetLogResponse, GetInclusionResponse]:
    """The log, and the proof, as soon as a checkpoint covers the receipt."""
    bus = await Bus.connect(read_stack(data_dir).nats, "countersign log")
    deadline = time.monotonic() + wait
    try:
        while True:
            try:
                log = await bus.call("auditor", "GetLog", GetLogRequest(), GetLogResponse, timeout=_TIMEOUT_S)
                asked = GetInclusionRequest(receipt_sha256=digest)
                found = await bus.call(
                    "auditor", "GetInclusion", asked, GetInclusionResponse, timeout=_TIMEOUT_S, instance=log.instance
                )
            except (NotFound, FailedPrecondition):
                if time.monotonic() + _AGAIN_S > deadline:
                    raise
            else:
                return log, found
            await asyncio.sleep(_AGAIN_S)
    finally:
        await bus.close()


def _included(leaf: bytes, found: GetInclusionResponse, log: NoteKey) -> Included:
    """Where the log has the entry of that leaf hash. Raises VerificationError where proof or checkpoint do not hold."""
    head = TrustRules(TrustPolicy(logs=(log,))).checkpoint(found.checkpoint).checkpoint
    included = verify_inclusion(found.cose_receipt, leaf, [log.key])
    if (included.size, included.root) != (head.size, head.root):
        raise Inconsistent("the proof does not lead to the checkpoint", proof=included.size, checkpoint=head.size)
    return included


def _checkpoint(url: str, log: NoteKey) -> tuple[bytes, Checkpoint]:
    reply = ask(f"{url}/checkpoint", most=MAX_NOTE_BYTES)
    if reply.status != 200:
        raise Unavailable(f"{url}/checkpoint is answered with status {reply.status}", reason="NO_CHECKPOINT")
    if log.kind != KeyKind.LOG:
        raise InvalidArgument("--key: this is a witness's key, not a log's", reason="NOT_A_KEY")
    return reply.body, TrustRules(TrustPolicy(logs=(log,))).checkpoint(reply.body).checkpoint


def _grew(url: str, log: NoteKey, checkpoint: Checkpoint, state: Path | None) -> int:
    """The size that was seen last. Raises VerificationError where the log did not only grow since."""

    def fetch(tile: Tile) -> bytes | None:
        reply = ask(f"{url}/{tile.path}")
        if reply.status == 429 or reply.status >= 500:  # that a server is busy says nothing about its log
            raise Unavailable(f"{url}/{tile.path} is answered with status {reply.status}", reason="NO_TILE")
        return reply.body if reply.status == 200 else None

    last = Checkpoint(log.name, 0, TileTree(fetch).root(0))
    if state is not None and state.exists():
        last = verify(_read(state), [log]).checkpoint
    path: Sequence[bytes] = ()
    if last.size <= checkpoint.size:
        path = TileTree(fetch).consistency(last.size, checkpoint.size)
    TrustRules(TrustPolicy(logs=(log,))).successor(last, checkpoint, path)
    if TileTree(fetch).root(checkpoint.size) != checkpoint.root:
        raise Inconsistent("the tiles do not give the root that is signed", size=checkpoint.size)
    return last.size


def _read(file: Path) -> bytes:
    with translated(OSError, InvalidArgument, about=f"{file} cannot be read"), file.open("rb") as opened:
        return opened.read(MAX_RECEIPT_BYTES + 1)
