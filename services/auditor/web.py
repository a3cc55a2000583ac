"""The log for everybody, over HTTP and read-only: c2sp.org/tlog-tiles, and verdicts beside it.

GET /checkpoint         the newest signed checkpoint               changes
GET /tile/L/N[.p/W]     hashes; /tile/entries/N[.p/W]: receipts    never change
GET /verdict/DIGEST     the signed verdict on a receipt            never changes
GET /keys               the keys of log, witness and verdicts
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from aiohttp import web

from countersign.services.auditor.keys import Keys
from countersign.services.auditor.ledger import Ledger
from countersign.services.auditor.wire import DIGEST_BYTES
from countersign.services.runtime.errors import CountersignError, FailedPrecondition
from countersign.verify.errors import LogFolderError, Malformed
from countersign.verify.keys import key_id_text
from countersign.verify.log.store import TileLog

MAX_BODY_BYTES = 128 * 1024
_IMMUTABLE = {"Cache-Control": "public, max-age=31536000, immutable"}
_FRESH = {"Cache-Control": "no-cache"}
_BYTES, _TEXT = "application/octet-stream", "text/plain"
_STOP_S = 2.0

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_log = logging.getLogger(__name__)


class LogSite:
    """Serves a log; ``open`` it, then ``close`` it."""

    def __init__(self, log: TileLog, ledger: Ledger, keys: Keys) -> None:
        self._tiles = log
        self._ledger = ledger
        self._keys = keys
        self._app = web.Application(middlewares=[_typed], client_max_size=MAX_BODY_BYTES)
        self._app.router.add_get("/checkpoint", self._checkpoint)
        self._app.router.add_get("/keys", self._known_keys)
        self._app.router.add_get("/verdict/{digest}", self._verdict)
        self._app.router.add_get("/{path:tile/.*}", self._tile)
        self._runner: web.AppRunner | None = None
        self.url = ""

    def add_post(self, path: str, handler: Handler) -> None:
        """One more path, before ``open``."""
        self._app.router.add_post(path, handler)

    async def open(self, listen: str) -> None:
        """Listen on host:port, port 0 for a free one; ``url`` says where.

        Raises:
            FailedPrecondition: reason ADDRESS_UNUSABLE.
        """
        host, _, port = listen.rpartition(":")
        self._runner = web.AppRunner(self._app, access_log=None, shutdown_timeout=_STOP_S)
        await self._runner.setup()
        try:
            site = web.TCPSite(self._runner, host.strip("[]"), int(port))
            await site.start()
        except OSError as error:
            await self.close()
            raise FailedPrecondition(
                f"cannot listen on {listen}: {error.strerror or error}",
                reason="ADDRESS_UNUSABLE",
                help="set auditor.http_listen to another address, or to port 0 for any free one",
                listen=listen,
            ) from None
        self.url = f"http://{host}:{self._runner.addresses[0][1]}"

    async def close(self) -> None:
        """Take no more requests, end those in hand."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _checkpoint(self, _: web.Request) -> web.Response:
        note = await asyncio.to_thread(self._tiles.published)
        if note is None:
            raise web.HTTPNotFound(text="the log has no checkpoint yet\n")
        return web.Response(body=note, content_type=_TEXT, charset="utf-8", headers=_FRESH)

    async def _tile(self, request: web.Request) -> web.Response:
        path = request.match_info["path"]
        try:
            data = await asyncio.to_thread(self._tiles.tile, path)
        except Malformed as error:
            raise web.HTTPNotFound(text=f"{error}\n") from None
        except IndexError:
            raise web.HTTPNotFound(text="the log does not reach so far\n") from None
        return web.Response(body=data, content_type=_BYTES, headers=_IMMUTABLE)

    async def _verdict(self, request: web.Request) -> web.Response:
        try:
            digest = bytes.fromhex(request.match_info["digest"])
        except ValueError:
            digest = b""
        audit = await asyncio.to_thread(self._ledger.audit_of, digest) if len(digest) == DIGEST_BYTES else None
        if audit is None or audit.verdict is None:
            raise web.HTTPNotFound(text="no verdict on a receipt of this SHA-256\n")
        return web.Response(body=audit.verdict, content_type="application/cose", headers=_IMMUTABLE)

    async def _known_keys(self, _: web.Request) -> web.Response:
        verdicts = key_id_text(self._keys.verdicts.public_key())
        lines = (self._keys.log_key.encode(), self._keys.witness_key.encode(), verdicts)
        return web.Response(text="".join(f"{line}\n" for line in lines), headers=_FRESH)


@web.middleware
async def _typed(request: web.Request, handler: Handler) -> web.StreamResponse:
    """What fails here is said in the log, and to the peer only that it failed."""
    try:
        return await handler(request)
    except (CountersignError, LogFolderError):
        _log.exception("a request for the log failed", extra={"path": request.path})
        raise web.HTTPServiceUnavailable(text="the log cannot be read now\n") from None
