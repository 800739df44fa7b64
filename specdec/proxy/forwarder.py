"""Passes requests on and answers back, byte for byte, and hands both to the recorder."""

from collections.abc import AsyncIterator, Callable

import anyio
import httpx
from starlette.types import Receive, Scope, Send

from specdec.proxy.client import Client, ClientGoneError
from specdec.proxy.exchange import Exchange
from specdec.proxy.headers import end_to_end, readable_codings
from specdec.proxy.recorder import Recorder
from specdec.proxy.skip import Skip
from specdec.proxy.upstream import Upstream, reason


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
