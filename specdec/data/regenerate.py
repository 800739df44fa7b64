"""The target answers collected queries itself: what drafters are trained on."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from specdec.bench.provenance import machine
from specdec.checkpoints import identify_target
from specdec.data.answers_folder import SCHEMA, load_answers, write_answers
from specdec.data.dialogue import TURNS, Dialogue, plan_dialogues
from specdec.data.journal import Journal
from specdec.data.local_answers import LocalAnswers
from specdec.data.query import SPLITS, Query
from specdec.data.session import Progress, Session
from specdec.interfaces import Drafter
from specdec.sampling_config import SamplingConfig
from specdec.targets.hf import HFTarget


@dataclass(frozen=True)
class AnswerSettings:
    """What decides the answers.

    Attributes:
        temperatures: each query gets one of them, by hash of its id.
        top_p: of the sampled ones.
        max_new_tokens: of an answer.
        turns: "last" answers the last user turn with the recorded context, "all" every user turn
            after the target's own earlier answers.
        seed: of temperatures and samples.

    Raises:
        ValueError: a value breaks its rule.
    """

    temperatures: tuple[float, ...] = (0.0,)
    top_p: float = 1.0
    max_new_tokens: int = 512
    turns: str = "last"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperatures:
            raise ValueError("temperatures is empty; give at least one, 0 for greedy answers")
        for temperature in self.temperatures:
            SamplingConfig(temperature, top_p=self.top_p, seed=self.seed)
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens} but must be at least 1")
        if self.turns not in TURNS:
            raise ValueError(f"turns is {self.turns!r} but must be one of {', '.join(TURNS)}")

    def values(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return {**asdict(self), "temperatures": list(self.temperatures)}


def regenerate(
    queries: dict[str, list[Query]],
    out: Path,
    target: HFTarget,
    settings: AnswerSettings,
    drafter: Drafter | None = None,
    batch_size: int = 32,
    progress: Progress = lambda done, total, text: None,
) -> dict[str, Any]:
    """Answer queries in this process, or go on where a killed run of the same ones stopped.

    A run that was killed and resumed writes the tokens that an undisturbed one writes, whatever
    the batch size and the drafter, as far as the target's logits do not depend on the batch.

    Args:
        queries: split -> queries, see `read_query_splits`.
        out: for the journal, `train.jsonl`, `held_out.jsonl`, `failed.jsonl` and `answers.json`.
        target: with a tokenizer.
        settings: what decides the answers.
        drafter: speeds it up; the answers stay the same.
        batch_size: rows decoded together.
        progress: called with dialogues done, dialogues in all, and a text.

    Returns:
        The content of `answers.json`.

    Raises:
        ValueError: bad input, or a folder of another run.
        RuntimeError: not a single query could be answered.
        OSError: the folder cannot be written or is full; what was answered is kept.
    """
    _check_tokenizer(target, queries)
    where = machine(target)  # as it is now: the code may be another when the run ends
    known = asdict(identify_target(target))
    dialogues = plan_dialogues(queries, settings.temperatures, settings.seed, settings.turns)
    session = Session(progress)
    answers = LocalAnswers(
        target, drafter, settings.top_p, settings.max_new_tokens, batch_size, session
    )
    facts = {key: known[key] for key in ("weights", "tokenizer")}
    identity = {
        **run_identity(queries, settings),
        **{f"target_{key}": value for key, value in facts.items()},
        "chat_template": template_hash(target.tokenizer),
        "dtype": where["dtype"],
        "quantized": where["quantized"],
    }
    journal = Journal(out / "journal.jsonl", identity)
    try:
        answers.replay(dialogues, journal.entries)
        journal.entries.clear()
        answers.run(dialogues, journal)
    finally:
        journal.close()
    if not session.tokens and (known_manifest := _finished(out)):
        return known_manifest
    manifest = {
        "schema": SCHEMA,
        "target": known,
        "endpoint": None,
        "identity": identity,
        "settings": settings.values(),
        **summary(dialogues),
        "session": {**session.values(), "batch_size": batch_size},
        "provenance": where,
    }
    return finish(out, dialogues, manifest, target.tokenizer)


def _finished(out: Path) -> dict[str, Any] | None:
    """The manifest of a folder that is whole; None where something must be written again."""
    try:
        return load_answers(out).manifest
    except (FileNotFoundError, ValueError):
        return None


def _check_tokenizer(target: HFTarget, queries: dict[str, list[Query]]) -> None:
    if target.tokenizer is None:
        raise ValueError("the target has no tokenizer; put its tokenizer files beside its weights")
    has_chat = any(query.messages for members in queries.values() for query in members)
    if has_chat and not getattr(target.tokenizer, "chat_template", None):
        raise ValueError(
            "the queries are chats but the target's tokenizer has no chat template; give the "
            "instruction-tuned target, or put its chat_template.jinja beside its tokenizer"
        )


def run_identity(queries: dict[str, list[Query]], settings: AnswerSettings) -> dict[str, Any]:
    """What must be the same for a run to go on in a folder, by name."""
    hashes = {f"{split}_queries": _query_hash(queries[split]) for split in SPLITS}
    return {**hashes, **settings.values()}


def _query_hash(queries: Iterable[Query]) -> str:
    whole = hashlib.sha256()
    for query in queries:
        whole.update(json.dumps([query.id, query.messages, query.text]).encode() + b"\n")
    return whole.hexdigest()[:16]


def template_hash(tokenizer: Any) -> str | None:
    """Of the chat template; None where there is none."""
    template = getattr(tokenizer, "chat_template", None)
    return hashlib.sha256(json.dumps(template).encode()).hexdigest()[:16] if template else None


def summary(dialogues: Sequence[Dialogue]) -> dict[str, Any]:
    """Counts of queries, rows, answers and tokens."""
    counts: dict[str, dict[str, int]] = {}
    for split in SPLITS:
        members = [dialogue for dialogue in dialogues if dialogue.split == split]
        failed = sum(bool(dialogue.failure) for dialogue in members)
        rows = sum(not d.failure and d.is_done for d in members)
        assert rows + failed == len(members), "a query is neither answered nor listed as failed"
        counts[split] = {"queries": len(members), "rows": rows, "failed": failed}
    done = [dialogue for dialogue in dialogues if not dialogue.failure]
    kept = [answer for dialogue in done for answer in dialogue.kept]
    return {
        "counts": counts,
        "answers": len(kept),
        "unanswered_turns": sum(dialogue.num_unanswered for dialogue in done),
        "retokenized_answers": sum(answer.is_retokenized for answer in kept),
        "answer_tokens": sum(len(answer.tokens) for answer in kept),
        "tokens": sum(len(d.kept[-1].prompt) + len(d.kept[-1].tokens) for d in done),
        "finish_reasons": dict(Counter(answer.finish_reason for answer in kept)),
        "temperatures": {str(t): n for t, n in Counter(d.temperature for d in done).items()},
    }


def failures(dialogues: Iterable[Dialogue]) -> list[dict[str, Any]]:
    """The lines of `failed.jsonl`."""
    return [
        {"id": d.query.id, "split": d.split, "domain": d.query.domain, "reason": d.failure}
        for d in dialogues
        if d.failure
    ]


def finish(
    out: Path, dialogues: Sequence[Dialogue], manifest: dict[str, Any], tokenizer: Any
) -> dict[str, Any]:
    """Write the folder, in the order of the queries.

    Raises:
        RuntimeError: not a single query was answered.
        OSError: the folder cannot be written or is full.
    """
    rows = {split: _rows(dialogues, split, tokenizer) for split in SPLITS}
    failed = failures(dialogues)
    write_answers(out, rows, failed, manifest)
    if len(failed) == len(dialogues):
        raise RuntimeError(f"every query failed: {failed[0]['reason']}")
    return manifest


def _rows(dialogues: Sequence[Dialogue], split: str, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Rows of a split, made as they are written."""
    for dialogue in dialogues:
        if dialogue.split == split and not dialogue.failure:
            yield dialogue.row(tokenizer)
