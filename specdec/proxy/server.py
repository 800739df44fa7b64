"""Listens, serves, and comes to an orderly end."""

import ipaddress
import socket
from collections.abc import Callable
from contextlib import suppress

import uvicorn

from specdec.proxy.application import build_application
from specdec.proxy.guard import hosts_of
from specdec.proxy.record_files import RecordFiles
from specdec.proxy.recorder import Recorder
from specdec.proxy.settings import Settings
from specdec.proxy.upstream import Upstream


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
