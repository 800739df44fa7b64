"""An OpenAI-compatible server: one question at a time, asked again where that can help."""

import asyncio
import random
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import httpx
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt

from specdec.common.files import Journal
from specdec.common.messages import Message
from specdec.data.dialogue import Answer, Chat, Dialogue, Session

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


APIS = ("chat", "completion")
# Servers take seeds of 32 bits with a sign.
_SEEDS = 2**31


class EndpointDownError(RuntimeError):
    """The endpoint answers no more; what it has answered is kept."""


class EndpointAnswers:
    """Answers dialogues through an endpoint.

    Args:
        endpoint: the server.
        chat: the target's tokenizer and template, for prompts and where the server gives no ids.
        api: "chat" sends messages, "completion" the tokens of the prompt as `chat` writes them.
        top_p: of the sampled answers.
        max_new_tokens: of an answer.
        concurrency: dialogues asked at once.
        session: counts what is done.

    Raises:
        ValueError: an unknown api, or concurrency less than 1.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        chat: Chat,
        api: str,
        top_p: float,
        max_new_tokens: int,
        concurrency: int,
        session: Session,
    ) -> None:
        if api not in APIS:
            raise ValueError(f"api is {api!r} but must be one of {', '.join(APIS)}")
        if concurrency < 1:
            raise ValueError(f"concurrency is {concurrency} but must be at least 1")
        self._endpoint, self._chat, self._api = endpoint, chat, api
        self._top_p, self._max_new_tokens = top_p, max_new_tokens
        self._concurrency, self._session = concurrency, session
        self._unavailable_in_a_row = 0
        self._last_time = 0.0

    def replay(self, dialogues: Sequence[Dialogue], entries: Iterable[dict[str, Any]]) -> None:
        """Bring the dialogues to where the journal ends."""
        for entry in entries:
            dialogue = dialogues[entry["dialogue"]]
            # Behind a line that was damaged everything is asked again.
            if entry["turn"] == len(dialogue.answers):
                dialogue.answers.append(Answer(**entry["answer"]))
                dialogue.finish(dialogue.answers[-1].finish_reason)

    async def run(self, dialogues: Sequence[Dialogue], journal: Journal) -> None:
        """Answer all that can be answered.

        Raises:
            EndpointDownError: the endpoint answers no more.
            ValueError: the endpoint refuses every query.
            OSError: the journal cannot be written.
        """
        waiting = deque(dialogue for dialogue in dialogues if not dialogue.is_done)
        self._session.begin(len(dialogues) - len(waiting), len(dialogues))
        self._last_time = time.perf_counter()
        try:
            async with self._endpoint, asyncio.TaskGroup() as workers:
                for _ in range(min(self._concurrency, len(waiting))):
                    workers.create_task(self._work(waiting, journal))
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _work(self, waiting: deque[Dialogue], journal: Journal) -> None:
        while waiting:
            dialogue = waiting.popleft()
            try:
                while not dialogue.is_done:
                    await self._answer_turn(dialogue, journal)
            except Refused as error:
                dialogue.stop("refused", str(error))
            except Unavailable as error:
                dialogue.failure = str(error)
                await self._check_alive(error)
            self._count(0, ended=1)

    async def _check_alive(self, error: Unavailable) -> None:
        """Tell a query that the server cannot answer from a server that is gone."""
        self._unavailable_in_a_row += 1
        is_alive = await self._endpoint.is_alive()
        if not is_alive or self._unavailable_in_a_row >= max(3, self._concurrency):
            raise EndpointDownError(
                f"the endpoint {self._endpoint.url} answers no more ({error}); finished answers "
                "are kept, and the same command goes on with the others"
            )

    async def _answer_turn(self, dialogue: Dialogue, journal: Journal) -> None:
        answer = await self._next(dialogue)
        if answer is None:
            return
        turn = len(dialogue.answers)
        journal.append({"dialogue": dialogue.index, "turn": turn, "answer": vars(answer)})
        dialogue.answers.append(answer)
        dialogue.finish(answer.finish_reason)
        self._count(len(answer.tokens), ended=0)

    def _count(self, tokens: int, ended: int) -> None:
        now = time.perf_counter()
        self._session.add(tokens, now - self._last_time, ended)
        self._last_time = now

    async def _next(self, dialogue: Dialogue) -> Answer | None:
        """Ask for the next answer; None where the dialogue cannot go on."""
        options = {
            "temperature": dialogue.temperature,
            "top_p": self._top_p,
            "max_tokens": self._max_new_tokens,
            "seed": dialogue.seed % _SEEDS,
        }
        messages = dialogue.next_messages()
        prompt = dialogue.next_prompt(self._chat)
        if not prompt:
            dialogue.stop("template", "the prompt has no tokens")
            return None
        if self._api == "chat" and messages:
            reply = await self._endpoint.chat(messages, options)
            prompt = reply.prompt_token_ids or self._chat.tokens(self._chat.text(messages))
        else:
            reply = await self._endpoint.complete(prompt, options)
        self._unavailable_in_a_row = 0
        if prompt[: len(dialogue.written)] != dialogue.written:
            # The template writes earlier answers in another way than the target did.
            dialogue.stop("template", "")
            return None
        return self._answer(dialogue, reply, prompt, messages)

    def _answer(
        self, dialogue: Dialogue, reply: Reply, prompt: list[int], messages: Sequence[Message]
    ) -> Answer:
        has_ended, is_retokenized = reply.finish_reason == "stop", reply.token_ids is None
        tokens = reply.token_ids or self._retokenized(dialogue, reply.text, prompt, messages)
        if has_ended and not self._chat.is_end(tokens[-1:]):
            end = self._chat.end_of_turn(messages)
            tokens, is_retokenized = [*tokens, *([] if end is None else [end])], True
        if not tokens:
            raise Refused("the answer is empty")
        num_tokens = reply.num_tokens if reply.token_ids is None else len(tokens)
        was_cut = num_tokens is not None and num_tokens < self._max_new_tokens
        reason = "eos" if has_ended else "context" if was_cut else "length"
        return Answer(prompt, tokens, reason, reply.text, is_retokenized)

    def _retokenized(
        self, dialogue: Dialogue, text: str, prompt: list[int], messages: Sequence[Message]
    ) -> list[int]:
        """Tokens of the answer, as they come out of prompt and answer read together."""
        chat = self._chat
        if messages:
            whole = chat.tokens(chat.text(messages) + text)
        else:
            whole = chat.raw_tokens(dialogue.query.text + text)
        if whole[: len(prompt)] != prompt:
            raise Refused(
                "prompt and answer read together do not begin with the tokens of the prompt; use "
                "a server that gives token ids, such as vLLM"
            )
        return whole[len(prompt) :]
