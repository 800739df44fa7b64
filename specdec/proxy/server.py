"""Listens, serves, and comes to an orderly end."""

import asyncio
import base64
import ipaddress
import socket
import time
import unicodedata
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any
from urllib.parse import unquote_to_bytes

import anyio
import httpx
import uvicorn
from anyio import CancelScope, Event
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from specdec.proxy.exchange import Exchange, Headers, Settings, Skip, end_to_end, readable_codings
from specdec.proxy.recorder import Recorder, RecordFiles
from specdec.proxy.redaction import long_enough, redact


class ClientGoneError(Exception):
    """The client left before it had sent its request."""


class Client:
    """Reads the request once, from start to end, and notices when the client leaves."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._was_read = Event()

    async def body(self) -> AsyncIterator[bytes]:
        """The request's body as it comes.

        Raises:
            ClientGoneError: it does not come to its end.
        """
        has_more = True
        while has_more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            has_more = message.get("more_body", False)
            if message.get("body"):
                yield message["body"]
        self._was_read.set()

    async def cancel_when_gone(self, scope: CancelScope, has_body: bool) -> None:
        """Wait until the client has left, and cancel what is done for it."""
        if has_body:
            await self._was_read.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass
        scope.cancel()

    async def start(self, status: int, headers: Headers) -> None:
        """Send the answer's head."""
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def pass_on(self, piece: bytes) -> None:
        """Send a part of the answer's body."""
        await self._send({"type": "http.response.body", "body": piece, "more_body": True})

    async def end(self) -> None:
        """Send the regular end of the answer."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def refuse(self, status: int, message: str, code: str) -> None:
        """Answer with an error of the proxy's own, in OpenAI's form."""
        error = {"message": message, "type": "proxy_error", "param": None, "code": code}
        await JSONResponse({"error": error}, status)(self._scope, self._receive, self._send)


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


class Forwarder:
    """An ASGI application for every path.

    A part of an answer goes to the client as soon as it comes. Only the part that ends an answer
    waits for its record: what a client knows to be finished is on the disk.

    Attributes:
        running: requests that are being served.
    """

    def __init__(self, upstream: Upstream, recorder: Recorder, say: Callable[[str], None]) -> None:
        self.running = 0
        self._upstream = upstream
        self._recorder = recorder
        self._say = say

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        client = Client(scope, receive, send)
        path = scope["raw_path"].decode("latin-1")
        query = scope["query_string"]
        exchange = self._recorder.begin(scope["method"], path, scope["headers"], query)
        names = {name.lower() for name, _ in scope["headers"]}
        has_body = bool(names & {b"content-length", b"transfer-encoding"})
        self.running += 1
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(client.cancel_when_gone, group.cancel_scope, has_body)
                await self._serve(scope, client, exchange, has_body)
                group.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                await self._recorder.keep(exchange)
            self.running -= 1

    async def _serve(
        self, scope: Scope, client: Client, exchange: Exchange, has_body: bool
    ) -> None:
        headers = end_to_end(scope["headers"])
        if exchange.is_open:
            headers = readable_codings(headers)
        query = scope["query_string"]
        target = scope["raw_path"] + (b"?" + query if query else b"")
        body = _copied(client, exchange) if has_body else None
        try:
            response = await self._upstream.send(scope["method"], target, headers, body)
        except ClientGoneError:
            exchange.skip(Skip.NO_REQUEST)
            return
        except httpx.TransportError as error:
            exchange.skip(Skip.NO_ANSWER)
            self._say(f"no answer from {self._upstream.url}: {reason(error)}")
            text = f"the upstream server gave no answer ({reason(error)})"
            await client.refuse(502, text, "upstream_unreachable")
            return
        try:
            await self._relay(response, client, exchange)
        except httpx.TransportError as error:
            # Returning with the answer unfinished makes our server break off as the upstream did.
            self._say(f"{self._upstream.url} broke off an answer: {reason(error)}")
        finally:
            with anyio.CancelScope(shield=True):
                await response.aclose()

    async def _relay(self, response: httpx.Response, client: Client, exchange: Exchange) -> None:
        headers = end_to_end(response.headers.raw)
        exchange.start_answer(response.status_code, headers)
        if exchange.has_answer:  # its head says that its body is empty
            await self._recorder.keep(exchange)
        await client.start(response.status_code, headers)
        async for piece in response.aiter_raw():
            exchange.add_answer(piece)
            if exchange.has_answer:
                await self._recorder.keep(exchange)
            await client.pass_on(piece)
        exchange.ended = True
        await self._recorder.keep(exchange)
        await client.end()


async def _copied(client: Client, exchange: Exchange) -> AsyncIterator[bytes]:
    """The request's body, of which the exchange keeps a copy."""
    async for piece in client.body():
        exchange.add_request(piece)
        yield piece


_METHODS_OF_PROXIES = ("CONNECT", "TRACE")
_MAX_ENCODINGS = 4


