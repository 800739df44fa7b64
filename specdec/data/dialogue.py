"""A query on its way to a row of answers: its turns, its answers so far, how it ended."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from specdec.common.hub import find_checkpoint
from specdec.common.messages import Message, Query
from specdec.demo import demo_path
from specdec.targets.load import load_tokenizer

# Stands for an answer in a rendered conversation; no template changes or holds its text.
_MARK = {"role": "assistant", "content": "specdec\u2060answer"}


class Chat:
    """A tokenizer with its chat template, and the tokens that `ends` an answer."""

    def __init__(self, tokenizer: Any, eos_token_ids: Sequence[int]) -> None:
        self.tokenizer, self.ends = tokenizer, frozenset(eos_token_ids)

    def text(self, messages: Sequence[Message], ends_open: bool = True) -> str:
        """Render the conversation up to where the answer begins; ValueError if that is refused."""
        from jinja2 import TemplateError

        options = {"add_generation_prompt": ends_open, "tokenize": False}
        try:
            return str(self.tokenizer.apply_chat_template(list(messages), **options))
        except TemplateError as error:
            raise ValueError(f"the chat template refuses it: {error}") from error

    def tokens(self, text: str, special: bool = False) -> list[int]:
        """Encode text; rendered text holds its special tokens already, a completion does not."""
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def follow_up(self, asked: Sequence[Sequence[Message]], last_token: int) -> list[int] | None:
        """Find the tokens between an answer and the next one, the end of the turn left out.

        None where the template does not go on behind the answer's last token: no conversation with
        this answer could look like that.
        """
        tokens = self._behind_mark([message for turn in asked for message in (*turn, _MARK)][:-1])
        return tokens[1:] if tokens[:1] == [last_token] else None

    def _behind_mark(self, messages: Sequence[Message], ends_open: bool = True) -> list[int]:
        _, found, tail = self.text(messages, ends_open).rpartition(_MARK["content"])
        return self.tokens(tail) if found else []

    def end_of_turn(self, messages: Sequence[Message]) -> list[int]:
        """Find the token with which the target ends an answer to these messages, if there is one.

        It is what the template puts behind an answer, the tokenizer's own end of text if it puts
        nothing there or if there are no messages.
        """
        if messages:
            first = self._behind_mark([*messages, _MARK], ends_open=False)[:1]
            if self.ends.intersection(first):
                return first
        own = self.tokenizer.eos_token_id
        return [] if own is None else [own]


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
    prompt: list[int]  # earlier answers included
    tokens: list[int] = field(default_factory=list)  # its end-of-turn token included
    finish_reason: str = ""  # "eos", "length", "context" (it is full); empty while unfinished
    text: str | None = None  # as an endpoint gave it
    is_retokenized: bool = False  # made from the text, and perhaps not as they were sampled

    @property
    def whole(self) -> list[int]:
        return self.prompt + self.tokens


@dataclass
class Dialogue:
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
        is_open = self.answers and not self.answers[-1].finish_reason
        return self.answers[-1] if is_open else None

    @property
    def is_done(self) -> bool:
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
    def written(self) -> list[int]:
        """All tokens up to the end of the last answer; none before the first."""
        return self.answers[-1].whole if self.answers else []

    def next_prompt(self, chat: Chat) -> list[int]:
        """Find the tokens in front of the next answer; without any the dialogue has ended."""
        turn, more, reason = len(self.answers), None, "the prompt has no tokens"
        try:
            if not self.query.messages:
                more = chat.tokens(self.query.text, special=True)
            elif not turn:
                more = chat.tokens(chat.text(self.asked[0]))
            else:
                more = chat.follow_up(self.asked[: turn + 1], self.answers[-1].tokens[-1])
        except ValueError as error:
            reason = str(error)
        if more is None or not (more or turn):
            self.stop("template", reason)
            return []
        return self.written + more

    def next_messages(self) -> list[Message]:
        messages: list[Message] = []
        for turn, answer in zip(self.asked, self.answers, strict=False):
            messages += [*turn, {"role": "assistant", "content": answer.text or ""}]
        return messages + self.asked[len(self.answers)]

    def stop(self, ended_by: str, reason: str) -> None:
        """Ask nothing more; a query without any answer has failed, for this reason."""
        if self.answers:
            self.ended_by = ended_by
        else:
            self.failure = reason

    def finish(self, reason: str) -> None:
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
    for split, query in ((split, query) for split, found in queries.items() for query in found):
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
    if not query.messages:
        if not query.text.strip():
            raise ValueError("the query is empty")
        return [[]]
    ends = [i + 1 for i, message in enumerate(query.messages) if message["role"] == "user"]
    if not ends or not query.messages[ends[-1] - 1]["content"].strip():
        raise ValueError("the query has no user turn with any text")
    messages = query.messages[: ends[-1]]
    if turns == "last":
        return [list(messages)]
    # Recorded answers are dropped; what users said in a row is asked in a row.
    groups: list[list[Message]] = [[]]
    for message in messages:
        if message["role"] in ("system", "developer", "user"):
            groups[-1].append(message)
        elif message["role"] != "assistant":
            what = f"a {message['role']!r} message answers what another model did"
            raise ValueError(f"{what}, which the target may not do; use turns=last")
        elif any(each["role"] == "user" for each in groups[-1]):
            groups.append([])
    return groups
