"""Witnesses: real ledgers and log folders, real HTTP between two auditors, and a log that lies."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path

import hypothesis.strategies as st
import pytest
from aiohttp import web
from hypothesis import given

from countersign.services.auditor.cosigning import Cosigners, add_checkpoint
from countersign.services.auditor.following import Follower
from countersign.services.auditor.keys import Keys
from countersign.services.auditor.ledger import Ledger, Logged
from countersign.services.auditor.notary import Notary
from countersign.services.auditor.peers import Others, Peer, peers
from countersign.services.auditor.tlog_witness import encode_request, parse_request
from countersign.services.auditor.web import LogSite
from countersign.services.auditor.witness import Answer, Conflict, Cosigned, Elsewhere, Unproven, Witness, merged
from countersign.services.runtime.config import AuditorConfig
from countersign.services.runtime.errors import FailedPrecondition, Unavailable
from countersign.services.runtime.fetching import ask
from countersign.verify import merkle, statement
from countersign.verify.equivocation import CONTENT_TYPE, Equivocation
from countersign.verify.errors import Malformed, Untrusted, VerificationError
from countersign.verify.log import checkpoint as notes
from countersign.verify.log.checkpoint import Checkpoint, KeyKind, NoteKey, sign
from countersign.verify.log.store import TileLog
from countersign.verify.testing import signing_key

ORIGIN = "log.example/receipts"
LOG_KEY = NoteKey(ORIGIN, signing_key().public_key())
NOW_MS = 1_750_000_000_000


def tree(*entries: object) -> list[bytes]:
    return [merkle.leaf_hash(str(entry).encode()) for entry in entries]


def note(leaves: list[bytes], key: int = 1) -> bytes:
    return sign(Checkpoint(ORIGIN, len(leaves), merkle.root(leaves)), signing_key(key))


class Watch:
    """A witness that can be closed and opened again over its ledger."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.keys = folder, Keys.load(folder / "keys")
        self.open()

    def open(self) -> None:
        self.ledger = Ledger.open(f"sqlite:///{self.folder}/ledger.db")
        self.witness = Witness(self.ledger, self.keys, [LOG_KEY], lambda: NOW_MS)

    def observe(self, leaves: list[bytes], old: int) -> Answer:
        return self.witness.observe(note(leaves), old, merkle.consistency_path(leaves, old))

    def evidence(self) -> list[Equivocation]:
        trusted = [self.keys.verdicts.public_key()]
        kept = self.ledger.conflicts(ORIGIN)
        return [Equivocation.from_cbor(statement.verify(one, CONTENT_TYPE, trusted)) for one in kept]


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Watch]:
    watch = Watch(tmp_path)
    yield watch
    watch.ledger.close()


