"""Serves a process's metrics over HTTP: /metrics for Prometheus, /targets to tell it where all processes serve theirs.

It has threads of its own, so that a scrape takes its turns beside the event loop and never stops it. Nothing is wired
where ``telemetry.metrics`` is false: instruments then count nothing, and prometheus_client is not even imported.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterable
from socketserver import TCPServer, ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from countersign import __version__
from countersign.services.runtime.addresses import announced, split
from countersign.services.runtime.config import Config
from countersign.services.runtime.errors import FailedPrecondition
from countersign.services.runtime.telemetry import metrics
from countersign.services.runtime.telemetry.instruments import Meter
from countersign.v1.registry_pb2 import Instance, TargetRole

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

ROUTER = "router"
# Calls at once; more wait in the system's queue.
MOST_CALLS = 8
# A peer that says nothing for so long is let go.
PATIENCE_S = 5.0
# How often it is seen, while all places are taken, that nothing more is to be answered.
_POLL_S = 0.1

Discover = Callable[[], Iterable[Instance]]


def nobody() -> list[Instance]:
    """Before the registry is there."""
    return []


class Served:
    """What serves, and where (empty: nowhere). ``discover`` gives the live instances, from any thread."""

    def __init__(self, server: _Server | None = None, address: str = "") -> None:
        self.address = address
        self.discover: Discover = nobody
        self._server = server
        self._thread: threading.Thread | None = None

    def open(self, scrape: WSGIApplication) -> None:
        """Answer calls; ``scrape`` those for /metrics."""
        if self._server is not None:
            self._server.set_app(_paths(scrape, self))
            self._thread = threading.Thread(target=self._server.answer, name="metrics", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop listening. Calls in hand end with the process."""
        if self._server is not None and self._thread is not None:
            self._server.end()
            self._thread.join()
            self._server.server_close()
            self._server = None


def start(config: Config, *, service: str, instance: str) -> Served:
    """Serve the metrics of this process, if that is wanted, and count them from now on.

    Raises:
        FailedPrecondition: reason ADDRESS_UNUSABLE.
    """
    if not config.telemetry.metrics:
        return Served()
    from prometheus_client.exposition import make_wsgi_app

    key, listen = "telemetry.metrics_listen", config.telemetry.metrics_listen
    if service == ROUTER:
        key, listen = "router.metrics_listen", config.router.metrics_listen
    server = _listening(key, listen)
    served = Served(server, announced(listen, server.server_port))
    served.open(make_wsgi_app(_count(config.telemetry.service_namespace, service, instance)))
    return served


def targets(instances: Iterable[Instance]) -> list[dict[str, object]]:
    """Prometheus's http_sd: one group for each instance that serves metrics."""
    return [
        {
            "targets": [each.metrics_address],
            "labels": {"service": each.service, "instance": each.instance, "role": _role(each)},
        }
        for each in instances
        if each.metrics_address
    ]


def _role(instance: Instance) -> str:
    """Of a target; other services have none."""
    name: str = TargetRole.Name(instance.role)
    return name.removeprefix("TARGET_ROLE_").lower() if instance.role else ""


def _count(namespace: str, service: str, instance: str) -> Any:
    """From now on what is recorded is counted; the registry that tells it."""
    from prometheus_client import CollectorRegistry, ProcessCollector
    from prometheus_client.core import InfoMetricFamily

    from countersign.services.runtime.telemetry.exposition import Constant, Families

    who = {
        "service.name": service,
        "service.namespace": namespace,
        "service.instance.id": instance,
        "service.version": __version__,
    }
    meter = Meter()
    metrics.start(meter)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Families(meter))
    ProcessCollector(registry=registry)
    info = InfoMetricFamily("target", "who this is", {key.replace(".", "_"): value for key, value in who.items()})
    registry.register(Constant([info]))
    return registry


def _paths(scrape: WSGIApplication, served: Served) -> WSGIApplication:
    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path, read = environ.get("PATH_INFO"), environ.get("REQUEST_METHOD") == "GET"
        if path == "/metrics":
            return scrape(environ, start_response)
        if path == "/targets" and read:
            start_response("200 OK", [("Content-Type", "application/json")])
            return [json.dumps(targets(served.discover())).encode()]
        start_response("404 Not Found", [("Content-Type", "text/plain; charset=utf-8")])
        return [b"there are /metrics and /targets\n"]

    return answer


def _listening(key: str, listen: str) -> _Server:
    host, port = split(listen)
    try:
        return _Server(host, port)
    except (OSError, OverflowError) as error:
        raise FailedPrecondition(
            f"cannot listen on {listen}: {getattr(error, 'strerror', None) or error}",
            reason="ADDRESS_UNUSABLE",
            help=f"set {key} to another address, or to port 0 for any free one; telemetry.metrics=false serves none",
            listen=listen,
        ) from None


class _Server(ThreadingMixIn, WSGIServer):
    """A thread a call, ``MOST_CALLS`` at most; each call is one exchange."""

    daemon_threads = True
    request_queue_size = 64
    closing = False

    def __init__(self, host: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._free = threading.BoundedSemaphore(MOST_CALLS)
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        """As WSGIServer, but for the look-up of this host's name, which may take seconds."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.socket.getsockname()[:2]
        self.setup_environ()

    def answer(self) -> None:
        """Until :meth:`end`. It sleeps while nobody calls; ``serve_forever`` would look ten times a second."""
        while not self.closing:
            self.handle_request()

    def end(self) -> None:
        """Take no more calls."""
        self.closing = True
        self.socket.shutdown(socket.SHUT_RDWR)  # which wakes who waits for one

    def process_request(self, request: Any, client_address: Any) -> None:
        while not self._free.acquire(timeout=_POLL_S):
            if self.closing:  # no place gets free as long as silent peers hold them
                self.shutdown_request(request)
                return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A peer that went away, or fell silent."""


class _Handler(WSGIRequestHandler):
    def setup(self) -> None:
        super().setup()
        self.connection.settimeout(PATIENCE_S)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the library's word
        """A scrape is no news."""
