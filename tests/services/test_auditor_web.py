"""The log over real HTTP: what a client with nothing but the keys can do."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from countersign.services.auditor.keys import Keys
from countersign.services.auditor.ledger import Ledger, Logged
from countersign.services.auditor.notary import Notary
from countersign.services.auditor.web import LogSite
from countersign.services.runtime.errors import FailedPrecondition
from countersign.verify import merkle
from countersign.verify.log import checkpoint as notes
from countersign.verify.log.checkpoint import NoteKey
from countersign.verify.log.proofs import TileTree
from countersign.verify.log.store import TileLog
from countersign.verify.log.tiles import Tile

SIZE = 600
ENTRIES = [b"entry %d" % number for number in range(SIZE)]


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[LogSite]:
    keys, ledger = Keys.load(tmp_path / "keys"), Ledger.open(f"sqlite:///{tmp_path}/ledger.db")
    with TileLog.open(tmp_path / "log") as log:
        site = LogSite(log, ledger, keys)
        await site.open("127.0.0.1:0")
        indices = log.append(ENTRIES)
        logged = [Logged(index, hashlib.sha256(ENTRIES[index]).digest(), "r") for index in indices]
        ledger.record(logged)
        notary = Notary(log, ledger, keys, 1.0)
        notary.sign()
        ledger.decided(7, "pass", b"a signed verdict")
        yield site
        await site.close()
        ledger.close()


async def get(site: LogSite, path: str) -> tuple[int, bytes, str]:
    async with aiohttp.ClientSession() as session, session.get(site.url + path) as response:
        return response.status, await response.read(), response.headers.get("Cache-Control", "")


async def test_entries_are_proven_from_tiles_and_keys_alone(site: LogSite) -> None:
    status, keys, _ = await get(site, "/keys")
    assert status == 200
    log_key = NoteKey.parse(keys.decode().split("\n")[0])
    _, note, caching = await get(site, "/checkpoint")
    assert caching == "no-cache"
    signed = notes.verify(note, [log_key]).checkpoint
    assert signed.size == SIZE
    wanted = {Tile(0, n, min(256, SIZE - 256 * n)) for n in range(3)} | {Tile(1, 0, 2)}
    wanted |= {Tile("entries", n, min(256, SIZE - 256 * n)) for n in range(3)}
    tiles = {}
    for tile in wanted:
        status, tiles[tile], caching = await get(site, f"/{tile.path}")
        assert (status, caching) == (200, "public, max-age=31536000, immutable")
    tree = TileTree(tiles.get)
    for index in (0, 255, 256, 599):
        assert tree.entry(index, SIZE) == ENTRIES[index]
        path, leaf = tree.inclusion(index, SIZE), merkle.leaf_hash(ENTRIES[index])
        assert merkle.verify_inclusion(leaf, index, SIZE, path, signed.root)


async def test_a_verdict_is_found_by_its_receipt(site: LogSite) -> None:
    digest = hashlib.sha256(ENTRIES[7]).hexdigest()
    assert (await get(site, f"/verdict/{digest}"))[:2] == (200, b"a signed verdict")
    undecided = hashlib.sha256(ENTRIES[8]).hexdigest()
    for digest in (undecided, "00", "zz", "0" * 64):
        assert (await get(site, f"/verdict/{digest}"))[0] == 404


@pytest.mark.parametrize(
    "path",
    [
        "/tile/0/003",
        "/tile/0/002.p/89",
        "/tile/0/2",
        "/tile/8/000",
        "/tile/../journal",
        "/tile/0/%2e%2e/%2e%2e/journal",
        "/journal",
        "/",
        "/tile/entries/" + "x000/" * 40 + "000",
    ],
)
async def test_nothing_else_is_served(site: LogSite, path: str) -> None:
    assert (await get(site, path))[0] == 404


async def test_it_only_reads(site: LogSite) -> None:
    async with aiohttp.ClientSession() as session:
        for method in ("POST", "PUT", "DELETE"):
            async with session.request(method, site.url + "/checkpoint", data=b"x") as response:
                assert response.status == 405


async def test_an_address_in_use_is_said(site: LogSite, tmp_path: Path) -> None:
    with TileLog.open(tmp_path / "other") as log:
        ledger = Ledger.open(f"sqlite:///{tmp_path}/other.db")
        other = LogSite(log, ledger, Keys.load(tmp_path / "keys"))
        with pytest.raises(FailedPrecondition, match="http_listen") as refusal:
            await other.open(site.url.removeprefix("http://"))
        assert refusal.value.reason == "ADDRESS_UNUSABLE"
        ledger.close()
