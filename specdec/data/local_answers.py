"""Answers of a target in this process: batched, and journalled token by token."""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from specdec.common.files import Journal
from specdec.data.dialogue import Answer, Chat, Dialogue, Session
from specdec.engine.decode import Chunk, Stream
from specdec.engine.interfaces import Drafter, Target
from specdec.sampling.config import SamplingConfig

# Rows of one call of the loop, in batches: enough that its end, where the batch runs empty, is
# less than a hundredth of it, and few enough that what the loop remembers of them stays small.
BATCHES_PER_CALL = 64


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
        session: counts what is done.

    Raises:
        ValueError: batch_size is less than 1.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        top_p: float,
        max_new_tokens: int,
        batch_size: int,
        session: Session,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size} but must be at least 1")
        self._target, self._drafter = target, drafter
        self._chat = Chat(target.tokenizer, target.eos_token_ids)
        self._top_p, self._max_new_tokens = top_p, max_new_tokens
        self._batch_size = batch_size
        self._session = session

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

    def run(self, dialogues: Sequence[Dialogue], journal: Journal) -> None:
        """Answer all that can be answered; a turn of all dialogues after the other.

        Raises:
            OSError: the journal cannot be written.
            FloatingPointError: the target's logits are not finite.
        """
        while True:
            for dialogue in dialogues:
                if not dialogue.is_done and not dialogue.open_answer:
                    self._open(dialogue)
            self._session.begin(sum(d.is_done for d in dialogues), len(dialogues))
            ready = [dialogue for dialogue in dialogues if dialogue.open_answer]
            if not ready:
                return
            # Begun rows first; then by length: rows that join together pad little, and a target
            # that has no memory for the longest says so at once.
            ready.sort(key=lambda d: (not d.answers[-1].tokens, -_length(d.answers[-1])))
            size = BATCHES_PER_CALL * self._batch_size
            for first in range(0, len(ready), size):
                self._run(ready[first : first + size], journal)

    def _open(self, dialogue: Dialogue) -> None:
        dialogue.open(dialogue.next_prompt(self._chat), self._target.max_context_len)

    def _run(self, dialogues: Sequence[Dialogue], journal: Journal) -> None:
        answers = [dialogue.answers[-1] for dialogue in dialogues]
        session, begun = self._session, time.perf_counter()
        for chunks in self._stream(dialogues, answers).steps():
            journal.append({"step": list(self._added(chunks, dialogues, answers))})
            ended = sum(bool(c.finish_reason) and dialogues[c.index].is_done for c in chunks)
            now = time.perf_counter()
            session.add(sum(len(chunk.tokens) for chunk in chunks), now - begun, ended)
            session.forwards += len(chunks)
            begun = now
        session.prefills += len(answers)
        session.forwards -= len(answers)

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