def test_a_log_that_grows_is_cosigned_over_a_restart_of_its_witness(watch: Watch) -> None:
    grown = tree(*range(9))
    for old, size in ((0, 3), (3, 8), (8, 8), (8, 9)):
        answer = watch.observe(grown[:size], old)
        assert isinstance(answer, Cosigned)
        cosigned = merged(note(grown[:size]), answer.line, watch.keys.witness_key)
        signers = notes.verify(cosigned, [LOG_KEY, watch.keys.witness_key]).signers
        assert [signer.time for signer in signers] == [None, NOW_MS // 1000]
        watch.ledger.close()
        watch.open()
    assert watch.evidence() == []


def test_a_proof_from_another_size_is_told_the_one_that_was_seen(watch: Watch) -> None:
    grown = tree(*range(9))
    watch.observe(grown[:5], 0)
    assert watch.observe(grown, 3) == Elsewhere(5)
    assert watch.observe(grown[:3], 3) == Elsewhere(5)
    with pytest.raises(Malformed, match="behind"):
        watch.witness.observe(note(grown[:3]), 5, [])


@pytest.mark.parametrize("old", [3, 4, 5])
def test_a_second_history_is_not_cosigned_even_after_a_restart(watch: Watch, old: int) -> None:
    watch.observe(tree(*range(old)), 0)
    watch.ledger.close()
    watch.open()
    other = tree("x", *range(1, 9))
    assert not isinstance(watch.observe(other, old), Cosigned)
    assert not isinstance(watch.observe(other[:old], 0), Cosigned)
    seen = watch.witness.seen(ORIGIN)
    assert seen is not None
    assert seen.root == merkle.root(tree(*range(old)))


def test_two_roots_of_one_size_are_kept_as_evidence_that_anybody_can_check(watch: Watch) -> None:
    watch.observe(tree(1, 2, 3), 0)
    for _ in range(2):
        assert isinstance(watch.observe(tree(1, 2, 4), 3), Conflict)
    (found,) = watch.evidence()
    assert found.verify([LOG_KEY]) == "two roots are signed for 3 entries"


def test_a_rewritten_entry_is_kept_as_evidence(watch: Watch) -> None:
    watch.observe(tree(1, 2, 3), 0)
    assert isinstance(watch.observe(tree("x", 2, 3, 4, 5), 3), Conflict)
    (found,) = watch.evidence()
    assert "does not begin with" in found.verify([LOG_KEY])


def test_of_a_note_only_the_logs_own_signature_is_remembered(watch: Watch) -> None:
    """Others' may be 64 KiB of anything, in each piece of evidence."""
    stuffed = note(tree(1, 2, 3))
    for number in range(60):
        stuffed = notes.cosign(stuffed, signing_key(9), f"w{number}" + "x" * 200, time=number)
    watch.witness.observe(stuffed, 0, [])
    assert watch.ledger.last_seen(ORIGIN) == note(tree(1, 2, 3))
    other = notes.cosign(note(tree(1, 2, 4)), signing_key(9), "w" * 200, time=1)
    watch.witness.observe(other, 3, [])
    (found,) = watch.evidence()
    assert (found.earlier, found.later) == (note(tree(1, 2, 3)), note(tree(1, 2, 4)))


def test_a_made_up_proof_accuses_nobody(watch: Watch) -> None:
    grown = tree(*range(9))
    watch.observe(grown[:5], 0)
    assert watch.witness.observe(note(grown), 5, [b"j" * 32] * 4) == Unproven()
    assert watch.evidence() == []
    assert isinstance(watch.observe(grown, 5), Cosigned)


def test_only_the_log_itself_under_its_own_name_is_watched(watch: Watch) -> None:
    with pytest.raises(Untrusted):
        watch.witness.observe(note(tree(1), key=2), 0, [])
    other = sign(Checkpoint("other.example", 1, b"r" * 32), signing_key(), ORIGIN)
    with pytest.raises(Untrusted):
        watch.witness.observe(other, 0, [])
    assert watch.witness.seen("other.example") is None


@given(st.integers(0, 2**63 - 1), st.lists(st.binary(min_size=32, max_size=32), max_size=63))
def test_a_request_reads_back(old: int, path: list[bytes]) -> None:
    assert parse_request(encode_request(old, path, note(tree(1)))) == (old, path, note(tree(1)))


@given(st.binary(max_size=300) | st.binary(max_size=200).map(lambda data: b"old 1\n" + data))
def test_of_any_bytes_only_a_verification_error_comes(body: bytes) -> None:
    try:
        _, path, _ = parse_request(body)
    except VerificationError:
        return
    assert all(len(part) == 32 for part in path)


# Two auditors.


class Auditor:
    """Log, ledger, keys and site of one auditor."""

    def __init__(self, folder: Path) -> None:
        self.keys = Keys.load(folder / "keys")
        self.ledger = Ledger.open(f"sqlite:///{folder}/ledger.db")
        self.log = TileLog.open(folder / "log")
        self.notary = Notary(self.log, self.ledger, self.keys, 0.5)
        self.site = LogSite(self.log, self.ledger, self.keys)
        self.witness: Witness | None = None

    def grow(self, *entries: object) -> bytes:
        """So many entries more, and a checkpoint over them."""
        indices = self.log.append([str(entry).encode() for entry in entries])
        self.ledger.record(Logged(index, merkle.leaf_hash(b"%d" % index), "r") for index in indices)
        signed = self.notary.sign()
        assert signed is not None
        return signed

    def watches(self, other: Auditor) -> Follower:
        """As a witness of ``other``; a follower of it, if it serves already."""
        self.witness = Witness(self.ledger, self.keys, [other.keys.log_key], lambda: NOW_MS)
        self.site.add_post("/add-checkpoint", partial(add_checkpoint, self.witness))
        return Follower(Peer(other.keys.log_key, other.site.url), self.witness, self.ledger)

    async def close(self) -> None:
        await self.site.close()
        self.ledger.close()
        self.log.close()


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[tuple[Auditor, Auditor, Follower]]:
    """A log and its witness."""
    log, witness = Auditor(tmp_path / "log"), Auditor(tmp_path / "witness")
    await log.site.open("127.0.0.1:0")
    follower = witness.watches(log)
    await witness.site.open("127.0.0.1:0")
    yield log, witness, follower
    await log.close()
    await witness.close()


async def test_a_log_gets_its_checkpoints_cosigned(pair: tuple[Auditor, Auditor, Follower]) -> None:
    log, witness, _ = pair
    peer = Peer(witness.keys.witness_key, witness.site.url)
    cosigners = Cosigners(log.log, log.ledger, log.notary, (peer,))
    for entries in (range(3), range(3, 300)):
        log.grow(*entries)
        assert await asyncio.to_thread(cosigners.gather)
        assert not await asyncio.to_thread(cosigners.gather), "it is cosigned already"
        served = await asyncio.to_thread(ask, f"{log.site.url}/checkpoint")
        signed = notes.verify(served.body, [log.keys.log_key, witness.keys.witness_key])
        assert [signer.key.kind for signer in signed.signers] == [KeyKind.LOG, KeyKind.WITNESS]
    log.grow(300)
    afresh = Cosigners(log.log, log.ledger, log.notary, (peer,))  # started anew, it asks the witness where it is
    assert await asyncio.to_thread(afresh.gather)


async def test_a_witness_that_is_away_holds_nothing_up(pair: tuple[Auditor, Auditor, Follower]) -> None:
    log, witness, _ = pair
    cosigners = Cosigners(log.log, log.ledger, log.notary, (Peer(witness.keys.witness_key, "http://127.0.0.1:9"),))
    log.grow(1)
    assert not await asyncio.to_thread(cosigners.gather)


@pytest.mark.parametrize("fault", ["another note", "another key", "no line"])
async def test_a_cosignature_that_does_not_hold_is_not_taken(
    pair: tuple[Auditor, Auditor, Follower], tmp_path: Path, fault: str
) -> None:
    log, _, _ = pair
    liar = Auditor(tmp_path / "liar")

    async def lie(request: web.Request) -> web.Response:
        _, _, asked = parse_request(await request.read())
        key = signing_key(9) if fault == "another key" else liar.keys.witness
        signed = note(tree("x")) if fault == "another note" else asked
        line = notes.parse_note(notes.cosign(signed, key, liar.keys.witness_key.name, time=1)).signatures[-1].line()
        return web.Response(text="ok" if fault == "no line" else line)

    liar.site.add_post("/add-checkpoint", lie)
    await liar.site.open("127.0.0.1:0")
    signed = log.grow(1)
    cosigners = Cosigners(log.log, log.ledger, log.notary, (Peer(liar.keys.witness_key, liar.site.url),))
    assert not await asyncio.to_thread(cosigners.gather)
    assert log.log.published() == signed
    await liar.close()


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"nonsense", 400),
        (encode_request(0, [], note(tree(1))), 404),
        (b"x" * 300_000, 413),
    ],
)
async def test_what_is_no_request_of_a_followed_log_is_refused(
    pair: tuple[Auditor, Auditor, Follower], body: bytes, status: int
) -> None:
    _, witness, _ = pair
    assert (await asyncio.to_thread(ask, f"{witness.site.url}/add-checkpoint", body)).status == status


