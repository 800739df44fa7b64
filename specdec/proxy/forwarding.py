"""Pass requests on to the upstream server, and its answers back, byte for byte and at once."""

import asyncio
import base64
import time
from collections.abc import AsyncIterator
from typing import Any

import anyio
import httpx
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from specdec.proxy.recorder import Exchange, Headers, Recorder, Say
from specdec.proxy.redaction import long_enough, redact

_CHECK_TIMEOUT_S = 2.0
_CHECK_EVERY_S = 5.0
# Servers close a quiet connection after 5 s or more; one that is closed just as a request is sent
# would fail it, and a request cannot be sent twice.
_KEEPALIVE_S = 2.0
# RFC 9110, section 7.6.1, with "proxy-connection", which clients still send.
_HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer "
    b"transfer-encoding upgrade".split()
)
_READABLE = (b"gzip", b"x-gzip", b"deflate", b"identity")


def end_to_end(headers: Headers) -> Headers:
    """Headers without those of this hop, names in lower case, order and repetitions kept.

    A length beside a transfer coding is dropped too: only one of them can be true.
    """
    lower = [(name.lower(), value) for name, value in headers]
    dropped = set(_HOP_BY_HOP)
    for name, value in lower:
        if name == b"connection":
            dropped.update(option.strip().lower() for option in value.split(b","))
        elif name == b"transfer-encoding":
            dropped.add(b"content-length")
    return [(name, value) for name, value in lower if name not in dropped]


def _readable(accepted: bytes) -> bytes:
    """Those codings of an answer that the recorder can undo."""
    items = [item.strip() for item in accepted.split(b",")]
    kept = [item for item in items if item.split(b";")[0].strip().lower() in _READABLE]
    return b", ".join(kept) or b"identity"


def refusal(status: int, message: str, code: str) -> JSONResponse:
    """An error of the proxy's own, in OpenAI's form."""
    error = {"message": message, "type": "proxy_error", "param": None, "code": code}
    return JSONResponse({"error": error}, status)


class Upstream:
    """An OpenAI-compatible server, reached without cookies, redirects or timeouts of its own."""

    def __init__(self, url: str, connect_timeout_s: float, login: str = "") -> None:
        base = _parsed(url)
        self.url = redact(str(base), [])
        self._origin = base.copy_with(raw_path=b"/")
        self._prefix = base.raw_path.rstrip(b"/")
        self._login = _authorization(login)
        self.secrets = long_enough([login, login.partition(":")[2], self._login.partition(" ")[2]])
        self._connect_timeout_s = connect_timeout_s
        self._transport = httpx.AsyncHTTPTransport(
            verify=httpx.create_ssl_context() if base.scheme == "https" else False,
            limits=httpx.Limits(max_connections=None, keepalive_expiry=_KEEPALIVE_S),
        )
        self._health: dict[str, Any] = {}
        self._checked = -_CHECK_EVERY_S
        self._checking = asyncio.Lock()

    async def send(
        self, method: str, target: bytes, headers: Headers, body: AsyncIterator[bytes] | None
    ) -> httpx.Response:
        """Send a request; the answer's body is read by the caller, who closes the answer."""
        # `/v1` at the seam of the URL's path and the request's is said only once.
        if self._prefix.endswith(b"/v1") and (target + b"/").startswith(b"/v1/"):
            target = target.removeprefix(b"/v1")
        # No limit for reading: long answers take long.
        timeout = {"connect": self._connect_timeout_s, "read": None, "write": None, "pool": None}
        return await self._send(method, self._prefix + target, headers, body, timeout)

    async def health(self) -> dict[str, Any]:
        """Tell if the server can be reached, and the status of its `/health`; not asked often."""
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
        try:
            response = await self._send("GET", target, [], None, timeout)
        except (httpx.ReadTimeout, httpx.PoolTimeout):
            return {"reachable": True, "health_status": None}  # it took the connection, but is busy
        except httpx.TransportError as error:
            return {"reachable": False, "health_status": None, "error": _reason(error)}
        await response.aclose()
        return {"reachable": True, "health_status": response.status_code}

    async def _send(
        self,
        method: str,
        target: bytes,
        headers: Headers,
        body: AsyncIterator[bytes] | None,
        timeout: dict[str, Any],
    ) -> httpx.Response:
        kept = [(name, value) for name, value in headers if name not in (b"host", b"expect")]
        if self._login and not any(name == b"authorization" for name, _ in kept):
            kept.append((b"authorization", self._login.encode()))
        # Bytes that a URL would tidy up ("%2F", "..", "//") reach the server as they are.
        extensions = {"timeout": timeout, "target": target}
        request = httpx.Request(
            method, self._origin, headers=kept, content=body, extensions=extensions
        )
        return await self._transport.handle_async_request(request)


