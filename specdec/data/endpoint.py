"""Answers of an OpenAI-compatible server, asked again where that can help."""

import asyncio
import random
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import aclosing, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn
from urllib.parse import urlsplit

import httpx
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt

from specdec.checkpoints import TargetIdentity
from specdec.checkpoints.identity import hash_of_vocabulary
from specdec.common.config import validated
from specdec.common.files import Journal
from specdec.common.messages import Message
from specdec.common.provenance import CodeProvenance, code
from specdec.data.answers import AnswerSettings, AskedEndpoint
from specdec.data.dialogue import Answer, Chat, Dialogue
from specdec.data.regenerate import EndpointDownError, Session

_PASSING = (408, 409, 429)  # a timeout, a conflict, too many requests
_FATAL = (401, 403, 404)  # wrong for every query: the key, the URL or the model
_TAKEN_OUT = ("reasoning_content", "reasoning", "tool_calls")  # of a message's text
_FIRST_WAIT_S, _LONGEST_WAIT_S, _LONGEST_ASKED_WAIT_S = 1.0, 60.0, 600.0
_SEEDS = 2**31  # servers take 32 bits with a sign


class Refused(Exception):  # noqa: N818 (it ends one query, not the run)
    """The server will not answer this query, however often it is asked."""


class Unavailable(Exception):  # noqa: N818
    """The server could not answer now; `wait_s` is what it asked to wait, if it did."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


def checked_url(url: str) -> str:
    """The URL without a slash at its end; a `ValueError` if it is none, or holds a secret."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"endpoint is {url!r} but must be a URL, as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query:
        what = "a user name, a password or a query, which would be written down"
        raise ValueError(f"endpoint holds {what}; use --api-key-variable")
    return url.rstrip("/")


def raise_refusal(reply: httpx.Response, url: str, model: str, api_key: str) -> NoReturn:
    """Raise what a request that was not answered means, without the key."""
    status, reason = reply.status_code, f"HTTP {reply.status_code}: {_brief(reply)}"
    reason = reason.replace(api_key, "***") if api_key else reason
    if status in _PASSING or status >= 500:
        raise Unavailable(reason, _retry_after_s(reply))
    if status in _FATAL:
        fix = "check --endpoint (up to and with /v1), --model and --api-key-variable"
        raise ValueError(f"{url} refuses model {model!r} ({reason}); {fix}")
    raise Refused(reason)


class Endpoint:
    """Asks a server for completions; what may pass is tried again, as `_wait_s` says."""

    def __init__(
        self,
        url: str,
        model: str,
        api_key: str = "",
        attempts: int = 6,
        timeout_s: float = 600.0,
        concurrency: int = 16,
    ) -> None:
        if min(attempts, concurrency) < 1 or timeout_s <= 0:
            given = f"attempts is {attempts}, concurrency {concurrency}, timeout {timeout_s}"
            raise ValueError(f"{given}, but must be at least 1, 1 and above 0 seconds")
        self.url, self.model, self.concurrency = checked_url(url), model, concurrency
        self._api_key, self._asks_for_ids = api_key, True
        self._attempts = AsyncRetrying(
            stop=stop_after_attempt(attempts),
            wait=_wait_s,
            retry=retry_if_exception_type(Unavailable),
            reraise=True,
        )
        self.client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, 10.0), pool=None),
            limits=httpx.Limits(max_connections=concurrency),
        )

    async def ask(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return await self._attempts.copy()(self._post, path, {"model": self.model, **body})

    async def is_alive(self) -> bool:
        try:
            reply = await self.client.get(f"{self.url}/models", timeout=10.0)
        except httpx.HTTPError:
            return False
        return reply.status_code < 500

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        asked = {**body, "return_token_ids": True} if self._asks_for_ids else body
        try:
            reply = await self.client.post(f"{self.url}/{path}", json=asked)
        except httpx.TransportError as error:
            raise Unavailable(f"{type(error).__name__} {error}".strip()) from error
        if reply.is_success:
            try:
                content = reply.json()
            except ValueError as error:
                # A proxy in front of a server that is going down answers with pages like that.
                raise Unavailable(f"the answer is no JSON: {_brief(reply)!r:.100}") from error
            if not isinstance(content, dict) or not content.get("choices"):
                raise Refused(f"the answer holds no choices: {_brief(reply)!r}")
            return content
        if "return_token_ids" in asked and "return_token_ids" in reply.text:
            self._asks_for_ids = False  # a server that takes no field it does not know
            return await self._post(path, body)
        raise_refusal(reply, self.url, self.model, self._api_key)


def _brief(reply: httpx.Response) -> str:
    return " ".join(reply.text.split())[:300]


def _wait_s(state: RetryCallState) -> float:
    """Wait as long as the server asks, else twice as long as before, blurred."""
    error = state.outcome.exception() if state.outcome else None
    doubled = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2.0 ** (state.attempt_number - 1))
    blurred = doubled * random.uniform(0.5, 1.5)
    asked = error.wait_s if isinstance(error, Unavailable) else None
    return blurred if asked is None else min(asked, _LONGEST_ASKED_WAIT_S) + 0.1 * blurred


def _retry_after_s(reply: httpx.Response) -> float | None:
    text = reply.headers.get("retry-after", "")
    with suppress(ValueError):
        return max(0.0, float(text))
    with suppress(ValueError, TypeError):
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    return None


def _ids(given: Any) -> list[int]:
    is_list = isinstance(given, list) and all(type(token) is int and token >= 0 for token in given)
    return given if is_list else []


