"""The server that the proxy stands in front of."""

import asyncio
import base64
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx

from specdec.proxy.headers import Headers
from specdec.proxy.redaction import long_enough, redact

_CHECK_TIMEOUT_S = 2.0
_CHECK_EVERY_S = 5.0
# Servers close a quiet connection after 5 s or more; one that is closed just as a request is sent
# would fail it, and a request cannot be sent twice.
_KEEPALIVE_S = 2.0


class Upstream:
    """An OpenAI-compatible server, reached without cookies, redirects or timeouts of its own.

    Args:
        url: of the server's root; a path is put before every request's path.
        connect_timeout_s: longest wait for a connection; reading has no limit, as long answers
            take long.
        transport: what a test puts in the network's place.
        login: a key, or `user:password`, that is sent where the client sends no authorization.

    Attributes:
        url: as it may be shown.
        secrets: what no record may hold of the login.

    Raises:
        ValueError: no URL of a server, or one with a login in it.
    """

    def __init__(
        self,
        url: str,
        connect_timeout_s: float,
        transport: httpx.AsyncBaseTransport | None = None,
        login: str = "",
    ) -> None:
        base = _parsed(url)
        self.url = redact(str(base), [])
        self._origin = base.copy_with(raw_path=b"/")
        self._prefix = base.raw_path.rstrip(b"/")
        self._login = _authorization(login)
        self.secrets = long_enough([login, login.partition(":")[2], self._login.partition(" ")[2]])
        self._connect_timeout_s = connect_timeout_s
        self._transport = transport or httpx.AsyncHTTPTransport(
            verify=httpx.create_ssl_context() if base.scheme == "https" else False,
            limits=httpx.Limits(max_connections=None, keepalive_expiry=_KEEPALIVE_S),
        )
        self._health: dict[str, Any] = {}
        self._checked = -_CHECK_EVERY_S
        self._checking = asyncio.Lock()

    async def send(
        self, method: str, target: bytes, headers: Headers, body: AsyncIterator[bytes] | None
    ) -> httpx.Response:
        """Send a request; the answer's body is read by the caller, who closes the answer.

        Args:
            method: of the request.
            target: path and query as they stand in the request's first line.
            headers: that belong to the request from end to end.
            body: its bytes as they come, or None for a request without.

        Raises:
            httpx.TransportError: there is no answer.
        """
        timeout = {"connect": self._connect_timeout_s, "read": None, "write": None, "pool": None}
        request = httpx.Request(
            method,
            self._origin,
            headers=self._addressed(headers),
            content=body,
            # Bytes that a URL would tidy up ("%2F", "..", "//") reach the server as they are.
            extensions={"timeout": timeout, "target": self._target(target)},
        )
        return await self._transport.handle_async_request(request)

    async def health(self) -> dict[str, Any]:
        """Whether the server can be reached and what its own `/health` says; not asked often."""
        async with self._checking:
            if time.monotonic() - self._checked >= _CHECK_EVERY_S:
                self._health = await self._check()
                self._checked = time.monotonic()
        return {"url": self.url, **self._health}

    async def close(self) -> None:
        """Close all connections."""
        await self._transport.aclose()

    async def _check(self) -> dict[str, Any]:
        timeout = dict.fromkeys(("connect", "read", "write", "pool"), _CHECK_TIMEOUT_S)
        target = self._prefix.removesuffix(b"/v1") + b"/health"
        extensions = {"timeout": timeout, "target": target}
        headers = self._addressed([])
        request = httpx.Request("GET", self._origin, headers=headers, extensions=extensions)
        try:
            response = await self._transport.handle_async_request(request)
        except (httpx.ReadTimeout, httpx.PoolTimeout):
            return {"reachable": True, "health_status": None}  # it took the connection, but is busy
        except httpx.TransportError as error:
            return {"reachable": False, "health_status": None, "error": reason(error)}
        await response.aclose()
        return {"reachable": True, "health_status": response.status_code}

    def _target(self, target: bytes) -> bytes:
        """The request's target behind the URL's path; `/v1` at their seam is said only once."""
        if self._prefix.endswith(b"/v1") and (target + b"/").startswith(b"/v1/"):
            target = target.removeprefix(b"/v1")
        return self._prefix + target

    def _addressed(self, headers: Headers) -> Headers:
        kept = [(name, value) for name, value in headers if name not in (b"host", b"expect")]
        if self._login and not any(name == b"authorization" for name, _ in kept):
            kept.append((b"authorization", self._login.encode()))
        return kept


def reason(error: httpx.TransportError) -> str:
    """The fault between the proxy and the server, without headers that an error may quote."""
    if isinstance(error, httpx.ProtocolError):
        return type(error).__name__
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _authorization(login: str) -> str:
    if not login.isprintable() or not login.isascii():
        raise ValueError("the login of --upstream-key-env must be printable ASCII on one line")
    if ":" in login:
        return "Basic " + base64.b64encode(login.encode()).decode()
    return f"Bearer {login}" if login else ""


def _parsed(url: str) -> httpx.URL:
    if "@" in url:
        raise ValueError(
            "--upstream holds a login, which every user of this machine could read in the list of "
            "processes; put it in an environment variable and give --upstream-key-env NAME"
        )
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"--upstream is no URL ({error}); give http://HOST:PORT") from error
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query:
        raise ValueError(
            f"--upstream {redact(url, [])!r} is no address of a server; give http://HOST:PORT, "
            "with a path if the server has one"
        )
    return parsed
