"""What came out of a run: counts, failures, and the folder written from them."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from specdec.data.answers_folder import load_answers, write_answers
from specdec.data.dialogue import Dialogue
from specdec.data.query import SPLITS


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


def finished_manifest(out: Path) -> dict[str, Any] | None:
    """The manifest of a folder that is whole; None where something must be written again."""
    try:
        return load_answers(out).manifest
    except (FileNotFoundError, ValueError):
        return None