def _reason(error: httpx.TransportError) -> str:
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


class Forwarder:
    """An ASGI application for every path.

    A part of an answer goes to the client as soon as it comes. Only the part that ends an answer
    waits for its record: what a client knows to be finished is on the disk.

    Attributes:
        running: number of requests that are being served.
    """

    def __init__(self, upstream: Upstream, recorder: Recorder, say: Say) -> None:
        self.running = 0
        self._upstream = upstream
        self._recorder = recorder
        self._say = say

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        path = scope["raw_path"].decode("latin-1")
        exchange = self._recorder.begin(
            scope["method"], path, scope["headers"], scope["query_string"]
        )
        self.running += 1
        try:
            await self._serve(Request(scope, receive), receive, send, exchange)
        finally:
            with anyio.CancelScope(shield=True):
                await self._recorder.keep(exchange)
            self.running -= 1

    async def _serve(
        self, request: Request, receive: Receive, send: Send, exchange: Exchange
    ) -> None:
        """Pass the request on, until the answer has ended or the client has left."""
        was_read = anyio.Event()

        async def body() -> AsyncIterator[bytes]:
            async for piece in request.stream():
                if piece:
                    exchange.add_request(piece)
                    yield piece
            was_read.set()

        async def cancel_when_gone(running: anyio.CancelScope) -> None:
            await was_read.wait()
            while (await receive())["type"] != "http.disconnect":
                pass
            running.cancel()

        has_body = not {"content-length", "transfer-encoding"}.isdisjoint(request.headers)
        if not has_body:
            was_read.set()
        async with anyio.create_task_group() as group:
            group.start_soon(cancel_when_gone, group.cancel_scope)
            await self._forward(request, body() if has_body else None, send, exchange)
            group.cancel_scope.cancel()

    async def _forward(
        self, request: Request, body: AsyncIterator[bytes] | None, send: Send, exchange: Exchange
    ) -> None:
        scope = request.scope
        headers = end_to_end(scope["headers"])
        if exchange.is_open:
            headers = [(k, _readable(v) if k == b"accept-encoding" else v) for k, v in headers]
        query = scope["query_string"]
        target = scope["raw_path"] + (b"?" + query if query else b"")
        try:
            response = await self._upstream.send(request.method, target, headers, body)
        except ClientDisconnect:
            exchange.skip("client left before it had asked")
            return
        except httpx.TransportError as error:
            exchange.skip("no answer from upstream")
            self._say(f"no answer from {self._upstream.url}: {_reason(error)}")
            text = f"the upstream server gave no answer ({_reason(error)})"
            await refusal(502, text, "upstream_unreachable")(scope, request.receive, send)
            return
        try:
            await self._relay(response, send, exchange)
        except httpx.TransportError as error:
            # Returning with the answer unfinished makes our server break off as the upstream did.
            self._say(f"{self._upstream.url} broke off an answer: {_reason(error)}")
        finally:
            with anyio.CancelScope(shield=True):
                await response.aclose()

    async def _relay(self, response: httpx.Response, send: Send, exchange: Exchange) -> None:
        headers, status = end_to_end(response.headers.raw), response.status_code
        exchange.start_answer(status, response.headers)
        if exchange.has_answer:  # its head says that its body is empty
            await self._recorder.keep(exchange)
        await send({"type": "http.response.start", "status": status, "headers": headers})
        async for piece in response.aiter_raw():
            exchange.add_answer(piece)
            if exchange.has_answer:
                await self._recorder.keep(exchange)
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        exchange.ended = True
        await self._recorder.keep(exchange)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
