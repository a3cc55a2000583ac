"""``countersign log check`` against a real log over HTTP, honest and not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import typer
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from countersign.cli import log
from countersign.services.auditor.keys import Keys
from countersign.services.auditor.ledger import Ledger, Logged
from countersign.services.auditor.notary import Notary
from countersign.services.auditor.web import LogSite
from countersign.services.runtime.errors import CountersignError, DataLoss, InvalidArgument, Unavailable
from countersign.v1.auditor_pb2 import GetInclusionResponse, GetLogResponse
from countersign.verify import merkle
from countersign.verify.cose_receipt import prove_inclusion
from countersign.verify.log.checkpoint import Checkpoint, NoteKey
from countersign.verify.log.checkpoint import sign as sign_checkpoint
from countersign.verify.log.store import TileLog
from countersign.verify.receipt import attach_proofs, sign, strip
from countersign.verify.testing import example_receipt, signing_key

app = typer.Typer()
app.command()(log.check)


class Served:
    """A log that is served."""

    def __init__(self, folder: Path) -> None:
        self.keys, self.ledger = Keys.load(folder / "keys"), Ledger.open(f"sqlite:///{folder}/ledger.db")
        self.log = TileLog.open(folder / "log")
        self.site = LogSite(self.log, self.ledger, self.keys)
        self.notary = Notary(self.log, self.ledger, self.keys, 0.1)

    @property
    def key(self) -> str:
        return self.keys.log_key.encode()

    def grow(self, count: int) -> None:
        indices = self.log.append([b"entry %d" % index for index in range(self.log.size, self.log.size + count)])
        self.ledger.record(Logged(index, index.to_bytes(32, "big"), "r") for index in indices)
        self.notary.sign()

    async def close(self) -> None:
        await self.site.close()
        self.ledger.close()
        self.log.close()


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    served = Served(tmp_path / "served")
    await served.site.open("127.0.0.1:0")
    yield served
    await served.close()


async def check(*arguments: object) -> tuple[int, str]:
    """Exit code and output. Raises what the command raises."""
    result = await asyncio.to_thread(CliRunner().invoke, app, [*map(str, arguments)])
    if isinstance(result.exception, CountersignError):
        raise result.exception
    return result.exit_code, result.output


async def test_a_log_that_grows_is_told_by_how_much(served: Served, tmp_path: Path) -> None:
    for count, before in ((3, 0), (300, 3), (1, 303)):
        served.grow(count)
        options = ["--key", served.key, "--state", tmp_path / "state"]
        code, out = await check(served.site.url, *options, "--json")
        assert code == 0, out
        assert json.loads(out) == {"ok": True, "origin": served.keys.origin, "size": before + count, "before": before}
    code, out = await check(served.site.url + "/", *options)
    assert (code, "304 entries, 0 more" in out) == (0, True)


async def test_a_log_that_shrank_is_found_out(served: Served, tmp_path: Path) -> None:
    served.grow(5)
    state = tmp_path / "state"
    other = Served(tmp_path / "other")
    other.keys = served.keys
    other.notary = Notary(other.log, other.ledger, served.keys, 0.1)
    other.site = LogSite(other.log, other.ledger, served.keys)
    other.grow(3)
    await other.site.open("127.0.0.1:0")
    assert (await check(served.site.url, "--key", served.key, "--state", state))[0] == 0
    before = state.read_bytes()
    code, out = await check(other.site.url, "--key", served.key, "--state", state, "--json")
    assert (code, json.loads(out)["ok"]) == (1, False)
    assert state.read_bytes() == before, "what was seen before is the evidence"
    await other.close()


async def test_tiles_that_do_not_give_the_root_are_found_out(served: Served) -> None:
    served.grow(5)
    app, note = web.Application(), served.log.published()

    async def checkpoint(_: web.Request) -> web.Response:
        return web.Response(body=note)

    async def tile(_: web.Request) -> web.Response:
        return web.Response(body=b"x" * 32 * 5)

    app.router.add_get("/checkpoint", checkpoint)
    app.router.add_get("/{path:tile/.*}", tile)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    code, out = await check(f"http://127.0.0.1:{runner.addresses[0][1]}", "--key", served.key)
    assert (code, "do not give the root" in out) == (1, True)
    await runner.cleanup()


async def test_a_server_that_is_busy_is_not_a_log_that_lies(served: Served) -> None:
    served.grow(5)
    app, note = web.Application(), served.log.published()

    async def checkpoint(_: web.Request) -> web.Response:
        return web.Response(body=note)

    async def tile(_: web.Request) -> web.Response:
        return web.Response(status=503)

    app.router.add_get("/checkpoint", checkpoint)
    app.router.add_get("/{path:tile/.*}", tile)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    with pytest.raises(Unavailable, match="status 503"):
        await check(f"http://127.0.0.1:{runner.addresses[0][1]}", "--key", served.key)
    await runner.cleanup()


def test_only_a_proof_that_holds_is_put_into_a_receipts_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this receipt, by this log, under this checkpoint; whatever else an auditor sends leaves the file as it was."""
    receipt, key = sign(*example_receipt(), signing_key()), signing_key(2)
    leaves = [merkle.leaf_hash(b"another"), merkle.leaf_hash(strip(receipt)), merkle.leaf_hash(b"a third")]
    log_key = NoteKey("log.test", key.public_key())

    def proof(index: int, size: int, signer: Ed25519PrivateKey = key) -> bytes:
        tree = leaves[:size]
        return prove_inclusion(merkle.root(tree), size, index, merkle.inclusion_path(tree, index), signer)

    def checkpoint(size: int) -> bytes:
        return sign_checkpoint(Checkpoint("log.test", size, merkle.root(leaves[:size])), key)

    def put(cose_receipt: bytes, note: bytes) -> tuple[BaseException | None, bytes]:
        async def answered(*_: object) -> tuple[GetLogResponse, GetInclusionResponse]:
            found = GetInclusionResponse(index=1, checkpoint=note, cose_receipt=cose_receipt)
            return GetLogResponse(origin="log.test", log_key=log_key.encode()), found

        file = tmp_path / "a.receipt"
        file.write_bytes(receipt)
        monkeypatch.setattr(log, "_proof", answered)
        program = typer.Typer()
        program.command()(log.prove)
        return CliRunner().invoke(program, [str(file)]).exception, file.read_bytes()

    assert put(proof(1, 3), checkpoint(3)) == (None, attach_proofs(receipt, [proof(1, 3)], checkpoint(3)))
    for wrong in (proof(0, 3), proof(1, 2), proof(1, 3, signing_key(3)), b"nothing"):
        error, left = put(wrong, checkpoint(3))
        assert isinstance(error, DataLoss), wrong
        assert left == receipt


async def test_another_logs_key_is_not_believed(served: Served, tmp_path: Path) -> None:
    served.grow(1)
    stranger = Keys.load(tmp_path / "stranger").log_key.encode()
    code, out = await check(served.site.url, "--key", stranger)
    assert (code, "NOT as a log should be" in out) == (1, True)


async def test_what_is_no_key_or_no_log_is_a_typed_error(served: Served) -> None:
    with pytest.raises(InvalidArgument, match="--key"):
        await check(served.site.url, "--key", "nonsense")
    served.grow(1)
    with pytest.raises(InvalidArgument, match="witness"):
        await check(served.site.url, "--key", served.keys.witness_key.encode())
    with pytest.raises(Unavailable, match="does not answer"):
        await check("http://127.0.0.1:9", "--key", served.key)
    with pytest.raises(Unavailable, match="status 404"):
        await check(served.site.url + "/nowhere", "--key", served.key)
