"""Listen, refuse what must not pass, and pass the rest on, byte for byte and at once."""

import asyncio
import base64
import ipaddress
import os
import socket
import time
import unicodedata
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any
from urllib.parse import unquote_to_bytes

import anyio
import httpx
import uvicorn
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from specdec.proxy.recorder import Exchange, Headers, Recorder, Say
from specdec.proxy.records import ProxyConfig, RecordFiles, parse_size
from specdec.proxy.redaction import long_enough, redact

_CHECK_TIMEOUT_S, _CHECK_EVERY_S = 2.0, 5.0
# RFC 9110, section 7.6.1, with "proxy-connection", which clients still send.
_HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer "
    b"transfer-encoding upgrade".split()
)
_READABLE = (b"gzip", b"x-gzip", b"deflate", b"identity")


def end_to_end(headers: Headers) -> Headers:
    """Return headers without those of this hop, names in lower case, order and repetitions kept."""
    lower = [(name.lower(), value) for name, value in headers]
    named = b",".join(value for name, value in lower if name == b"connection")
    dropped = _HOP_BY_HOP | {option.strip().lower() for option in named.split(b",")}
    if any(name == b"transfer-encoding" for name, _ in lower):
        dropped |= {b"content-length"}  # only one of them can be true
    return [(name, value) for name, value in lower if name not in dropped]


def _readable(accepted: bytes) -> bytes:
    """Choose those codings of an answer that the recorder can undo."""
    items = [item.strip() for item in accepted.split(b",")]
    kept = [item for item in items if item.split(b";")[0].strip().lower() in _READABLE]
    return b", ".join(kept) or b"identity"


def _refusal(status: int, message: str, code: str) -> JSONResponse:
    """Make an error of the proxy's own, in OpenAI's form."""
    error = {"message": message, "type": "proxy_error", "param": None, "code": code}
    return JSONResponse({"error": error}, status)


class Upstream:
    """An OpenAI-compatible server, reached without cookies, redirects or timeouts of its own."""

    def __init__(self, url: str, connect_timeout_s: float, login: str = "") -> None:
        base = _parsed(url)
        self.url = redact(str(base), [])
        self._origin = base.copy_with(raw_path=b"/")
        self._prefix = base.raw_path.rstrip(b"/")
        basic = f"Basic {base64.b64encode(login.encode()).decode()}"
        self._login = basic if ":" in login else f"Bearer {login}" if login else ""
        self.secrets = long_enough([login, login.partition(":")[2], self._login.partition(" ")[2]])
        # No limit for reading: long answers take long.
        self._timeout = {"connect": connect_timeout_s, "read": None, "write": None, "pool": None}
        self._transport = httpx.AsyncHTTPTransport(
            verify=httpx.create_ssl_context() if base.scheme == "https" else False,
            # Servers close a quiet connection after 5 s or more, which would fail a request.
            limits=httpx.Limits(max_connections=None, keepalive_expiry=2),
        )
        self._health, self._checked = dict[str, Any](), -_CHECK_EVERY_S
        self._checking = asyncio.Lock()

    async def send(
        self, method: str, target: bytes, headers: Headers, body: AsyncIterator[bytes] | None
    ) -> httpx.Response:
        """Send a request; the answer's body is read by the caller, who closes the answer."""
        # `/v1` at the seam of the URL's path and the request's is said only once.
        if self._prefix.endswith(b"/v1") and (target + b"/").startswith(b"/v1/"):
            target = target.removeprefix(b"/v1")
        return await self._send(method, self._prefix + target, headers, body, self._timeout)

    async def health(self) -> dict[str, Any]:
        """Tell if the server can be reached, and the status of its `/health`; not asked often."""
        async with self._checking:
            if time.monotonic() - self._checked < _CHECK_EVERY_S:
                return self._health
            found: dict[str, Any] = {"url": self.url, "reachable": True, "health_status": None}
            timeout = dict.fromkeys(self._timeout, _CHECK_TIMEOUT_S)
            target = self._prefix.removesuffix(b"/v1") + b"/health"
            try:
                response = await self._send("GET", target, [], None, timeout)
                await response.aclose()
                found["health_status"] = response.status_code
            except httpx.TransportError as error:
                # One that takes the connection and says nothing is only busy.
                if not isinstance(error, httpx.ReadTimeout | httpx.PoolTimeout):
                    found |= {"reachable": False, "error": _reason(error)}
            self._health, self._checked = found, time.monotonic()
            return found

    async def close(self) -> None:
        await self._transport.aclose()

    async def _send(
        self, method: str, target: bytes, headers: Headers, body: Any, timeout: dict[str, Any]
    ) -> httpx.Response:
        kept = [(name, value) for name, value in headers if name not in (b"host", b"expect")]
        if self._login and not any(name == b"authorization" for name, _ in kept):
            kept.append((b"authorization", self._login.encode()))
        # Bytes that a URL would tidy up ("%2F", "..", "//") reach the server as they are.
        given = {"timeout": timeout, "target": target}
        request = httpx.Request(method, self._origin, headers=kept, content=body, extensions=given)
        return await self._transport.handle_async_request(request)


