"""An OpenAI-compatible server: one question at a time, asked again where that can help."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import httpx
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt

from specdec.bench.prompt import Message

# Of the client errors these pass by themselves: a timeout, a conflict, too many requests.
_PASSING = (408, 409, 429)
# Wrong for every query: the key, the URL or the model.
_FATAL = (401, 403, 404)
# What servers take out of a message's text.
_TAKEN_OUT = ("reasoning_content", "reasoning", "tool_calls")
_FIRST_WAIT_S, _LONGEST_WAIT_S, _LONGEST_ASKED_WAIT_S = 1.0, 60.0, 600.0


class Refused(Exception):  # noqa: N818 (it ends one query, not the run)
    """The server will not answer this query, however often it is asked."""


class Unavailable(Exception):  # noqa: N818
    """The server could not answer now.

    Args:
        reason: for messages.
        wait_s: seconds that the server asked to wait; None if it did not say.
    """

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


@dataclass(frozen=True)
class Reply:
    """What a server answered.

    Attributes:
        text: of the answer.
        finish_reason: "stop" or "length".
        token_ids: of the answer; None where the server gives none.
        prompt_token_ids: as the server read the prompt; None where it gives none.
        num_tokens: of the answer, by the server's count; None where it gives none.
    """

    text: str
    finish_reason: str
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    num_tokens: int | None = None


class Endpoint:
    """Asks a server for chat or text completions.

    Timeouts, lost connections, 408, 409, 429 and server errors are tried again, with waits that
    double from a second on and are blurred at random, or as long as `Retry-After` says.

    Args:
        url: up to and with the version, as `http://host:8000/v1`.
        model: as the server calls it.
        api_key: sent as a bearer token; it is kept out of every message. Empty for none.
        attempts: at a query, the first one included.
        timeout_s: of an answer.
        concurrency: connections at once.

    Raises:
        ValueError: a URL that is none or that holds a password, or no attempt or time at all.
    """

    def __init__(
        self,
        url: str,
        model: str,
        api_key: str = "",
        attempts: int = 6,
        timeout_s: float = 600.0,
        concurrency: int = 16,
    ) -> None:
        if attempts < 1 or timeout_s <= 0:
            raise ValueError(
                f"attempts is {attempts} and timeout {timeout_s}: give at least one attempt and a "
                "positive number of seconds"
            )
        self.url, self.model = _checked_url(url), model
        self._api_key, self._attempts = api_key, attempts
        self._asks_for_ids = True
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, 10.0), pool=None),
            limits=httpx.Limits(max_connections=concurrency),
        )

    async def __aenter__(self) -> "Endpoint":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._client.aclose()

    async def chat(self, messages: Sequence[Message], options: Mapping[str, Any]) -> Reply:
        """Answer a conversation; the server writes it with its own chat template.

        Args:
            messages: up to a user turn.
            options: of the request: `temperature`, `max_tokens` and so on.

        Raises:
            Refused: this query will not be answered.
            Unavailable: it was not, however often it was asked.
            ValueError: the server refuses every query: a wrong key, URL or model.
        """
        content = await self._ask("chat/completions", {"messages": list(messages), **options})
        return _reply(content)

    async def complete(self, prompt: Sequence[int], options: Mapping[str, Any]) -> Reply:
        """Continue token ids; options and errors as in `chat`."""
        content = await self._ask("completions", {"prompt": list(prompt), **options})
        return _reply(content)

    async def is_alive(self) -> bool:
        """Whether the server answers at all."""
        try:
            reply = await self._client.get(f"{self.url}/models", timeout=10.0)
        except httpx.HTTPError:
            return False
        return reply.status_code < 500

    async def _ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        attempts = AsyncRetrying(
            stop=stop_after_attempt(self._attempts),
            wait=_wait_s,
            retry=retry_if_exception_type(Unavailable),
            reraise=True,
        )
        answer: dict[str, Any] = await attempts(self._post, path, {"model": self.model, **body})
        return answer

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        asked = {**body, "return_token_ids": True} if self._asks_for_ids else body
        try:
            reply = await self._client.post(f"{self.url}/{path}", json=asked)
        except httpx.TransportError as error:
            raise Unavailable(f"{type(error).__name__} {error}".strip()) from error
        if reply.is_success:
            return _content(reply)
        if "return_token_ids" in asked and "return_token_ids" in reply.text:
            self._asks_for_ids = False  # a server that takes no field it does not know
            return await self._post(path, body)
        raise self._error(reply)

    def _error(self, reply: httpx.Response) -> Exception:
        status, text = reply.status_code, " ".join(reply.text.split())[:300]
        reason = f"HTTP {status}: {text}"
        if self._api_key:
            reason = reason.replace(self._api_key, "***")
        if status in _PASSING or status >= 500:
            return Unavailable(reason, _retry_after_s(reply))
        if status in _FATAL:
            return ValueError(
                f"{self.url} refuses model {self.model!r} ({reason}); check --endpoint (up to and "
                "with /v1), --model and the API key's environment variable"
            )
        return Refused(reason)


def _checked_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"endpoint is {url!r} but must be a URL such as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query:
        raise ValueError(
            "endpoint holds a user name, a password or a query, which would be written into the "
            "answers; give the key in an environment variable, see --api-key-variable"
        )
    return url.rstrip("/")


def _wait_s(state: RetryCallState) -> float:
    """Seconds before the next attempt: as the server asks, else doubled and blurred."""
    error = state.outcome.exception() if state.outcome else None
    doubled = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2.0 ** (state.attempt_number - 1))
    blurred = doubled * random.uniform(0.5, 1.5)
    asked = error.wait_s if isinstance(error, Unavailable) else None
    return blurred if asked is None else min(asked, _LONGEST_ASKED_WAIT_S) + 0.1 * blurred


def _retry_after_s(reply: httpx.Response) -> float | None:
    """The header in seconds: it holds a number or a date."""
    text = reply.headers.get("retry-after", "")
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None


def _content(reply: httpx.Response) -> dict[str, Any]:
    try:
        content = reply.json()
    except ValueError as error:
        # A proxy in front of a server that is going down answers with pages like that.
        raise Unavailable(f"the answer is no JSON: {reply.text[:100]!r}") from error
    if not isinstance(content, dict) or not content.get("choices"):
        raise Refused(f"the answer holds no choices: {reply.text[:300]!r}")
    return content


def _reply(content: dict[str, Any]) -> Reply:
    choice = content["choices"][0]
    message = choice.get("message") or {"content": choice.get("text")}
    reason, token_ids = choice.get("finish_reason"), _ids(choice.get("token_ids"))
    if token_ids is None and any(message.get(part) for part in _TAKEN_OUT):
        raise Refused(
            "the server took reasoning or tool calls out of the answer, so that its text is not "
            "what the target wrote; serve it without these parsers, or use --api completion"
        )
    if reason not in ("stop", "length", "tool_calls"):
        raise Refused(f"the answer ended by {reason!r}, which is not the target's own end")
    text, usage = message.get("content"), content.get("usage") or {}
    return Reply(
        text=text if isinstance(text, str) else "",
        finish_reason="length" if reason == "length" else "stop",
        token_ids=token_ids,
        prompt_token_ids=_ids(content.get("prompt_token_ids") or choice.get("prompt_token_ids")),
        num_tokens=usage.get("completion_tokens"),
    )


def _ids(given: Any) -> list[int] | None:
    is_list = isinstance(given, list) and all(type(token) is int and token >= 0 for token in given)
    return given if is_list and given else None
