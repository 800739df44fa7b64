"""Requests that are refused: meant for another host, or for a path outside of the server's root."""

import unicodedata
from urllib.parse import unquote_to_bytes

from starlette.types import ASGIApp, Receive, Scope, Send

from specdec.proxy.client import Client

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
