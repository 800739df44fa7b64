"""A query on its way to a row of answers: its turns, what the target wrote so far, how it ended."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from specdec.bench.prompt import Message
from specdec.data.chat import Chat
from specdec.data.query import Query

TURNS = ("last", "all")


@dataclass
class Answer:
    """What the target wrote, finished or not.

    Attributes:
        prompt: token ids in front of it, earlier answers included.
        tokens: of the answer, its end-of-turn token included.
        finish_reason: "eos", "length", or "context" where the target's context was full; empty
            while the answer is unfinished.
        text: as an endpoint gave it; None where only tokens are known.
        is_retokenized: the tokens were made from the text and may not be those that were sampled.
    """

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""
    text: str | None = None
    is_retokenized: bool = False


@dataclass
class Dialogue:
    """A query, its answers, and how they are sampled.

    Attributes:
        index: its place among all queries of all splits.
        split: "train" or "held_out".
        query: what is answered.
        asked: the messages in front of every answer; a single empty entry for a completion.
        temperature: of all its answers.
        seed: of all its answers.
        answers: in order; the last one may be unfinished.
        failure: why it has no answer; empty if it has or still may have one.
        ended_by: why turns that are left cannot be asked: "context" for lack of room, "template"
            if the chat template does not go on behind the answer as the target wrote it, "refused"
            by an endpoint; empty otherwise.
    """

    index: int
    split: str
    query: Query
    asked: list[list[Message]]
    temperature: float
    seed: int
    answers: list[Answer] = field(default_factory=list)
    failure: str = ""
    ended_by: str = ""

    @property
    def open_answer(self) -> Answer | None:
        """The answer that is being written."""
        is_open = self.answers and not self.answers[-1].finish_reason
        return self.answers[-1] if is_open else None

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to ask."""
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
        """The conversation in front of the next answer, with the texts of the earlier ones."""
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

    def row(self, tokenizer: Any) -> dict[str, Any]:
        """The row of an answers file; there is at least one answer to keep."""
        last = self.kept[-1]
        spans = [[len(each.prompt), len(each.prompt) + len(each.tokens)] for each in self.kept]
        texts = [_text(each, tokenizer) for each in self.kept]
        row = {
            "id": self.query.id,
            "domain": self.query.domain,
            "language": self.query.language,
            "tokens": last.prompt + last.tokens,
            "answers": spans,
            "temperature": self.temperature,
            "seed": self.seed,
            "finish_reason": self.ended_by or self.answers[-1].finish_reason,
            "text": "\n".join(texts),
        }
        return {**row, "retokenized": True} if any(a.is_retokenized for a in self.kept) else row


def _text(answer: Answer, tokenizer: Any) -> str:
    if answer.text is not None:
        return answer.text
    return str(tokenizer.decode(answer.tokens, skip_special_tokens=True)) if tokenizer else ""


def plan_dialogues(
    queries: dict[str, list[Query]], temperatures: Sequence[float], seed: int, turns: str
) -> list[Dialogue]:
    """One dialogue a query, in order; what can never be answered carries its failure.

    A query's temperature and seed are decided by its id and the seed: they do not depend on the
    queries around it.

    Args:
        queries: split -> queries.
        temperatures: each query gets one of them.
        seed: another one gives other temperatures and other samples.
        turns: "last" answers the last user turn, after the recorded ones; "all" answers every
            user turn, after the answers that the target itself gave before.
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
    """The messages in front of every answer."""
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
    """Recorded answers dropped; what users said in a row is asked in a row."""
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
