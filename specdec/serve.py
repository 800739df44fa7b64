"""OpenAI's API, with vLLM's token ids, over the engine: for research, not for production."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import product
from typing import Any

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import Field
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from specdec.common.config import Config, validated
from specdec.common.files import parse_json
from specdec.common.metrics import Metrics
from specdec.engine.engine import Chunk, Engine
from specdec.engine.text import encode, split_prompts
from specdec.proxy.server import listen
from specdec.sampling.config import SamplingConfig

# They change no answer; the last two are llama.cpp's for `return_token_ids`.
_IGNORED = {"user", "metadata", "store", "cache_prompt", "cache_salt", "verbose", "return_tokens"}


class Asked(Config):
    """A request without its sampling settings."""

    model: str | None = None
    messages: list[dict[str, Any]] | None = None
    prompt: Any = None
    max_tokens: int | None = None
    n: int = Field(1, ge=1, le=128)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[str, bool] = Field(default_factory=dict)
    return_token_ids: bool = False


def read_request(body: bytes, needed: str) -> tuple[Asked, SamplingConfig]:
    """Read a request, in which null is no value, and refuse what would not be honored."""
    given = parse_json(body)
    if not isinstance(given, dict) or given.get(needed) is None:
        raise ValueError(f"the body is {given!r:.60} but must be an object with {needed}")
    given = {k: v for k, v in given.items() if v is not None and k not in _IGNORED}
    if "max_completion_tokens" in given:  # OpenAI's newer name
        given["max_tokens"] = given.pop("max_completion_tokens")
    # OpenAI's defaults are temperature 1 and a seed of chance.
    settings = asdict(SamplingConfig(temperature=1.0, seed=secrets.randbits(62)))
    settings |= {name: given.pop(name) for name in settings if name in given}
    known = Asked.model_fields.keys() - ({"messages", "prompt"} - {needed})
    for name in given.keys() - known:
        raise ValueError(f"{name} is {given[name]!r:.60} but is not honored here; leave it out")
    asked = validated(Asked, given, "request")
    for message in asked.messages or []:
        if isinstance(parts := message.get("content"), list):  # templates take text alone
            if not all(isinstance(part, dict) and "text" in part for part in parts):
                raise ValueError(f"content is {parts!r:.80} but its parts must be text")
            message["content"] = "\n".join(part["text"] for part in parts)
    return asked, SamplingConfig(**settings)


def _error(status: int, message: str) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def refuse(_: Request, error: Exception) -> JSONResponse:
    """Put an error in OpenAI's form."""
    status = getattr(error, "status_code", 400)
    return JSONResponse(_error(status, getattr(error, "detail", str(error))), status)


class Server(Starlette):
    """An engine that one thread steps; requests join and leave between two steps."""

    def __init__(self, engine: Engine, model: str, say: Callable[[str], None]) -> None:
        errors = dict.fromkeys((HTTPException, ValueError, TypeError), refuse)
        super().__init__(exception_handlers=errors)
        self._engine, self._model, self._say = engine, model, say
        self._thread = ThreadPoolExecutor(1, "engine")  # all that touches the engine runs there
        self._running: dict[int, Callable[[Any], Any]] = {}  # who hears of the engine's requests
        self._is_stepping = False
        engine.observer = metrics = Metrics()
        about = {"id": model, "object": "model", "created": int(time.time()), "owned_by": "specdec"}
        models = [{**about, "max_model_len": engine.target.max_context_len}]
        self.add_route("/v1/models", lambda _: JSONResponse({"object": "list", "data": models}))
        self.add_route("/health", lambda _: JSONResponse({}))
        self.add_route(
            "/metrics",
            lambda _: Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST),
        )
        for path in ("/v1/chat/completions", "/v1/completions"):
            self.add_route(path, self._complete, ["POST"])

    async def _complete(self, request: Request) -> Response:
        needed = "messages" if "/chat/" in request.url.path else "prompt"
        asked, sampling = read_request(await request.body(), needed)
        if asked.model not in (None, self._model):
            what = f"the model {asked.model!r} does not exist; this is {self._model!r}"
            raise HTTPException(404, what)
        heard, loop = asyncio.Queue[Any](), asyncio.get_running_loop()

        def tell(each: Any) -> None:
            loop.call_soon_threadsafe(heard.put_nowait, each)

        prompts = await loop.run_in_executor(self._thread, self._submit, asked, sampling, tell)

        async def cancel_when_gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            self._thread.submit(self._cancel, prompts)

        request.state.watch = asyncio.create_task(cancel_when_gone())
        bodies = _bodies(asked, self._model, prompts, heard)
        if asked.stream:
            return StreamingResponse(_events(bodies), media_type="text/event-stream")
        body = await anext(bodies)
        return JSONResponse(body, 500 if "error" in body else 200)

    def _submit(
        self, asked: Asked, sampling: SamplingConfig, tell: Callable[[Any], Any]
    ) -> dict[int, list[int]]:
        """Submit the requests for all choices; returns their prompts."""
        target, is_chat, prompts = self._engine.target, asked.messages is not None, {}
        default = target.max_context_len if is_chat else 16  # OpenAI's
        limit = default if asked.max_tokens is None else asked.max_tokens
        given = [asked.messages] if is_chat else split_prompts(asked.prompt)
        encoded = [encode(each, target, place) for place, each in enumerate(given)]
        for ids, choice in product(encoded, range(asked.n)):
            own = replace(sampling, seed=(sampling.seed + choice) % 2**63)
            index = self._engine.submit(ids, own, max_new_tokens=limit, stop=asked.stop)
            prompts[index], self._running[index] = ids, tell
        if not self._is_stepping:
            self._is_stepping = True
            self._thread.submit(self._step)
        return prompts

    def _step(self) -> None:
        """Take a step; what else waits for the thread comes before the next one."""
        chunks: list[Chunk] = []
        try:
            chunks = self._engine.step()
        except Exception as error:  # the next step tells whom it has ended
            self._say(f"a step failed: {error}")
        for chunk in chunks:
            self._tell(chunk)
        self._is_stepping = bool(self._running)
        if self._is_stepping:
            self._thread.submit(self._step)

    def _tell(self, chunk: Chunk) -> None:
        tell, result = self._running[chunk.index], None
        if chunk.finish_reason:
            result = self._engine.result(chunk.index)
            del self._running[chunk.index]
        tell((chunk, result))

    def _cancel(self, indices: Mapping[int, Any]) -> None:
        for index in self._running.keys() & indices:  # others have ended, and were told
            try:
                self._engine.cancel(index)
            except Exception as error:
                self._say(f"a step failed: {error}")
            self._tell(Chunk(index, [], "", "cancelled"))


