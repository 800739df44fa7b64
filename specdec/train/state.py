"""The checkpoints of a run: written whole or not at all, the newest two kept."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from specdec.checkpoints.folder import read_json
from specdec.checkpoints.identity import TARGET, check_resumed
from specdec.files import NO_SPACE, disk_trouble, sync, write_durably
from specdec.train.tensor_files import write_tensors
from specdec.train.together import in_first_process

KEPT = 2


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: optimizer steps done; with the seed it says which rows come next.
        tokens: read so far, without padding.
        answer_tokens: of them, those that the target wrote.
        seconds: of all sessions, evaluation and saving included.
        step_seconds: of the training steps alone.
    """

    step: int = 0
    tokens: int = 0
    answer_tokens: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0


@dataclass(frozen=True)
class Saved:
    """A checkpoint but for its tensors, which `read_tensors` reads.

    Attributes:
        progress: at the checkpoint.
        folder: of the checkpoint.
        scaler: state of the loss scaler; empty but for float16.
    """

    progress: Progress
    folder: Path
    scaler: dict[str, float] = field(default_factory=dict)


class RunFolder:
    """Checkpoints `checkpoint-{step}` in a folder, all of one run.

    Args:
        folder: of the run.
        identity: JSON values; a folder whose checkpoints have another one is refused.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self._identity = folder, identity

    def prepare(self) -> None:
        """Make the folder and remove what a killed run did not finish; all processes call.

        Raises:
            PermissionError: the folder cannot be written.
        """
        in_first_process(self._prepare)

    def newest(self) -> Saved | None:
        """The newest checkpoint, None if there is none yet.

        Raises:
            ValueError: it belongs to another run.
        """
        found = self._all()
        if not found:
            return None
        content = read_json(found[-1] / "progress.json")
        try:
            identity, progress = dict(content["identity"]), Progress(**content["progress"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"the checkpoint {str(found[-1])!r} is damaged: progress.json does not say how far "
                "it is; remove it, and the same command resumes from the one before"
            ) from error
        self._check_identity(identity)
        return Saved(progress, found[-1], content.get("scaler", {}))

    def path(self, step: int) -> Path:
        """Of the checkpoint behind so many steps."""
        return self.folder / f"checkpoint-{step}"

    def save(
        self, progress: Progress, tensors: Mapping[str, Tensor], scaler: Mapping[str, float]
    ) -> None:
        """Write `checkpoint-{step}`, then remove all but the newest ones; all processes call.

        Args:
            progress: with the step.
            tensors: see `write_tensors`.
            scaler: state of the loss scaler.

        Raises:
            OSError: it could not be written, because the disk is full for one; older checkpoints
                are as they were.
        """
        partial = self.folder / f".checkpoint-{progress.step}.partial"
        content = {"identity": self._identity, "progress": asdict(progress)}
        text = json.dumps({**content, "scaler": dict(scaler)} if scaler else content, indent=1)
        try:
            in_first_process(lambda: _begin(partial, text))
            write_tensors(partial, tensors)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise self._failure(progress.step, error) from error
        in_first_process(lambda: self._finish(partial, progress.step))

    def _prepare(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for partial in self.folder.glob(".checkpoint-*.partial"):
                shutil.rmtree(partial)
        except OSError as error:
            raise disk_trouble(self.folder, error) from error

    def _finish(self, partial: Path, step: int) -> None:
        os.replace(partial, self.path(step))
        sync(self.folder)
        for old in self._all()[:-KEPT]:
            # Renamed first: a kill in between must not leave a half-removed checkpoint.
            doomed = old.with_name(f".{old.name}.partial")
            os.replace(old, doomed)
            shutil.rmtree(doomed)

    def _failure(self, step: int, error: OSError) -> OSError:
        reason = "the disk is full" if error.errno in NO_SPACE else str(error)
        older = self._all()
        kept = f"{older[-1].name} is intact" if older else "there is none before it"
        return OSError(
            f"the checkpoint of step {step} could not be written to {str(self.folder)!r}: "
            f"{reason}; {kept}. Free space there and give the same command again"
        )

    def _all(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        found = {
            int(number): path
            for path in self.folder.glob("checkpoint-*")
            if (number := path.name.removeprefix("checkpoint-")).isdigit()
        }
        return [found[step] for step in sorted(found)]

    def _check_identity(self, found: dict[str, Any]) -> None:
        ours, theirs = _flat(self._identity | {TARGET: None}), _flat(found | {TARGET: None})
        for key in sorted(ours.keys() | theirs.keys()):
            if ours.get(key) != theirs.get(key):
                raise ValueError(
                    f"{str(self.folder)!r} holds a run with another {key} ({theirs.get(key)!r}, "
                    f"not {ours.get(key)!r}); choose another --out folder or remove this one"
                )
        check_resumed(self.folder, found.get(TARGET), self._identity.get(TARGET))


def _begin(partial: Path, text: str) -> None:
    partial.mkdir()
    write_durably(partial / "progress.json", text.encode())


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else None
        flat.update({f"{prefix}{key}": value} if inner is None else inner)
    return flat
