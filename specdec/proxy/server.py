"""Listen, refuse what must not pass, tell the state, and come to an orderly end."""

import ipaddress
import os
import socket
import unicodedata
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from urllib.parse import unquote_to_bytes

import anyio
import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from specdec.proxy.config import ProxyConfig, parse_size
from specdec.proxy.forwarding import Forwarder, Upstream, refusal
from specdec.proxy.recorder import Recorder, Say
from specdec.proxy.records import RecordFiles

_METHODS_OF_PROXIES = ("CONNECT", "TRACE")
_MAX_ENCODINGS = 4
_LAST_RECORDS_S = 5.0


class Guard:
    """An ASGI application before another one, which gets what is not refused."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        refused = self._refusal(scope) if scope["type"] == "http" else None
        await (refused or self._app)(scope, receive, send)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        if scope["method"] in _METHODS_OF_PROXIES:
            return refusal(405, f"{scope['method']} is not passed on", "method_not_allowed")
        given = [
            value.decode("latin-1").lower() for name, value in scope["headers"] if name == b"host"
        ]
        if self._hosts is not None and (len(given) != 1 or given[0] not in self._hosts):
            # A web page whose name was made to lead to this machine sends its own name.
            known = ", ".join(sorted(self._hosts))
            return refusal(421, f"this proxy answers to the hosts {known} alone", "wrong_host")
        if _leaves_root(scope["raw_path"]):
            text = "the path must begin with /, without //, dot segments or \\"
            return refusal(400, text, "bad_path")
        return None


def hosts_of(host: str, port: int) -> frozenset[str]:
    """The values that clients of a loopback address write into the header Host."""
    names = {"localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host.lower()}
    return frozenset({f"{name}:{port}" for name in names} | (names if port == 80 else set()))


def _leaves_root(path: bytes) -> bool:
    """Tell a path that a server, which decodes it however often, could read as outside its root."""
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


def build_application(
    upstream: Upstream, recorder: Recorder, say: Say, hosts: frozenset[str] | None = None
) -> Guard:
    """Build the proxy: `/health`, and every other path passed on."""
    forwarder = Forwarder(upstream, recorder, say)

    async def health(request: Request) -> JSONResponse:
        server = await upstream.health()
        status = "not recording" if recorder.trouble else "ok"
        state = {
            "status": status if server["reachable"] else "upstream unreachable",
            "upstream": server,
            "recording": not recorder.trouble,
            "why_not": recorder.trouble or None,
            "recorded": recorder.recorded,
            "skipped": dict(recorder.budget.skipped),
            "bytes": recorder.files.total_bytes,
            "file": recorder.files.path.name,
            "running": forwarder.running,
            "held_bytes": recorder.budget.held_bytes,
            "last_error": recorder.last_error or None,
        }
        return JSONResponse(state, 200 if server["reachable"] else 503)

    @asynccontextmanager
    async def lifespan(_: object) -> AsyncIterator[None]:
        yield
        # Requests that the server has just cancelled still hand in what they have.
        with anyio.move_on_after(_LAST_RECORDS_S):
            while forwarder.running:
                await anyio.sleep(0.01)
        await recorder.close()
        await upstream.close()
        skipped = recorder.budget.skipped
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common())
        left_out = f"left out {skipped.total()}" + (f" ({reasons})" if reasons else "")
        say(f"recorded {recorder.recorded} requests, {left_out}")

    routes = [Route("/health", health, methods=["GET"])]
    router = Router(routes, redirect_slashes=False, default=forwarder, lifespan=lifespan)
    return Guard(router, hosts)


def serve(config: ProxyConfig, say: Say) -> None:
    """Serve until SIGTERM or Ctrl-C; then answers that run may end within the time to drain."""
    login = os.environ.get(config.upstream_key_env or "", "").strip()
    if config.upstream_key_env and not login:
        raise ValueError(
            "the environment variable that --upstream-key-env names is empty or not set; export "
            "the server's key under a name and give that name"
        )
    host = config.host
    upstream = Upstream(config.upstream, config.connect_timeout, login)
    files = RecordFiles(config.out, parse_size(config.max_file), parse_size(config.max_total))
    recorder = Recorder(config, files, upstream.secrets, say)
    with listen(host, config.port) as listener:
        shown = f"[{host}]" if ":" in host else host
        taken = listener.getsockname()[1]
        say(f"recording http://{shown}:{taken} -> {upstream.url} into {config.out}")
        if config.out.stat().st_mode & 0o077:
            say(f"others may look into {config.out}; close it with: chmod 700")
        hosts = hosts_of(host, taken) if _is_loopback(host) else None
        if hosts is None:
            say(f"{host} is no loopback address: whoever reaches it can use the upstream server")
        server = uvicorn.Config(
            build_application(upstream, recorder, say, hosts),
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
        with suppress(KeyboardInterrupt):  # said again by uvicorn when all is done
            uvicorn.Server(server).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """Open a socket whose connections send every piece at once.

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