async def _bodies(
    asked: Asked, model: str, prompts: Mapping[int, list[int]], heard: asyncio.Queue[Any]
) -> AsyncIterator[dict[str, Any]]:
    """Yield a body for each chunk, or one for all of them."""
    is_chat, is_stream, new = asked.messages is not None, asked.stream, dict(prompts)
    head = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}",
        "object": f"chat.completion{'.chunk' * is_stream}" if is_chat else "text_completion",
        "created": int(time.time()),
        "model": model,
    }
    num_running, choices, body = len(prompts), list[dict[str, Any]](), dict[str, Any](head)
    num_given, num_emitted = sum(map(len, prompts.values())) // asked.n, 0
    while num_running:
        chunk, result = await heard.get()
        if result and result.error:
            yield _error(500, result.error)
            return
        num_running -= bool(result)
        num_emitted += len(chunk.tokens)
        usage = {"prompt_tokens": num_given, "completion_tokens": num_emitted}
        usage["total_tokens"] = num_given + num_emitted
        if not (is_stream or result):
            continue
        said, prompt = chunk if is_stream else result, new.pop(chunk.index, None)
        choice: dict[str, Any] = {"index": chunk.index - min(prompts), "text": said.text}
        if is_chat:
            role = {"role": "assistant"} if prompt else {}
            message = {**role, "content": choice.pop("text")}
            choice["delta" if is_stream else "message"] = message
        choice["finish_reason"] = "stop" if said.finish_reason == "eos" else said.finish_reason
        if asked.return_token_ids:
            choice["token_ids"] = said.tokens
            if prompt:
                (body if is_chat else choice)["prompt_token_ids"] = prompt
        choices.append(choice)
        if is_stream:
            if asked.stream_options.get("continuous_usage_stats"):
                body["usage"] = usage
            yield {**body, "choices": choices}
            choices, body = [], dict(head)
    if not is_stream or asked.stream_options.get("include_usage"):
        choices.sort(key=lambda choice: choice["index"])
        yield {**body, "choices": choices, "usage": usage}


async def _events(bodies: AsyncIterator[Any]) -> AsyncIterator[str]:
    async for body in bodies:
        yield f"data: {json.dumps(body)}\n\n"
    yield "data: [DONE]\n\n"


def serve(engine: Engine, model: str, host: str, port: int, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C; what runs then has a second to end."""
    with listen(host, port) as listener, suppress(KeyboardInterrupt):
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{listener.getsockname()[1]}/v1"
        say(f"serving {model} at {url}: for research, not for production")
        server = Server(engine, model, say)
        config = uvicorn.Config(server, timeout_graceful_shutdown=1, log_level="warning")
        uvicorn.Server(config).run(sockets=[listener])