class Guard:
    """An ASGI application before another one.

    Args:
        app: that gets what is not refused.
        hosts: values of the header Host that are answered; None for any.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal:
            await Client(scope, receive, send).refuse(*refusal)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> tuple[int, str, str] | None:
        if scope["method"] in _METHODS_OF_PROXIES:
            return 405, f"{scope['method']} is not passed on", "method_not_allowed"
        given = [
            value.decode("latin-1").lower() for name, value in scope["headers"] if name == b"host"
        ]
        if self._hosts is not None and (len(given) != 1 or given[0] not in self._hosts):
            # A web page whose name was made to lead to this machine sends its own name.
            known = ", ".join(sorted(self._hosts))
            return 421, f"this proxy answers to the hosts {known} alone", "wrong_host"
        if _leaves_root(scope["raw_path"]):
            return 400, "the path must begin with /, without //, dot segments or \\", "bad_path"
        return None


def hosts_of(host: str, port: int) -> frozenset[str]:
    """The values that clients of a loopback address write into the header Host."""
    names = {"localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host.lower()}
    return frozenset({f"{name}:{port}" for name in names} | (names if port == 80 else set()))


def _leaves_root(path: bytes) -> bool:
    """A server that decodes it, however often, could read the path as one outside of its root."""
    if not path.startswith(b"/"):
        return True
    for _ in range(_MAX_ENCODINGS):
        path = unquote_to_bytes(path)
    try:
        text = unicodedata.normalize("NFKC", path.decode()).replace("\\", "/")
    except UnicodeDecodeError:
        return True
    parts = [part.split(";")[0].strip() for part in text.split("/")[1:]]
    dots = any(part in (".", "..") for part in parts)
    return dots or "" in parts[:-1] or b"%" in path or not text.isprintable()


class Health:
    """Answers 200 while requests can be served, and 503 while the upstream cannot be reached."""

    def __init__(self, upstream: Upstream, recorder: Recorder, forwarder: Forwarder) -> None:
        self._upstream = upstream
        self._recorder = recorder
        self._forwarder = forwarder

    async def answer(self, request: Request) -> JSONResponse:
        """The state of serving and of recording."""
        upstream = await self._upstream.health()
        state = self._state(upstream)
        return JSONResponse(state, 200 if upstream["reachable"] else 503)

    def _state(self, upstream: dict[str, Any]) -> dict[str, Any]:
        recorder = self._recorder
        status = "not recording" if recorder.trouble else "ok"
        return {
            "status": status if upstream["reachable"] else "upstream unreachable",
            "upstream": upstream,
            "recording": not recorder.trouble,
            "why_not": recorder.trouble or None,
            "recorded": recorder.recorded,
            "skipped": dict(recorder.budget.skipped),
            "bytes": recorder.total_bytes,
            "file": recorder.file_name,
            "running": self._forwarder.running,
            "held_bytes": recorder.budget.held_bytes,
            "last_error": recorder.last_error or None,
        }


_LAST_RECORDS_S = 5.0


def build_application(
    upstream: Upstream,
    recorder: Recorder,
    say: Callable[[str], None],
    hosts: frozenset[str] | None = None,
) -> Guard:
    """`/health`, and every other path passed on; when it shuts down it closes what it was given.

    Args:
        upstream: the server behind the proxy.
        recorder: of what passes.
        say: takes what the operator has to know, a line at a time.
        hosts: values of the header Host that are answered; None for any.
    """
    forwarder = Forwarder(upstream, recorder, say)
    health = Health(upstream, recorder, forwarder)

    @asynccontextmanager
    async def lifespan(_: object) -> AsyncIterator[None]:
        yield
        # Requests that the server has just cancelled still hand in what they have.
        with anyio.move_on_after(_LAST_RECORDS_S):
            while forwarder.running:
                await anyio.sleep(0.01)
        await recorder.close()
        await upstream.close()
        say(f"recorded {recorder.recorded} requests, {_skipped(recorder)}")

    routes = [Route("/health", health.answer, methods=["GET"])]
    router = Router(routes, redirect_slashes=False, default=forwarder, lifespan=lifespan)
    return Guard(router, hosts)


def _skipped(recorder: Recorder) -> str:
    counts = recorder.budget.skipped
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    return f"left out {counts.total()}" + (f" ({reasons})" if reasons else "")


def serve(
    upstream: Upstream,
    settings: Settings,
    host: str,
    port: int,
    drain_s: int,
    say: Callable[[str], None],
) -> None:
    """Serve until SIGTERM or Ctrl-C; then streams that run may end within `drain_s` seconds.

    Args:
        upstream: the server behind the proxy.
        settings: of the recording.
        host: address to listen on.
        port: to listen on; 0 takes a free one.
        drain_s: longest wait for running answers at the end, in seconds.
        say: takes what the operator has to know, a line at a time.

    Raises:
        ValueError: another proxy records into the same folder.
        OSError: the folder cannot be written, or the address is taken.
    """
    files = RecordFiles(settings.out, settings.max_file_bytes, settings.max_total_bytes)
    recorder = Recorder(settings, files, upstream.secrets, say)
    with listen(host, port) as listener:
        shown = f"[{host}]" if ":" in host else host
        taken = listener.getsockname()[1]
        address = f"http://{shown}:{taken}"
        say(f"recording {address} -> {upstream.url} into {settings.out}")
        if settings.out.stat().st_mode & 0o077:
            say(f"others may look into {settings.out}; close it with: chmod 700")
        if not _is_loopback(host):
            say(f"{host} is no loopback address: whoever reaches it can use the upstream server")
        config = uvicorn.Config(
            build_application(
                upstream, recorder, say, hosts_of(host, taken) if _is_loopback(host) else None
            ),
            http="h11",  # it bounds the size of a request's head
            timeout_graceful_shutdown=drain_s,
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
        with suppress(KeyboardInterrupt):  # said again by uvicorn when all is done
            uvicorn.Server(config).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A socket whose connections send every piece at once.

    asyncio sees to that only for sockets that it opens itself; without it the kernel may keep a
    piece of a stream back until the client has acknowledged the one before.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=2048)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections inherit it
    return listener


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