async def test_a_followed_log_is_held_to_every_checkpoint_it_serves(
    pair: tuple[Auditor, Auditor, Follower], caplog: pytest.LogCaptureFixture
) -> None:
    log, witness, follower = pair
    await asyncio.to_thread(follower.look)
    for entries in (range(1), range(1, 8), range(8, 700)):
        log.grow(*entries)
        await asyncio.to_thread(follower.look)
        assert witness.witness is not None
        seen = witness.witness.seen(log.keys.origin)
        assert seen is not None
        assert seen.size == log.log.size
    assert caplog.records == []


@pytest.mark.parametrize(("before", "after"), [(8, 300), (7, 8), (7, 7), (300, 9)])
async def test_a_log_that_serves_another_history_is_found_out(
    pair: tuple[Auditor, Auditor, Follower], tmp_path: Path, before: int, after: int
) -> None:
    log, witness, follower = pair
    log.grow(*range(before))
    await asyncio.to_thread(follower.look)
    await log.site.close()
    # The same keys over another folder: what a log does that wants a receipt gone.
    liar = Auditor(tmp_path / "liar")
    liar.keys = log.keys
    liar.notary = Notary(liar.log, liar.ledger, log.keys, 0.5)
    liar.site = LogSite(liar.log, liar.ledger, log.keys)
    await liar.site.open("127.0.0.1:0")
    liar.grow("another", *range(1, after))
    assert witness.witness is not None
    lied_to = Follower(Peer(log.keys.log_key, liar.site.url), witness.witness, witness.ledger)
    await asyncio.to_thread(lied_to.look)
    seen = witness.witness.seen(log.keys.origin)
    assert seen is not None
    assert seen.size == before
    kept = witness.ledger.conflicts()
    if after >= before:
        trusted = [witness.keys.verdicts.public_key()]
        found = Equivocation.from_cbor(statement.verify(kept[0], CONTENT_TYPE, trusted))
        found.verify([log.keys.log_key])
    else:
        assert kept == [], "a smaller tree proves nothing without the hashes of the larger one"
    await liar.close()


