"""OpenAI's API, with vLLM's token ids, over the engine: for research, not for production."""

import asyncio
import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

import anyio
import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import Field
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from specdec.common.config import Config, validated
from specdec.common.files import parse_json
from specdec.common.metrics import Metrics
from specdec.engine.engine import Chunk, Engine
from specdec.engine.request import Result
from specdec.engine.text import encode, split_prompts
from specdec.proxy.server import listen
from specdec.sampling.config import SamplingConfig

_PLAIN = {"content-type": CONTENT_TYPE_LATEST}
# Fields that change no answer, by what Python writes for the values that may be given.
_HARMLESS = {
    **dict.fromkeys(("user", "metadata", "store", "cache_prompt", "cache_salt"), ".*"),
    **dict.fromkeys(("echo", "logprobs", "ignore_eos"), "False"),
    **{"tools": r"\[\]", "tool_choice": "'(none|auto)'", "repeat_penalty": r"1(\.0)?"},
}


class Asked(Config):
    """A request without its sampling settings."""

    model: str | None = None
    messages: list[dict[str, Any]] | None = None
    prompt: Any = None
    max_tokens: int | None = None
    n: int = Field(1, ge=1, le=128)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[str, bool] | None = None
    return_token_ids: bool = False


def read_request(body: bytes, needed: str) -> tuple[Asked, SamplingConfig]:
    """Read a request, in which null is no value, and refuse what would not be honored."""
    given = parse_json(body)
    if not isinstance(given, dict) or given.get(needed) is None:
        raise ValueError(f"the body is {given!r:.60} but must be an object with {needed}")
    given = {name: value for name, value in given.items() if value is not None}
    if "max_completion_tokens" in given:  # OpenAI's newer name
        given["max_tokens"] = given.pop("max_completion_tokens")
    # OpenAI's defaults are temperature 1 and a seed of chance.
    settings = asdict(SamplingConfig(temperature=1.0, seed=secrets.randbits(62)))
    settings |= {name: given.pop(name) for name in settings if name in given}
    known = Asked.model_fields.keys() - ({"messages", "prompt"} - {needed})
    for name in given.keys() - known:
        value = given.pop(name)
        if not re.fullmatch(_HARMLESS.get(name, ""), repr(value), re.DOTALL):
            raise ValueError(f"{name} is {value!r:.60} but is not honored here; leave it out")
    asked = validated(Asked, given, "request")
    for message in asked.messages or []:
        if isinstance(parts := message.get("content"), list):  # templates take text alone
            if not all(isinstance(part, dict) and "text" in part for part in parts):
                raise ValueError(f"content is {parts!r:.80} but its parts must be text")
            message["content"] = "\n".join(str(part["text"]) for part in parts)
    return asked, SamplingConfig(**settings)


def _error(status: int, message: str) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def refuse(_: Request | None, error: Exception) -> JSONResponse:
    """Put an error in OpenAI's form."""
    status = getattr(error, "status_code", 400)
    return JSONResponse(_error(status, getattr(error, "detail", str(error))), status)


class Server(Starlette):
    """An engine that one thread steps; requests join and leave between two steps."""

    def __init__(self, engine: Engine, model: str, say: Callable[[str], None]) -> None:
        errors = dict.fromkeys((HTTPException, ValueError, TypeError), refuse)
        super().__init__(exception_handlers=errors)
        self.engine, self.model, self._say = engine, model, say
        self.thread = ThreadPoolExecutor(1, "engine")  # all that touches the engine runs there
        # By the engine's requests: where their chunks go, and their rows in the answer.
        self.running: dict[int, tuple[asyncio.Queue[Any], int]] = {}
        self._steps: asyncio.Task[None] | None = None
        engine.observer = metrics = Metrics()
        about = {"id": model, "object": "model", "created": int(time.time()), "owned_by": "specdec"}
        models = [{**about, "max_model_len": engine.target.max_context_len}]
        self.add_route("/v1/models", lambda _: JSONResponse({"object": "list", "data": models}))
        self.add_route("/health", lambda _: JSONResponse({}))
        self.add_route(
            "/metrics", lambda _: Response(generate_latest(metrics.registry), 200, _PLAIN)
        )
        for path in ("/v1/chat/completions", "/v1/completions"):
            self.add_route(path, self._complete, ["POST"])

    async def _complete(self, request: Request) -> Any:
        return Answer(self, await request.body(), "/chat/" in request.url.path)

    async def submit(self, work: Callable[[], None]) -> None:
        """Let the engine's thread submit requests, and step while there are any."""
        await asyncio.get_running_loop().run_in_executor(self.thread, work)
        if self._steps is None or self._steps.done():
            self._steps = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while self.running:
            try:
                chunks = await asyncio.get_running_loop().run_in_executor(self.thread, self._step)
            except Exception as error:  # the next step tells whom it has ended
                self._say(f"a step failed: {error}")
                continue
            for chunk, result in chunks:
                take = self.running.pop if result else self.running.get
                if place := take(chunk.index, None):
                    place[0].put_nowait((replace(chunk, index=place[1]), result))

    def _step(self) -> list[tuple[Chunk, Result | None]]:
        chunks = self.engine.step()
        return [(c, self.engine.result(c.index) if c.finish_reason else None) for c in chunks]

    def cancel(self, heard: asyncio.Queue[Any]) -> None:
        """End, in the engine's thread, what would go to a queue."""
        for index, (queue, _) in list(self.running.items()):
            if queue is heard:
                self.running.pop(index, None)
                with suppress(KeyError):  # it has ended, and is about to be told
                    self.engine.cancel(index)
                    self.engine.result(index)