class EndpointAnswers:
    """Answers dialogues through an endpoint, as many at once as it takes."""

    def __init__(
        self, endpoint: Endpoint, chat: Chat, settings: AnswerSettings, api: str = "chat"
    ) -> None:
        self.chat, self.settings, self.batch_size = chat, settings, endpoint.concurrency
        asked = {"url": endpoint.url, "model": endpoint.model, "api": api}
        self.endpoint: AskedEndpoint | None = validated(AskedEndpoint, asked, noun="endpoint's")
        vocabulary = hash_of_vocabulary(chat.tokenizer)
        self.target = TargetIdentity(endpoint.model, None, tokenizer=vocabulary)
        self.facts = {"endpoint": endpoint.url, "model": endpoint.model, "api": api}
        packages = ("specdec", "transformers", "tokenizers", "httpx")
        self.provenance = CodeProvenance(**code(packages))
        self._server = endpoint
        self._unavailable_in_a_row = 0

    def replay(self, dialogues: Sequence[Dialogue], entries: Iterable[dict[str, Any]]) -> None:
        for entry in entries:
            dialogue = dialogues[entry["dialogue"]]
            # Behind a line that was damaged everything is asked again.
            if entry["turn"] == len(dialogue.answers):
                dialogue.answers.append(Answer(**entry["answer"]))
                dialogue.finish(dialogue.answers[-1].finish_reason)

    def run(self, dialogues: Sequence[Dialogue], journal: Journal, session: Session) -> None:
        waiting = deque(dialogue for dialogue in dialogues if not dialogue.is_done)
        session.begin(dialogues)

        async def answer_all() -> None:
            async with aclosing(self._server.client), asyncio.TaskGroup() as workers:
                for _ in range(min(self.batch_size, len(waiting))):
                    workers.create_task(self._work(waiting, journal, session))

        try:
            asyncio.run(answer_all())
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _work(self, waiting: deque[Dialogue], journal: Journal, session: Session) -> None:
        while waiting:
            dialogue = waiting.popleft()
            try:
                while not dialogue.is_done:
                    await self._answer_turn(dialogue, journal, session)
            except Refused as error:
                dialogue.stop("refused", str(error))
            except Unavailable as error:
                dialogue.failure = str(error)
                # It may be this query that the server cannot answer, or the server may be gone.
                self._unavailable_in_a_row += 1
                is_alive = await self._server.is_alive()
                if not is_alive or self._unavailable_in_a_row >= max(3, self.batch_size):
                    what = f"answers no more ({error}); give the same command again, it goes on"
                    raise EndpointDownError(f"the endpoint {self._server.url} {what}") from error
            session.add(ended=1)

    async def _answer_turn(self, dialogue: Dialogue, journal: Journal, session: Session) -> None:
        messages, prompt = dialogue.next_messages(), dialogue.next_prompt(self.chat)
        if not prompt:
            return
        body: dict[str, Any] = {
            "temperature": dialogue.temperature,
            "top_p": self.settings.top_p,
            "max_tokens": self.settings.max_new_tokens,
            "seed": dialogue.seed % _SEEDS,
        }
        if self.facts["api"] == "chat" and messages:
            reply = await self._server.ask("chat/completions", {"messages": messages, **body})
            given = reply.get("prompt_token_ids") or reply["choices"][0].get("prompt_token_ids")
            prompt = _ids(given) or self.chat.tokens(self.chat.text(messages))
        else:
            reply = await self._server.ask("completions", {"prompt": prompt, **body})
        self._unavailable_in_a_row = 0
        if prompt[: len(dialogue.written)] != dialogue.written:
            # The template writes earlier answers in another way than the target did.
            dialogue.stop("template", "")
            return
        answer = self._answer(dialogue, reply, prompt, messages)
        turn = len(dialogue.answers)
        journal.append({"dialogue": dialogue.index, "turn": turn, "answer": vars(answer)})
        dialogue.answers.append(answer)
        dialogue.finish(answer.finish_reason)
        session.add(len(answer.tokens))

    def _answer(
        self, dialogue: Dialogue, reply: dict[str, Any], prompt: list[int], messages: list[Message]
    ) -> Answer:
        chat, choice = self.chat, reply["choices"][0]
        message = choice.get("message") or {"content": choice.get("text")}
        text = message["content"] if isinstance(message.get("content"), str) else ""
        tokens, reason = _ids(choice.get("token_ids")), choice.get("finish_reason")
        is_retokenized = not tokens
        num_written: int | None = len(tokens)
        if is_retokenized:
            if any(message.get(part) for part in _TAKEN_OUT):
                fix = "serve it without these parsers, or use --api completion"
                raise Refused(f"the server took reasoning or tool calls out of the text; {fix}")
            num_written = (reply.get("usage") or {}).get("completion_tokens")
            # Prompt and answer are read together.
            before = chat.text(messages) if messages else dialogue.query.text
            whole = chat.tokens(before + text, special=not messages)
            if whole[: len(prompt)] != prompt:
                what = "prompt and answer read together do not begin with the tokens of the prompt"
                raise Refused(f"{what}; use a server that gives token ids, such as vLLM")
            tokens = whole[len(prompt) :]
        if reason in ("stop", "tool_calls"):
            if not chat.ends.intersection(tokens[-1:]):
                tokens, is_retokenized = [*tokens, *chat.end_of_turn(messages)], True
            reason = "eos"
        elif reason != "length":
            raise Refused(f"the answer ended by {reason!r}, which is not the target's own end")
        elif num_written is not None and num_written < self.settings.max_new_tokens:
            reason = "context"
        if not tokens:
            raise Refused("the answer is empty")
        return Answer(prompt, tokens, reason, text, is_retokenized)
