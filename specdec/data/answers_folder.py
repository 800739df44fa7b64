"""The folder of regenerated answers: written whole at the end of a run, read by the trainer."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdec.checkpoints import TargetIdentity
from specdec.checkpoints.folder import read_json
from specdec.checkpoints.identity import differences, identity_of
from specdec.data.answers import AnswerRow, read_rows
from specdec.data.query import SPLITS
from specdec.files import disk_trouble, private_opener, replace_file

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