async def test_a_peer_that_answers_a_byte_at_a_time_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("countersign.services.runtime.fetching.TIMEOUT_S", 0.5)

    ended = asyncio.Semaphore(0)

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            request = await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\n" if request.startswith(b"GET /head") else b"HTTP/1.1 200 OK\r\n\r\n")
            while True:
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(0.05)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        ended.release()

    async with await asyncio.start_server(drip, "127.0.0.1", 0) as server, asyncio.timeout(30):
        host, port = server.sockets[0].getsockname()
        for path in ("head", "body"):
            with pytest.raises(Unavailable):
                await asyncio.to_thread(ask, f"http://{host}:{port}/{path}")
            await ended.acquire()


async def test_a_followed_log_whose_checkpoint_is_gone_is_said(
    pair: tuple[Auditor, Auditor, Follower], caplog: pytest.LogCaptureFixture
) -> None:
    log, _, follower = pair
    log.grow(1)
    await asyncio.to_thread(follower.look)
    (log.log.folder / "checkpoint").unlink()
    await asyncio.to_thread(follower.look)
    (told,) = (vars(record)["error"] for record in caplog.records if record.name.endswith("auditor.following"))
    assert "status 404" in told


async def test_a_peer_that_sends_too_much_or_nothing_is_unavailable(pair: tuple[Auditor, Auditor, Follower]) -> None:
    log, _, _ = pair
    log.grow(*range(10))
    with pytest.raises(Unavailable, match="more than 10 bytes"):
        await asyncio.to_thread(partial(ask, most=10), f"{log.site.url}/checkpoint")
    with pytest.raises(Unavailable, match="does not answer"):
        await asyncio.to_thread(ask, "http://127.0.0.1:9/checkpoint")


def test_peers_are_read_from_the_configuration() -> None:
    log, witness = LOG_KEY.encode(), NoteKey("w", signing_key(2).public_key(), KeyKind.WITNESS).encode()
    config = AuditorConfig(follow=f"{log}, {log} http://a:1/", witnesses=f"{witness} http://w:2")
    others = Others.of(config)
    assert [peer.url for peer in others.follow] == ["", "http://a:1"]
    assert [(peer.key.name, peer.url) for peer in others.witnesses] == [("w", "http://w:2")]


@pytest.mark.parametrize(
    "text", ["nokey", f"{LOG_KEY.encode()} ftp://x", f"{LOG_KEY.encode()} http://x y", f"{LOG_KEY.encode()}"]
)
def test_a_wrong_peer_is_refused_with_what_to_write(text: str) -> None:
    with pytest.raises(FailedPrecondition, match=r"auditor\.witnesses") as refusal:
        peers("auditor.witnesses", text, KeyKind.WITNESS, with_url=True)
    assert refusal.value.reason == "CONFIG_INVALID"
