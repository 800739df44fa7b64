"""A fake upstream server, a running proxy, and what passes between them."""

import json
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass

import anyio
import httpx
import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse

from specdec.proxy.recorder import Recorder
from specdec.proxy.server import listen

PATIENCE_S = 20  # a limit for a test that hangs; nothing is measured with it


class Served:
    """An application behind uvicorn, in a thread."""

    def __init__(self, app):
        listener = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(
            app,
            log_level="critical",
            timeout_graceful_shutdown=1,
            server_header=False,
            date_header=False,
            ws="none",
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([listener],), daemon=True)
        self.thread.start()

    def stop(self):
        self.server.should_exit = True

    def join(self):
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive()


class FakeUpstream:
    """Notes what it was sent, and answers as `answer(request)`, a coroutine, says."""

    def __init__(self):
        self.seen = []
        self.answer = None
        self.left = threading.Event()  # a client went away before its answer's end

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        body = await request.body()
        self.seen.append((scope["method"], scope, body))
        response = await self.answer(request)
        await response(scope, receive, send)


@dataclass
class Proxy:
    """A running proxy, and what it said."""

    served: Served
    folder: object
    said: list
    recorder: Recorder

    def connect(self):
        """A connection for what no decent client would send."""
        host, port = self.served.url.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), PATIENCE_S)

    def client(self):
        return httpx.Client(base_url=self.served.url, timeout=PATIENCE_S, verify=False)

    def ask(self, body=None, path="/v1/chat/completions", method="POST", **options):
        """Send a chat, or other content as it is."""
        given = {} if method == "GET" or "content" in options else {"json": body or chat("hello")}
        with self.client() as client:
            return client.request(method, path, **given, **options)

    @contextmanager
    def stream(self, body=None, path="/v1/chat/completions", **options):
        with (
            self.client() as client,
            client.stream("POST", path, json=body or chat("a"), **options) as response,
        ):
            yield response

    def health(self):
        return self.ask(path="/health", method="GET").json()

    def records(self):
        return [json.loads(line) for line in self.lines()]

    def lines(self):
        files = sorted(self.folder.glob("requests-*.jsonl"))
        return [line for file in files for line in file.read_bytes().splitlines()]

    def eventually(self, holds):
        """Wait for what the proxy does after the client has gone."""
        until = time.monotonic() + PATIENCE_S
        while not holds():
            assert time.monotonic() < until, "it did not come about"
            time.sleep(0.01)


def chat(text, **more):
    return {"model": "m", "messages": [{"role": "user", "content": text}], **more}


def answer(text, **more):
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {"id": "c1", "object": "chat.completion", "model": "m", "choices": [choice], **more}


def event(value):
    return f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n".encode()


def content_of(record):
    return record["response"]["choices"][0]["message"]["content"]


def delta(finish_reason=None, **fields):
    choice = {"index": 0, "delta": fields, "finish_reason": finish_reason}
    return event({"id": "c1", "object": "chat.completion.chunk", "model": "m", "choices": [choice]})


def streaming(pieces, **options):
    """An answer that is sent in these pieces; a piece that is an event is waited for."""

    async def run():
        for piece in pieces:
            if isinstance(piece, threading.Event):
                await anyio.to_thread.run_sync(piece.wait, PATIENCE_S)
            else:
                yield piece

    async def respond(request):
        return StreamingResponse(run(), **{"media_type": "text/event-stream", **options})

    return respond


def just(response):
    """An answer that is always this one."""

    async def respond(request):
        return response

    return respond


def json_answer(body, status=200, **headers):
    return just(JSONResponse(body, status, headers))


def raw_answer(*messages):
    """An application that sends these ASGI messages and returns, as a server that dies."""

    async def app(scope, receive, send):
        for message in messages:
            await send(message)

    return just(app)