class Answer:
    """The answer to a request; when its client leaves, its rows are cancelled."""

    def __init__(self, server: Server, body: bytes, is_chat: bool) -> None:
        self._asked, self._sampling = read_request(body, "messages" if is_chat else "prompt")
        if self._asked.model not in (None, server.model):
            what = f"the model {self._asked.model!r} does not exist; this is {server.model!r}"
            raise HTTPException(404, what)
        self._server, self._is_chat = server, is_chat
        self._new: dict[int, list[int]] = {}  # prompts of the rows that have said nothing yet
        self._heard: asyncio.Queue[tuple[Chunk, Result | None]] = asyncio.Queue()
        self._num_given = self._num_emitted = 0
        name = f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._head: dict[str, Any] = {
            "id": name,
            "created": int(time.time()),
            "model": server.model,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer until the end, or until the client leaves."""

        async def leave() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        try:
            async with anyio.create_task_group() as group:
                group.start_soon(leave)
                await (await self._response())(scope, receive, send)
                group.cancel_scope.cancel()
        finally:
            self._server.thread.submit(self._server.cancel, self._heard)

    async def _response(self) -> Response:
        try:
            await self._server.submit(self._submit)
        except (ValueError, TypeError) as error:
            return refuse(None, error)
        if self._asked.stream:
            return StreamingResponse(self._events(), media_type="text/event-stream")
        [body] = [each async for each in self._bodies()]
        return JSONResponse(body, 500 if "error" in body else 200)

    def _submit(self) -> None:
        asked, own, engine = self._asked, self._sampling, self._server.engine
        limit = asked.max_tokens
        if limit is None:  # OpenAI's defaults
            limit = engine.target.max_context_len if self._is_chat else 16
        given = [asked.messages] if self._is_chat else split_prompts(asked.prompt)
        prompts = [encode(each, engine.target, place) for place, each in enumerate(given)]
        self._num_given = sum(map(len, prompts))
        self._new = dict(enumerate(ids for ids in prompts for _ in range(asked.n)))
        for row, ids in self._new.items():
            sampling = replace(own, seed=(own.seed + row % asked.n) % 2**63)
            index = engine.submit(ids, sampling, max_new_tokens=limit, stop=asked.stop)
            self._server.running[index] = (self._heard, row)

    async def _events(self) -> AsyncIterator[str]:
        async for body in self._bodies():
            yield f"data: {json.dumps(body)}\n\n"
        yield "data: [DONE]\n\n"

    async def _bodies(self) -> AsyncIterator[dict[str, Any]]:
        """Yield a body for each chunk, or for all of them."""
        options, num_running = self._asked.stream_options or {}, len(self._new)
        whole: list[Chunk] = []
        while num_running:
            chunk, result = await self._heard.get()
            self._num_emitted += len(chunk.tokens)
            num_running -= bool(result)
            if result and result.error:
                yield _error(500, result.error)
                return
            if self._asked.stream:
                yield self._body([chunk], options.get("continuous_usage_stats", False))
            elif result:
                whole.append(replace(chunk, tokens=result.tokens, text=result.text))
        if not self._asked.stream or options.get("include_usage"):
            yield self._body(sorted(whole, key=lambda each: each.index), has_usage=True)

    def _body(self, chunks: list[Chunk], has_usage: bool) -> dict[str, Any]:
        asked, choices = self._asked, list[dict[str, Any]]()
        kind = f"chat.completion{'.chunk' * asked.stream}" if self._is_chat else "text_completion"
        body = {**self._head, "object": kind, "choices": choices}
        for chunk in chunks:
            prompt = self._new.pop(chunk.index, None)
            said: dict[str, Any] = {"text": chunk.text}
            if self._is_chat:
                role = {"role": "assistant"} if prompt else {}
                said = {"delta" if asked.stream else "message": {**role, "content": chunk.text}}
            reason = "stop" if chunk.finish_reason == "eos" else chunk.finish_reason
            choices.append({"index": chunk.index, **said, "finish_reason": reason})
            if asked.return_token_ids:
                choices[-1]["token_ids"] = chunk.tokens
                if prompt:
                    (body if self._is_chat else choices[-1])["prompt_token_ids"] = prompt
        if has_usage:
            counts = {"prompt_tokens": self._num_given, "completion_tokens": self._num_emitted}
            body["usage"] = {**counts, "total_tokens": sum(counts.values())}
        return body


def serve(engine: Engine, model: str, host: str, port: int, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C; what runs then has a second to end."""
    with listen(host, port) as listener, suppress(KeyboardInterrupt):
        url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/v1"
        say(f"serving {model} at {url}: for research, not for production")
        config = uvicorn.Config(
            Server(engine, model, say), timeout_graceful_shutdown=1, log_level="warning", ws="none"
        )
        uvicorn.Server(config).run(sockets=[listener])
