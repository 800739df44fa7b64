"""Answers of a target in this process: batched, and journalled token by token."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from specdec.data.chat import Chat
from specdec.data.dialogue import Answer, Dialogue
from specdec.data.journal import Journal
from specdec.decode import Chunk, Stream
from specdec.interfaces import Drafter, Target
from specdec.sampling_config import SamplingConfig

# Rows of one call of the loop, in batches: enough that its end, where the batch runs empty, is
# less than a hundredth of it, and few enough that what the loop remembers of them stays small.
BATCHES_PER_CALL = 64


@dataclass
class Session:
    """What was done since the command was given.

    Attributes:
        tokens: emitted.
        seconds: of decoding.
        forwards: of the target, counted once for every row in it, prefill left out.
    """

    tokens: int = 0
    seconds: float = 0.0
    forwards: int = 0
    prefills: int = 0

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens emitted a second; None if nothing was."""
        return self.tokens / self.seconds if self.seconds else None

    @property
    def tau(self) -> float | None:
        """Tokens emitted per forward of a row; None if there was no forward."""
        return (self.tokens - self.prefills) / self.forwards if self.forwards else None


class LocalAnswers:
    """Answers dialogues with a target and a drafter.

    The rule is "match" and a row's random numbers are a function of its seed and the position: a
    row that was killed and goes on behind its journalled tokens draws what it would have drawn.

    Args:
        target: has a tokenizer.
        drafter: None to decode plainly. It changes the speed alone.
        top_p: of the sampled answers.
        max_new_tokens: of an answer.
        batch_size: rows decoded together.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        top_p: float,
        max_new_tokens: int,
        batch_size: int,
    ) -> None:
        self._target, self._drafter = target, drafter
        self._chat = Chat(target.tokenizer, target.eos_token_ids)
        self._top_p, self._max_new_tokens = top_p, max_new_tokens
        self._batch_size = batch_size
        self.session = Session()

    def replay(self, dialogues: Sequence[Dialogue], entries: Iterable[dict[str, Any]]) -> None:
        """Bring the dialogues to where the journal ends."""
        for entry in entries:
            for index, turn, start, tokens, finish_reason in entry.get("step", ()):
                dialogue = dialogues[index]
                if not dialogue.open_answer and turn == len(dialogue.answers):
                    self._open(dialogue)
                answer = dialogue.open_answer
                # Behind a line that was damaged everything is written again.
                if answer and turn == len(dialogue.answers) - 1 and start == len(answer.tokens):
                    self._add(dialogue, answer, tokens, finish_reason)

    def run(
        self,
        dialogues: Sequence[Dialogue],
        journal: Journal,
        progress: Callable[[int, int, str], None],
    ) -> None:
        """Answer all that can be answered; a turn of all dialogues after the other.

        Raises:
            OSError: the journal cannot be written.
            FloatingPointError: the target's logits are not finite.
        """
        while True:
            for dialogue in dialogues:
                if not dialogue.is_done and not dialogue.open_answer:
                    self._open(dialogue)
            ready = [dialogue for dialogue in dialogues if dialogue.open_answer]
            if not ready:
                return
            done = _Counted(len(dialogues), sum(d.is_done for d in dialogues), progress)
            # Begun rows first; then by length: rows that join together pad little, and a target
            # that has no memory for the longest says so at once.
            ready.sort(key=lambda d: (not d.answers[-1].tokens, -_length(d.answers[-1])))
            size = BATCHES_PER_CALL * self._batch_size
            for first in range(0, len(ready), size):
                self._run(ready[first : first + size], journal, done)

    def _open(self, dialogue: Dialogue) -> None:
        try:
            prompt = self._prompt(dialogue)
        except ValueError as error:
            if dialogue.answers:
                prompt = None
            else:
                dialogue.failure = str(error)
                return
        dialogue.open(prompt, self._target.max_context_len)

    def _prompt(self, dialogue: Dialogue) -> list[int] | None:
        """Tokens in front of the next answer."""
        turn, asked = len(dialogue.answers), dialogue.asked
        if not dialogue.query.messages:
            return list(self._target.tokenizer(dialogue.query.text)["input_ids"])
        if not turn:
            return self._chat.tokens(self._chat.text(asked[0]))
        before = dialogue.answers[-1]
        more = self._chat.follow_up(asked[: turn + 1], before.tokens[-1])
        return None if more is None else before.prompt + before.tokens + more

    def _run(self, dialogues: Sequence[Dialogue], journal: Journal, done: "_Counted") -> None:
        answers = [dialogue.answers[-1] for dialogue in dialogues]
        self.session.prefills += len(answers)
        begun = time.perf_counter()
        for chunks in self._stream(dialogues, answers).steps():
            journal.append({"step": list(self._added(chunks, dialogues, answers))})
            self.session.forwards += len(chunks)
            self.session.tokens += sum(len(chunk.tokens) for chunk in chunks)
            now = time.perf_counter()
            self.session.seconds += now - begun
            begun = now
            ended = sum(bool(c.finish_reason) and dialogues[c.index].is_done for c in chunks)
            done.add(ended, self.session)
        self.session.forwards -= len(answers)

    def _stream(self, dialogues: Sequence[Dialogue], answers: Sequence[Answer]) -> Stream:
        return Stream(
            self._target,
            self._drafter,
            [answer.prompt + answer.tokens for answer in answers],
            [SamplingConfig(d.temperature, top_p=self._top_p, seed=d.seed) for d in dialogues],
            max_new_tokens=[self._max_new_tokens - len(answer.tokens) for answer in answers],
            batch_size=self._batch_size,
            rule="match",
        )

    def _added(
        self, chunks: Sequence[Chunk], dialogues: Sequence[Dialogue], answers: Sequence[Answer]
    ) -> Iterator[list[Any]]:
        """Add a step's tokens to their answers; what the journal holds of each."""
        for chunk in chunks:
            dialogue, answer = dialogues[chunk.index], answers[chunk.index]
            turn, start = len(dialogue.answers) - 1, len(answer.tokens)
            self._add(dialogue, answer, chunk.tokens, chunk.finish_reason)
            yield [dialogue.index, turn, start, chunk.tokens, chunk.finish_reason]

    def _add(
        self, dialogue: Dialogue, answer: Answer, tokens: list[int], finish_reason: str | None
    ) -> None:
        answer.tokens += tokens
        if finish_reason:
            was_cut = finish_reason == "length" and len(answer.tokens) < self._max_new_tokens
            dialogue.finish("context" if was_cut else finish_reason)


def _length(answer: Answer) -> int:
    return len(answer.prompt) + len(answer.tokens)


class _Counted:
    """Dialogues that are done, counted as they end and told to whoever shows it.

    Args:
        total: dialogues in all.
        done: of them, those that are done already.
        progress: called with both, and a text.
    """

    def __init__(self, total: int, done: int, progress: Callable[[int, int, str], None]) -> None:
        self._total, self._done, self._progress = total, done, progress

    def add(self, ended: int, session: Session) -> None:
        """Count what has ended."""
        self._done += ended
        rate = session.tokens_per_s or 0
        self._progress(self._done, self._total, f"{session.tokens:,} tokens, {rate:,.0f}/s")
