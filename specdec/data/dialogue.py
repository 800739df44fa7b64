"""A query on its way to a row of answers: its turns, its answers so far, how it ended."""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from specdec.common.hub import find_checkpoint
from specdec.common.messages import Message, Query
from specdec.demo import demo_path
from specdec.targets.load import load_tokenizer

# Stands for an answer in a rendered conversation; no template changes or holds it.
_MARK = "specdec\u2060answer"


class Chat:
    """A tokenizer with its chat template."""

    def __init__(self, tokenizer: Any, eos_token_ids: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self._eos = frozenset(eos_token_ids)

    def text(self, messages: Sequence[Message]) -> str:
        """Render the conversation up to where the answer begins; ValueError if that is refused."""
        return self._render(messages, add_generation_prompt=True)

    def _render(self, messages: Sequence[Message], **options: bool) -> str:
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
        except TemplateError as error:
            raise ValueError(f"the chat template refuses it: {error}") from error
        return str(text)

    def tokens(self, text: str) -> list[int]:
        """Encode rendered text, which holds its special tokens already."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def raw_tokens(self, text: str) -> list[int]:
        """Encode a text that is continued as it is, with the special tokens in front."""
        return list(self.tokenizer(text)["input_ids"])

    def follow_up(self, asked: Sequence[Sequence[Message]], last_token: int) -> list[int] | None:
        """Find the tokens between an answer and the next one, the end of the turn left out.

        None where the template does not go on behind the answer's last token: no conversation with
        this answer could look like that.
        """
        mark: Message = {"role": "assistant", "content": _MARK}
        messages = [message for turn in asked for message in (*turn, mark)][:-1]
        _, found, tail = self.text(messages).rpartition(_MARK)
        tokens = self.tokens(tail)
        if not found or tokens[:1] != [last_token]:
            return None
        return tokens[1:]

    def is_end(self, tokens: Sequence[int]) -> bool:
        """Tell whether this is a single token that ends an answer."""
        return len(tokens) == 1 and tokens[0] in self._eos

    def end_of_turn(self, messages: Sequence[Message]) -> int | None:
        """Find the token with which the target ends an answer to these messages, if there is one.

        It is what the template puts behind an answer, the tokenizer's own end of text if it puts
        nothing there or if there are no messages.
        """
        if messages:
            mark: Message = {"role": "assistant", "content": _MARK}
            tail = self._render([*messages, mark]).rpartition(_MARK)[2]
            first = self.tokens(tail)[:1]
            if first and first[0] in self._eos:
                return first[0]
        own: int | None = self.tokenizer.eos_token_id
        return own


def load_chat(path: str) -> Chat:
    """Load the chat of a target whose weights are elsewhere."""
    from transformers import GenerationConfig

    wanted = "a folder with the target's tokenizer"
    where = str(demo_path("target")) if path == "demo" else find_checkpoint(path, wanted)
    tokenizer = load_tokenizer(where, None, False)
    if tokenizer is None:
        raise ValueError(f"{path!r} holds no tokenizer; give a folder with the target's")
    try:
        ends = GenerationConfig.from_pretrained(where).eos_token_id
    except OSError:
        ends = None
    known = ends if isinstance(ends, list) else [ends]
    return Chat(tokenizer, [end for end in (*known, tokenizer.eos_token_id) if end is not None])


@dataclass
class Answer:
    """An answer of the target, finished or not."""

    prompt: list[int]  # earlier answers included
    tokens: list[int] = field(default_factory=list)  # its end-of-turn token included
    finish_reason: str = ""  # "eos", "length", "context" (it is full); empty while unfinished
    text: str | None = None  # as an endpoint gave it
    is_retokenized: bool = False  # made from the text, and perhaps not as they were sampled


@dataclass
class Dialogue:
    """A query, its answers, and how they are sampled."""

    index: int  # among all queries of all splits
    split: str
    query: Query
    asked: list[list[Message]]  # messages in front of every answer; [[]] for a completion
    temperature: float
    seed: int
    answers: list[Answer] = field(default_factory=list)
    failure: str = ""  # why it has no answer
    ended_by: str = ""  # why turns that are left cannot be asked: "context", "template", "refused"

    @property
    def open_answer(self) -> Answer | None:
        """The answer that is being written."""
        is_open = self.answers and not self.answers[-1].finish_reason
        return self.answers[-1] if is_open else None

    @property
    def is_done(self) -> bool:
        """True if nothing is left to ask."""
        if self.failure or self.ended_by:
            return True
        if self.open_answer or not self.answers:
            return False
        # Behind an answer that the target did not end itself nothing can be asked.
        return len(self.answers) == len(self.asked) or self.answers[-1].finish_reason != "eos"

    @property
    def kept(self) -> list[Answer]:
        """Finished answers that are worth training on: none that the context cut."""
        return [each for each in self.answers if each.finish_reason not in ("", "context")]

    @property
    def num_unanswered(self) -> int:
        """Turns of a dialogue that has not failed but have no answer of their own."""
        return 0 if self.failure else len(self.asked) - len(self.kept)

    def next_prompt(self, chat: Chat) -> list[int] | None:
        """Tokens in front of the next answer; None where the chat template cannot ask for one."""
        turn = len(self.answers)
        try:
            if not self.query.messages:
                return chat.raw_tokens(self.query.text)
            if not turn:
                return chat.tokens(chat.text(self.asked[0]))
            before = self.answers[-1]
            more = chat.follow_up(self.asked[: turn + 1], before.tokens[-1])
        except ValueError as error:
            if not turn:
                self.failure = str(error)
            return None
        return None if more is None else self.written + more

    def next_messages(self) -> list[Message]:
        """Make the conversation in front of the next answer, with the texts of the earlier ones."""
        messages: list[Message] = []
        for turn, answer in zip(self.asked, self.answers, strict=False):
            messages += [*turn, {"role": "assistant", "content": answer.text or ""}]
        return messages + self.asked[len(self.answers)]

    @property
    def written(self) -> list[int]:
        """All tokens up to the end of the last answer; none before the first."""
        return self.answers[-1].prompt + self.answers[-1].tokens if self.answers else []

    def open(self, prompt: list[int] | None, max_context_len: int) -> None:
        """Begin the next answer; None where the chat template cannot ask for one."""
        if not prompt:
            self.stop("template", "the prompt has no tokens")
        elif len(prompt) >= max_context_len:
            self.stop(
                "context",
                f"the prompt has {len(prompt)} tokens but the target's context holds "
                f"{max_context_len}, new tokens included",
            )
        else:
            self.answers.append(Answer(prompt))

    def stop(self, ended_by: str, reason: str) -> None:
        """Ask nothing more; a query without any answer has failed, for this reason."""
        if self.answers:
            self.ended_by = ended_by
        else:
            self.failure = self.failure or reason

    def finish(self, reason: str) -> None:
        """End the open answer."""
        answer = self.answers[-1]
        answer.finish_reason = reason
        if not self.kept:
            self.failure = (
                f"the target's context was full after {len(answer.prompt)} tokens of the prompt "
                f"and {len(answer.tokens)} of the answer"
            )


def plan_dialogues(
    queries: Mapping[str, list[Query]], temperatures: Sequence[float], seed: int, turns: str
) -> list[Dialogue]:
    """Make a dialogue of every query, in order; what can never be answered carries its failure.

    A query's temperature and seed are decided by its id and the seed: they do not depend on the
    queries around it.
    """
    planned: list[Dialogue] = []
    for split, members in queries.items():
        for query in members:
            mark = int.from_bytes(hashlib.sha256(f"{seed}\n{query.id}".encode()).digest()[:16])
            chosen, row_seed = mark % len(temperatures), (mark >> 64) % 2**63
            dialogue = Dialogue(len(planned), split, query, [[]], temperatures[chosen], row_seed)
            try:
                dialogue.asked = _asked(query, turns)
            except ValueError as error:
                dialogue.failure = str(error)
            planned.append(dialogue)
    return planned


def _asked(query: Query, turns: str) -> list[list[Message]]:
    """Find the messages in front of every answer."""
    if not query.messages:
        if not query.text.strip():
            raise ValueError("the query is empty")
        return [[]]
    ends = [i + 1 for i, message in enumerate(query.messages) if message["role"] == "user"]
    if not ends or not query.messages[ends[-1] - 1]["content"].strip():
        raise ValueError("the query has no user turn with any text")
    messages = [dict(message) for message in query.messages[: ends[-1]]]
    return [messages] if turns == "last" else _user_turns(messages)


def _user_turns(messages: list[Message]) -> list[list[Message]]:
    """Drop recorded answers; what users said in a row is asked in a row."""
    groups: list[list[Message]] = [[]]
    for message in messages:
        role = message["role"]
        if role == "assistant":
            if any(each["role"] == "user" for each in groups[-1]):
                groups.append([])
        elif role in ("system", "developer", "user"):
            groups[-1].append(message)
        else:
            raise ValueError(
                f"a {role!r} message answers what another model did, and does not fit the "
                "target's own answers; use turns=last"
            )
    return groups


class EndpointDownError(RuntimeError):
    """The endpoint answers no more; what it has answered is kept."""


Progress = Callable[[int, int, str], None]


class Session:
    """Counts since the command was given; what earlier ones did is not in it."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._done = self._total = 0
        self.tokens = self.prefills = self.forwards = 0
        self.seconds = self._last_time = 0.0

    def begin(self, done: int, total: int) -> None:
        """Say how many dialogues there are, and how many are done already."""
        self._done, self._total, self._last_time = done, total, time.perf_counter()
        self._show()

    def add(self, tokens: int, ended: int) -> None:
        """Count new tokens, the time since the last call, and dialogues that have ended."""
        now = time.perf_counter()
        self.seconds += now - self._last_time
        self._last_time = now
        self.tokens += tokens
        self._done += ended
        self._show()

    def _show(self) -> None:
        rate = self.tokens_per_s or 0
        self._progress(self._done, self._total, f"{self.tokens:,} tokens, {rate:,.0f}/s")

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens emitted a second; None if nothing was."""
        return self.tokens / self.seconds if self.tokens and self.seconds else None

    @property
    def tau(self) -> float | None:
        """Tokens emitted per forward of a row; None if there was no forward."""
        return (self.tokens - self.prefills) / self.forwards if self.forwards else None
