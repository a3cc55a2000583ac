"""Short HTTP requests to peers: bounded in time and size, no redirects, no proxy. Blocking, so called in a thread."""

from __future__ import annotations

import http.client
from dataclasses import dataclass
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

from countersign.services.runtime.errors import Unavailable

TIMEOUT_S = 5.0
MAX_BYTES = 32 * 1024 * 1024
"""A bundle of 256 entries of 64 KiB, and something over."""


@dataclass(frozen=True, slots=True)
class Reply:
    """``status`` of HTTP, and the body."""

    status: int
    body: bytes


class _NoRedirect(HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        """A peer answers itself."""


_OPENER = build_opener(ProxyHandler({}), _NoRedirect)


def ask(url: str, body: bytes | None = None, *, most: int = MAX_BYTES) -> Reply:
    """GET, or POST where there is a body.

    Raises:
        Unavailable: reason PEER_UNREACHABLE: no answer in 5 s, or one of more than ``most`` bytes.
    """
    try:
        with _OPENER.open(Request(url, data=body), timeout=TIMEOUT_S) as response:  # noqa: S310  the configuration allows http(s) only
            reply = Reply(response.status, response.read(most + 1))
    except HTTPError as error:
        with error:
            reply = Reply(error.code, error.read(most + 1))
    except (URLError, OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise Unavailable(f"{url} does not answer: {reason}", reason="PEER_UNREACHABLE", url=url) from None
    if len(reply.body) > most:
        raise Unavailable(f"{url} answers more than {most} bytes", reason="PEER_UNREACHABLE", url=url)
    return reply
