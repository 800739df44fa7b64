"""Dialogues as token ids, and which of the tokens the target wrote."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from specdec.checkpoints import TargetIdentity
from specdec.checkpoints.identity import differences, identity_of
from specdec.common.files import disk_trouble, parse_json, private_opener, read_json, replace_file
from specdec.data.conversation import SPLITS, Query
from specdec.data.dialogue import TURNS, Dialogue
from specdec.sampling.config import SamplingConfig


@dataclass(frozen=True)
class AnswerRow:
    """One dialogue.

    Attributes:
        tokens: of the whole dialogue, in the target's vocabulary.
        answers: [start, end) of every answer that the target wrote, in order.
        id: of the query it answers; "line N" where the file has none.
        domain: of the query; empty where it is not known.
        temperature: that the answers were sampled at; None where it is not known.
    """

    tokens: tuple[int, ...]
    answers: tuple[tuple[int, int], ...]
    id: str = ""
    domain: str = ""
    temperature: float | None = None

    @property
    def num_answer_tokens(self) -> int:
        """Tokens that the target wrote."""
        return sum(end - start for start, end in self.answers)

    def cut(self, max_len: int) -> "AnswerRow":
        """The first `max_len` tokens."""
        spans = ((start, min(end, max_len)) for start, end in self.answers if start < max_len)
        return replace(self, tokens=self.tokens[:max_len], answers=tuple(spans))


def read_rows(path: Path, vocab_size: int, max_rows: int | None = None) -> Iterator[AnswerRow]:
    """Rows of a JSONL file, each `{"tokens": [...], "answers": [[start, end), ...]}`.

    "id", "domain" and "temperature" are kept; other keys are ignored.

    Args:
        path: of the file.
        vocab_size: every token id is below it.
        max_rows: stop after this many; None for all of them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is no such row, by its number.
    """
    if not path.is_file():
        raise FileNotFoundError(f"data.path {str(path)!r} is not a file; give a JSONL file")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if max_rows is not None and number > max_rows:
                return
            try:
                yield _row(parse_json(line), vocab_size, f"line {number}")
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error


def _row(given: Any, vocab_size: int, name: str) -> AnswerRow:
    if not isinstance(given, dict) or not {"tokens", "answers"} <= given.keys():
        raise ValueError('a row must be an object with "tokens" and "answers"')
    tokens, spans = given["tokens"], given["answers"]
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise ValueError("tokens must be a list of token ids")
    wrong = next((token for token in tokens if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise ValueError(
            f"token id {wrong} is outside the target's vocabulary of {vocab_size}; the answers "
            "must be written with the target's own tokenizer"
        )
    if not isinstance(spans, list) or not spans:
        raise ValueError("answers is empty; every row needs at least one [start, end) span")
    before = 0
    for span in spans:
        if not (isinstance(span, list) and len(span) == 2 and all(type(n) is int for n in span)):
            raise ValueError(f"answer {span!r} must be a pair of token indices [start, end)")
        if not before <= span[0] < span[1] <= len(tokens):
            raise ValueError(
                f"answer {span} must be a non-empty span behind the one before and within the "
                f"row's {len(tokens)} tokens"
            )
        before = span[1]
    temperature = given.get("temperature")
    if temperature is not None and not isinstance(temperature, int | float):
        raise ValueError(f"temperature is {temperature!r} but must be a number")
    return AnswerRow(
        tuple(tokens),
        tuple((start, end) for start, end in spans),
        str(given.get("id", name)),
        str(given.get("domain", "")),
        temperature,
    )


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


MANIFEST, FAILED = "answers.json", "failed.jsonl"
SCHEMA = "specdec-answers-1"


@dataclass(frozen=True)
class AnswersFolder:
    """A finished folder of `specdec regenerate`.

    Attributes:
        folder: where it is.
        manifest: content of `answers.json`.
    """

    folder: Path
    manifest: dict[str, Any]

    def path(self, split: str) -> Path:
        """The JSONL file of a split, "train" or "held_out"."""
        return self.folder / f"{split}.jsonl"

    def num_rows(self, split: str) -> int:
        """Rows of a split."""
        return int(self.manifest["counts"][split]["rows"])

    def rows(self, split: str, vocab_size: int, max_rows: int | None = None) -> Iterator[AnswerRow]:
        """Rows of a split; see `read_rows`."""
        return read_rows(self.path(split), vocab_size, max_rows)


def load_answers(folder: Path) -> AnswersFolder:
    """Open a folder that `specdec regenerate` has finished.

    Raises:
        FileNotFoundError: no such folder, or its run has not come to its end.
        ValueError: its manifest is damaged, or a file has other rows than it says.
    """
    if not (folder / MANIFEST).is_file():
        unfinished = (folder / "journal.jsonl").is_file()
        fix = "give the command that made it again, to finish it" if unfinished else "give one"
        raise FileNotFoundError(f"{str(folder)!r} holds no finished answers ({MANIFEST}); {fix}")
    manifest = read_json(folder / MANIFEST)
    if manifest.get("schema") != SCHEMA:
        raise ValueError(
            f"{str(folder / MANIFEST)!r} has schema {manifest.get('schema')!r} but must have "
            f"{SCHEMA!r}; was it written by another version?"
        )
    answers = AnswersFolder(folder, manifest)
    try:
        counts = {split: answers.num_rows(split) for split in SPLITS}
        dict(manifest["target"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{str(folder / MANIFEST)!r} is damaged: it lacks counts or target; give the command "
            "that made it again"
        ) from error
    for split, count in counts.items():
        path = answers.path(split)
        if not path.is_file():
            raise FileNotFoundError(f"{str(path)!r} is missing; copy the folder again")
        with path.open("rb") as lines:
            found = sum(1 for _ in lines)
        if found != count:
            raise ValueError(
                f"{str(path)!r} has {found} rows but {MANIFEST} counts {count}; give the command "
                "that made it again"
            )
    return answers


def check_answers_target(manifest: Mapping[str, Any], identity: TargetIdentity) -> None:
    """Refuse answers that another target wrote.

    What the manifest or the target does not know is not compared, nor are names.

    Args:
        manifest: of the answers.
        identity: of the target that is to be drafted for, from `identify_target`.

    Raises:
        ValueError: the first fact that differs.
    """
    known, renew = identity_of(manifest["target"]), "specdec regenerate"
    for fact, wrote, given in differences(known, identity, "answers.json", renew):
        raise ValueError(
            f"the answers were written by target {known.name!r} with {fact} {wrote}, but "
            f"{identity.name!r} has {fact} {given}; use the target that wrote them, or regenerate "
            "them with this one"
        )


def write_answers(
    folder: Path,
    rows: Mapping[str, Iterable[Mapping[str, Any]]],
    failed: Iterable[Mapping[str, Any]],
    manifest: Mapping[str, Any],
) -> None:
    """Write all files under other names first and the manifest last: there is one or none.

    Args:
        folder: exists already.
        rows: split -> rows.
        failed: what has no answer, and why.
        manifest: JSON values.

    Raises:
        OSError: there is no space left, or the folder cannot be written.
    """
    files = {**{f"{split}.jsonl": each for split, each in rows.items()}, FAILED: failed}
    partial = {name: folder / f".{name}.partial" for name in (*files, MANIFEST)}
    try:
        for name, lines in files.items():
            with open(partial[name], "w", encoding="utf-8", opener=private_opener) as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        with open(partial[MANIFEST], "w", encoding="utf-8", opener=private_opener) as file:
            file.write(json.dumps(manifest, indent=1, allow_nan=False) + "\n")
        (folder / MANIFEST).unlink(missing_ok=True)
        for name, path in partial.items():
            os.replace(path, folder / name)
    except OSError as error:
        for path in partial.values():
            with suppress(OSError):
                path.unlink(missing_ok=True)
        raise disk_trouble(folder, error) from error


def write_failed(folder: Path, failed: Iterable[Mapping[str, Any]]) -> None:
    """Write the list of failures alone, where a run ends before its time.

    Raises:
        OSError: as `write_answers`.
    """
    text = "".join(json.dumps(line) + "\n" for line in failed)
    replace_file(folder / FAILED, text.encode(), private=True)


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