def _reason(error: httpx.TransportError) -> str:
    """Name the fault between proxy and server, without headers that an error may quote."""
    name, text = type(error).__name__, str(error)
    return name if isinstance(error, httpx.ProtocolError) or not text else f"{name}: {text}"


def _parsed(url: str) -> httpx.URL:
    if "@" in url:
        raise ValueError(
            "--upstream holds a login, which every user of this machine could read in its list of "
            "processes; put it in an environment variable and give --upstream-key-env NAME"
        )
    with suppress(httpx.InvalidURL):
        parsed = httpx.URL(url)
        if parsed.scheme in ("http", "https") and parsed.host and not parsed.query:
            return parsed
    shown = repr(redact(url, []))
    raise ValueError(f"--upstream {shown} is no address of a server; give http://HOST:PORT")


class Application(Router):
    """The proxy as an ASGI application: `/health`, and every other path passed on.

    A part of an answer goes to the client as soon as it comes. Only the part that ends an answer
    waits for its record: what a client knows to be finished is on the disk.
    """

    def __init__(
        self, upstream: Upstream, recorder: Recorder, say: Say, hosts: frozenset[str] | None = None
    ) -> None:
        self._running = 0  # requests that are being served
        self._upstream, self._recorder, self._say, self._hosts = upstream, recorder, say, hosts
        if recorder.observer:
            recorder.observer.running.set_function(lambda: self._running)
        health = Route("/health", self._health, methods=["GET"])
        super().__init__([health], False, self._pass_on, lifespan=self._lifespan)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = refused(scope, self._hosts) if scope["type"] == "http" else None
        await (refusal or super().__call__)(scope, receive, send)

    async def _health(self, request: Request) -> JSONResponse:
        server, recorder = await self._upstream.health(), self._recorder
        status = "not recording" if recorder.trouble else "ok"
        state = {
            "status": status if server["reachable"] else "upstream unreachable",
            "upstream": server,
            "recording": not recorder.trouble,
            "why_not": recorder.trouble or None,
            "recorded": recorder.recorded,
            "skipped": dict(recorder.skipped),
            "bytes": recorder.files.total_bytes,
            "file": recorder.files.path.name,
            "running": self._running,
            "held_bytes": recorder.held_bytes,
            "last_error": recorder.last_error or None,
        }
        return JSONResponse(state, 200 if server["reachable"] else 503)

    @asynccontextmanager
    async def _lifespan(self, _: object) -> AsyncIterator[None]:
        yield
        # Requests that the server has just cancelled still hand in what they have.
        with anyio.move_on_after(5):
            while self._running:
                await anyio.sleep(0.01)
        await self._recorder.close()
        await self._upstream.close()
        recorded, skipped = self._recorder.recorded, self._recorder.skipped
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common())
        self._say(f"recorded {recorded} requests, left out: {reasons or 'none'}")

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, until its answer has ended or the client has left."""
        path, query = scope["raw_path"].decode("latin-1"), scope["query_string"]
        exchange = self._recorder.begin(scope["method"], path, scope["headers"], query)
        request, was_read = Request(scope, receive), anyio.Event()

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
        self._running += 1
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(cancel_when_gone, group.cancel_scope)
                await self._forward(request, body() if has_body else None, send, exchange)
                group.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                await self._recorder.keep(exchange)
            self._running -= 1

    async def _forward(
        self, request: Request, body: AsyncIterator[bytes] | None, send: Send, exchange: Exchange
    ) -> None:
        scope, url = request.scope, self._upstream.url
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
            self._say(f"no answer from {url}: {_reason(error)}")
            text = f"the upstream server gave no answer ({_reason(error)})"
            await _refusal(502, text, "upstream_unreachable")(scope, request.receive, send)
            return
        try:
            await self._relay(response, send, exchange)
        except httpx.TransportError as error:
            # Returning with the answer unfinished makes our server break off as the upstream did.
            self._say(f"{url} broke off an answer: {_reason(error)}")
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


def refused(scope: Scope, hosts: frozenset[str] | None) -> JSONResponse | None:
    """Answer a request that must not pass; None for any other."""
    method = scope["method"]
    if method in ("CONNECT", "TRACE"):
        return _refusal(405, f"{method} is not passed on", "method_not_allowed")
    given = [value.decode("latin-1").lower() for name, value in scope["headers"] if name == b"host"]
    if hosts is not None and (len(given) != 1 or given[0] not in hosts):
        # A web page whose name was made to lead to this machine sends its own name.
        text = f"this proxy answers to the hosts {', '.join(sorted(hosts))} alone"
        return _refusal(421, text, "wrong_host")
    if _leaves_root(scope["raw_path"]):
        text = "the path must begin with /, without //, dot segments or \\"
        return _refusal(400, text, "bad_path")
    return None


def hosts_of(host: str, port: int) -> frozenset[str] | None:
    """List what clients of a loopback address write into the header Host; None for another one."""
    is_loopback = host == "localhost"
    with suppress(ValueError):
        is_loopback = ipaddress.ip_address(host).is_loopback
    if not is_loopback:
        return None
    names = {"localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host.lower()}
    return frozenset({f"{name}:{port}" for name in names} | (names if port == 80 else set()))


def _leaves_root(path: bytes) -> bool:
    """Tell a path that a server, which decodes it however often, could read as outside its root."""
    if not path.startswith(b"/"):
        return True
    for _ in range(4):
        path = unquote_to_bytes(path)
    try:
        text = unicodedata.normalize("NFKC", path.decode()).replace("\\", "/")
    except UnicodeDecodeError:
        return True
    parts = [part.split(";")[0].strip() for part in text.split("/")[1:]]
    is_odd = {".", ".."} & {*parts} or "" in parts[:-1] or b"%" in path
    return bool(is_odd) or not text.isprintable()


def serve(config: ProxyConfig, say: Say) -> None:
    """Serve until SIGTERM or Ctrl-C; then answers that run may end within the time to drain."""
    login = os.environ.get(config.upstream_key_env or "", "").strip()
    if config.upstream_key_env and not login:
        fix = "export the server's key under a name and give that name"
        raise ValueError(f"the variable that --upstream-key-env names is empty or not set; {fix}")
    host, out = config.host, config.out
    upstream = Upstream(config.upstream, config.connect_timeout, login)
    files = RecordFiles(out, parse_size(config.max_file), parse_size(config.max_total))
    recorder = Recorder(config, files, upstream.secrets, say)
    with listen(host, config.port) as listener, suppress(KeyboardInterrupt):  # said by uvicorn
        port = listener.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        say(f"recording http://{shown}:{port} -> {upstream.url} into {out}")
        if out.stat().st_mode & 0o077:
            say(f"others may look into {out}; close it with: chmod 700")
        hosts = hosts_of(host, port)
        if hosts is None:
            say(f"{host} is no loopback address: whoever reaches it can use the upstream server")
        server = uvicorn.Config(
            Application(upstream, recorder, say, hosts),
            http="h11",  # it bounds the size of a request's head
            timeout_graceful_shutdown=config.drain,
            # The answers' headers are the upstream's own.
            server_header=False,
            date_header=False,
            proxy_headers=False,
            access_log=False,
            # Longer than clients keep a quiet connection, so that they never use a closed one.
            timeout_keep_alive=75,
            log_level="warning",
            ws="none",
            lifespan="on",
        )
        uvicorn.Server(server).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """Open a socket whose connections send every piece at once.

    asyncio sees to that only for sockets that it opens itself; the kernel may keep pieces back.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=2048)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections inherit it
    return listener
