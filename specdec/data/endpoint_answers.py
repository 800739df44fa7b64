"""Answers of a target behind an endpoint: many asked at once, each journalled as it comes."""

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from specdec.bench.prompt import Message
from specdec.data.chat import Chat
from specdec.data.dialogue import Answer, Dialogue
from specdec.data.endpoint import Endpoint, Refused, Reply, Unavailable
from specdec.data.journal import Journal
from specdec.data.session import Session

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
