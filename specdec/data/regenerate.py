"""The target answers collected queries itself: what drafters are trained on."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from specdec.checkpoints import TargetIdentity
from specdec.checkpoints.identity import (
    TARGET,
    as_json,
    check_resumed,
    hash_of_vocabulary,
    identify_target,
)
from specdec.common.config import validated
from specdec.common.files import Journal
from specdec.common.messages import Query, short_hash
from specdec.common.provenance import CodeProvenance, MachineProvenance, machine
from specdec.data.answers import (
    JOURNAL,
    AnswerSettings,
    AnswersManifest,
    AskedEndpoint,
    load_answers,
    write_answers,
)
from specdec.data.dialogue import Answer, Chat, Dialogue, plan_dialogues
from specdec.data.queries import SPLITS
from specdec.engine.decode import stream
from specdec.engine.interfaces import Drafter
from specdec.sampling.config import SamplingConfig
from specdec.targets.hf import HFTarget

Progress = Callable[[int, int, str], None]

# Of one call of the loop: its end, where the batch runs empty, is less than a hundredth of it.
BATCHES_PER_CALL = 64


class EndpointDownError(RuntimeError):
    """The endpoint answers no more; what it has answered is kept."""


class Session:
    """Counts since the command was given; what earlier ones did is not in it."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._done, self._total = progress, 0, 0
        self.tokens = self.prefills = self.forwards = 0
        self.seconds = self._last_time = 0.0

    def begin(self, dialogues: Sequence[Dialogue]) -> None:
        self._done, self._total = sum(each.is_done for each in dialogues), len(dialogues)
        self._last_time = time.perf_counter()
        self.add()

    def add(self, tokens: int = 0, ended: int = 0) -> None:
        """Count new tokens, the time since the last call, and dialogues that have ended."""
        now = time.perf_counter()
        self.seconds, self._last_time = self.seconds + now - self._last_time, now
        self.tokens, self._done = self.tokens + tokens, self._done + ended
        rate = self.tokens_per_s or 0
        self._progress(self._done, self._total, f"{self.tokens:,} tokens, {rate:,.0f}/s")

    @property
    def tokens_per_s(self) -> float | None:
        return self.tokens / self.seconds if self.tokens and self.seconds else None


class Answerer(Protocol):
    """`LocalAnswers` or `EndpointAnswers`; `facts` are those that make it the same run."""

    chat: Chat
    settings: AnswerSettings
    batch_size: int
    target: TargetIdentity
    endpoint: AskedEndpoint | None
    provenance: CodeProvenance
    facts: dict[str, Any]

    def replay(self, dialogues: Sequence[Dialogue], entries: Iterable[dict[str, Any]]) -> None:
        """Bring the dialogues to where the journal ends."""

    def run(self, dialogues: Sequence[Dialogue], journal: Journal, session: Session) -> None:
        """Answer all that can be answered."""


def regenerate(
    queries: Mapping[str, list[Query]],
    out: Path,
    answers: Answerer,
    progress: Progress = lambda done, total, text: None,
) -> AnswersManifest:
    """Answer queries, or resume a killed run of the same ones."""
    tokenizer, settings = answers.chat.tokenizer, answers.settings
    if tokenizer is None:
        raise ValueError("the target has no tokenizer; put its tokenizer files beside its weights")
    template = getattr(tokenizer, "chat_template", None)
    if not template and any(query.messages for found in queries.values() for query in found):
        raise ValueError(
            "the queries are chats but the target's tokenizer has no chat template; give the "
            "instruction-tuned target, or put its chat_template.jinja beside its tokenizer"
        )
    identity = {
        **{f"{split}_queries": _hash_of(queries[split]) for split in SPLITS},
        **settings.model_dump(),
        "target_tokenizer": hash_of_vocabulary(tokenizer),
        "chat_template": short_hash(json.dumps(template)) if template else None,
        **answers.facts,
    }
    checks = {TARGET: partial(check_resumed, out)} if TARGET in identity else {}
    dialogues = plan_dialogues(queries, settings.temperatures, settings.seed, settings.turns)
    session = Session(progress)
    with Journal(out / JOURNAL, identity, checks, private=True) as journal:
        try:
            answers.replay(dialogues, journal.entries)
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            what = f"a line of {str(journal.path)!r} holds no answer of this run ({error})"
            raise ValueError(f"{what}; remove the line, or the folder") from error
        journal.entries.clear()
        try:
            answers.run(dialogues, journal, session)
        except EndpointDownError:
            for dialogue in dialogues:
                if not dialogue.is_done:
                    dialogue.failure = "not answered yet: the endpoint answers no more"
            write_answers(out, {}, _failures(dialogues), None)
            raise
    if not session.tokens:
        with suppress(FileNotFoundError, ValueError):  # something must be written again
            return load_answers(out)  # the folder is whole already, and nothing was added
    done = [dialogue for dialogue in dialogues if not dialogue.failure]
    assert all(each.is_done for each in done), "a query is neither answered nor listed as failed"
    kept = [answer for dialogue in done for answer in dialogue.kept]
    num_decoded = session.tokens - session.prefills
    facts = {
        "target": answers.target,
        "endpoint": answers.endpoint,
        "identity": identity,
        "settings": settings,
        "counts": {split: _counts(dialogues, split) for split in SPLITS},
        "answers": len(kept),
        "unanswered_turns": sum(len(each.asked) - len(each.kept) for each in done),
        "retokenized_answers": sum(answer.is_retokenized for answer in kept),
        "answer_tokens": sum(len(answer.tokens) for answer in kept),
        "tokens": sum(len(dialogue.kept[-1].whole) for dialogue in done),
        "finish_reasons": Counter(answer.finish_reason for answer in kept),
        "temperatures": Counter(str(dialogue.temperature) for dialogue in done),
        "session": {
            "tokens": session.tokens,
            "seconds": session.seconds,
            "tokens_per_s": session.tokens_per_s,
            "tau": num_decoded / session.forwards if session.forwards else None,
            "batch_size": answers.batch_size,
        },
        "provenance": answers.provenance,
    }
    manifest = validated(AnswersManifest, facts)
    rows = {split: _rows(done, split, tokenizer) for split in SPLITS}
    failed = _failures(dialogues)
    write_answers(out, rows, failed, manifest)
    if not done:
        raise RuntimeError(f"every query failed: {failed[0]['reason']}")
    return manifest


