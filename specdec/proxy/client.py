"""The client's side of one request."""

from collections.abc import AsyncIterator

from anyio import CancelScope, Event
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from specdec.proxy.headers import Headers


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
