"""Answers of a target in this process: batched, and journalled token by token."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from specdec.checkpoints.identity import TARGET, as_json, identify_target
from specdec.common.files import Journal
from specdec.common.provenance import MachineProvenance, machine
from specdec.data.answers import AnswererFacts, AnswerSettings
from specdec.data.dialogue import Answer, Chat, Dialogue, Session
from specdec.engine.decode import Chunk, Stream, stream
from specdec.engine.interfaces import Drafter
from specdec.sampling.config import SamplingConfig
from specdec.targets.hf import HFTarget

# Rows of one call of the loop, in batches: enough that its end, where the batch runs empty, is
# less than a hundredth of it, and few enough that what the loop remembers of them stays small.
BATCHES_PER_CALL = 64


class LocalAnswers:
    """Answers dialogues with a target and a drafter.

    The rule is "match" and a row's random numbers are a function of its seed and the position: a
    row that was killed and goes on behind its journalled tokens draws what it would have drawn.
    """

    def __init__(
        self,
        target: HFTarget,
        settings: AnswerSettings,
        drafter: Drafter | None = None,
        batch_size: int = 32,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size} but must be at least 1")
        self.chat = Chat(target.tokenizer, target.eos_token_ids)
        self.settings, self.batch_size = settings, batch_size
        self._target, self._drafter = target, drafter

    def facts(self) -> AnswererFacts:
        """Identify the target and the machine."""
        known = identify_target(self._target)
        where = MachineProvenance(**machine(self._target))
        identity = {
            "target_weights": known.weights,
            TARGET: as_json(known),
            "dtype": where.dtype,
            "quantized": where.quantized,
        }
        return AnswererFacts(known, None, identity, where)

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

    def run(self, dialogues: Sequence[Dialogue], journal: Journal, session: Session) -> None:
        """Answer all that can be answered; a turn of all dialogues after the other."""
        while True:
            for dialogue in dialogues:
                if not dialogue.is_done and not dialogue.open_answer:
                    self._open(dialogue)
            session.begin(sum(d.is_done for d in dialogues), len(dialogues))
            ready = [dialogue for dialogue in dialogues if dialogue.open_answer]
            if not ready:
                return
            # Begun rows first; then by length: rows that join together pad little, and a target
            # that has no memory for the longest says so at once.
            ready.sort(key=lambda d: (not d.answers[-1].tokens, -len(d.written)))
            size = BATCHES_PER_CALL * self.batch_size
            for first in range(0, len(ready), size):
                self._decode(ready[first : first + size], journal, session)

    def _open(self, dialogue: Dialogue) -> None:
        dialogue.open(dialogue.next_prompt(self.chat), self._target.max_context_len)

    def _decode(self, dialogues: Sequence[Dialogue], journal: Journal, session: Session) -> None:
        for chunks in self._stream(dialogues).steps():
            journal.append({"step": list(self._added(chunks, dialogues))})
            ended = sum(bool(c.finish_reason) and dialogues[c.index].is_done for c in chunks)
            session.add(sum(len(chunk.tokens) for chunk in chunks), ended)
            session.forwards += len(chunks)
        # A row's first tokens come out of its prefill.
        session.prefills += len(dialogues)
        session.forwards -= len(dialogues)

    def _stream(self, dialogues: Sequence[Dialogue]) -> Stream:
        limit, top_p = self.settings.max_new_tokens, self.settings.top_p
        return stream(
            self._target,
            self._drafter,
            [dialogue.written for dialogue in dialogues],
            [SamplingConfig(d.temperature, top_p=top_p, seed=d.seed) for d in dialogues],
            max_new_tokens=[limit - len(dialogue.answers[-1].tokens) for dialogue in dialogues],
            batch_size=self.batch_size,
            rule="match",
        )

    def _added(self, chunks: Sequence[Chunk], dialogues: Sequence[Dialogue]) -> Iterator[list[Any]]:
        """Add a step's tokens to their answers; yield what the journal holds of each."""
        for chunk in chunks:
            dialogue = dialogues[chunk.index]
            turn, answer = len(dialogue.answers) - 1, dialogue.answers[-1]
            start = len(answer.tokens)
            self._add(dialogue, answer, chunk.tokens, chunk.finish_reason)
            yield [dialogue.index, turn, start, chunk.tokens, chunk.finish_reason]

    def _add(
        self, dialogue: Dialogue, answer: Answer, tokens: list[int], finish_reason: str | None
    ) -> None:
        answer.tokens += tokens
        if finish_reason:
            limit = self.settings.max_new_tokens
            was_cut = finish_reason == "length" and len(answer.tokens) < limit
            dialogue.finish("context" if was_cut else finish_reason)