def _hash_of(queries: Iterable[Query]) -> str:
    return short_hash("".join(json.dumps([q.id, q.messages, q.text]) + "\n" for q in queries))


def _counts(dialogues: Iterable[Dialogue], split: str) -> dict[str, int]:
    failed = [bool(dialogue.failure) for dialogue in dialogues if dialogue.split == split]
    return {"queries": len(failed), "rows": failed.count(False), "failed": failed.count(True)}


def _failures(dialogues: Iterable[Dialogue]) -> list[dict[str, str]]:
    return [
        {"id": d.query.id, "split": d.split, "domain": d.query.domain, "reason": d.failure}
        for d in dialogues
        if d.failure
    ]


def _rows(dialogues: Iterable[Dialogue], split: str, tokenizer: Any) -> Iterator[dict[str, Any]]:
    for dialogue in (each for each in dialogues if each.split == split):
        query, kept = dialogue.query, dialogue.kept
        texts = (
            tokenizer.decode(a.tokens, skip_special_tokens=True) if a.text is None else a.text
            for a in kept
        )
        yield {
            "id": query.id,
            "domain": query.domain,
            "language": query.language,
            "tokens": kept[-1].whole,
            "answers": [[len(a.prompt), len(a.whole)] for a in kept],
            "temperature": dialogue.temperature,
            "seed": dialogue.seed,
            # "eos", "length", or why later turns have no answer.
            "finish_reason": dialogue.ended_by or dialogue.answers[-1].finish_reason,
            "text": "\n".join(texts),
            **({"retokenized": True} if any(a.is_retokenized for a in kept) else {}),
        }


class LocalAnswers:
    """Answers of a target in this process: batched, and journalled token by token.

    By the rule "match" a row that goes on behind its journalled tokens draws the same ones.
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
        self.endpoint: AskedEndpoint | None = None
        self.target, where = identify_target(target), MachineProvenance(**machine(target))
        self.provenance: CodeProvenance = where
        self.facts = {
            "target_weights": self.target.weights,
            TARGET: as_json(self.target),
            "dtype": where.dtype,
            "quantized": where.quantized,
        }

    def replay(self, dialogues: Sequence[Dialogue], entries: Iterable[dict[str, Any]]) -> None:
        for index, turn, start, tokens, finish_reason in (
            step for entry in entries for step in entry.get("step", ())
        ):
            dialogue = dialogues[index]
            if not dialogue.open_answer and turn == len(dialogue.answers):
                self._open(dialogue)
            answer = dialogue.open_answer
            # Behind a line that was damaged everything is written again.
            if answer and turn == len(dialogue.answers) - 1 and start == len(answer.tokens):
                self._add(dialogue, tokens, finish_reason)

    def run(self, dialogues: Sequence[Dialogue], journal: Journal, session: Session) -> None:
        while True:  # a turn of all dialogues after the other
            for dialogue in dialogues:
                if not dialogue.is_done and not dialogue.open_answer:
                    self._open(dialogue)
            session.begin(dialogues)
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
        prompt, max_len = dialogue.next_prompt(self.chat), self._target.max_context_len
        if len(prompt) >= max_len:
            reason = f"the prompt has {len(prompt)} tokens but the target's context holds {max_len}"
            dialogue.stop("context", f"{reason}, new tokens included")
        elif prompt:
            dialogue.answers.append(Answer(prompt))

    def _decode(self, dialogues: Sequence[Dialogue], journal: Journal, session: Session) -> None:
        limit, top_p = self.settings.max_new_tokens, self.settings.top_p
        decoding = stream(
            self._target,
            self._drafter,
            [dialogue.written for dialogue in dialogues],
            [SamplingConfig(d.temperature, top_p=top_p, seed=d.seed) for d in dialogues],
            max_new_tokens=[limit - len(dialogue.answers[-1].tokens) for dialogue in dialogues],
            batch_size=self.batch_size,
            rule="match",
        )
        # A row's first tokens come out of its prefill.
        session.prefills += len(dialogues)
        session.forwards -= len(dialogues)
        for chunks in decoding.steps():
            step: list[list[Any]] = []
            for chunk in chunks:
                dialogue = dialogues[chunk.index]
                place = len(dialogue.answers) - 1, len(dialogue.answers[-1].tokens)
                step.append([dialogue.index, *place, chunk.tokens, chunk.finish_reason])
                self._add(dialogue, chunk.tokens, chunk.finish_reason)
            journal.append({"step": step})
            session.forwards += len(chunks)
            ended = sum(bool(c.finish_reason) and dialogues[c.index].is_done for c in chunks)
            session.add(sum(len(chunk.tokens) for chunk in chunks), ended)

    def _add(self, dialogue: Dialogue, tokens: list[int], finish_reason: str | None) -> None:
        written = dialogue.answers[-1].tokens
        written += tokens
        if finish_reason == "length" and len(written) < self.settings.max_new_tokens:
            finish_reason = "context"
        if finish_reason:
            dialogue.finish(finish_reason)
