"""The checkpoints of a run: written whole or not at all, the newest two kept."""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

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
    """A checkpoint that was read back.

    Attributes:
        progress: at the checkpoint.
        tensors: name -> trained tensor.
        states: name -> state dict of the optimizer and, for float16, the loss scaler.
    """

    progress: Progress
    tensors: dict[str, Tensor]
    states: dict[str, Any]


class RunFolder:
    """Checkpoints `checkpoint-{step}` in a folder, all of one run.

    Args:
        folder: of the run.
        identity: JSON values; a folder whose checkpoints have another one is refused.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self._identity = folder, identity

    def prepare(self) -> None:
        """Make the folder and remove what a killed run did not finish.

        Raises:
            PermissionError: the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for partial in self.folder.glob(".checkpoint-*.partial"):
                shutil.rmtree(partial)
        except (PermissionError, FileExistsError, NotADirectoryError) as error:
            raise PermissionError(
                f"the output folder {str(self.folder)!r} cannot be written ({error.strerror}); "
                "choose another one with --out"
            ) from error

    def load(self) -> Saved | None:
        """The newest checkpoint, None if there is none yet.

        Raises:
            ValueError: it belongs to another run, or is damaged.
        """
        found = self._all()
        if not found:
            return None
        newest = found[-1]
        content = json.loads((newest / "progress.json").read_text())
        self._check_identity(content["identity"])
        states = torch.load(newest / "optimizer.pt", map_location="cpu", weights_only=True)
        return Saved(
            Progress(**content["progress"]), load_file(newest / "model.safetensors"), states
        )

    def save(self, progress: Progress, tensors: dict[str, Tensor], states: dict[str, Any]) -> None:
        """Write `checkpoint-{step}`, then remove all but the newest ones."""
        partial = self.folder / f".checkpoint-{progress.step}.partial"
        partial.mkdir(parents=True)
        save_file(tensors, partial / "model.safetensors")
        torch.save(states, partial / "optimizer.pt")
        content = {"identity": self._identity, "progress": asdict(progress)}
        (partial / "progress.json").write_text(json.dumps(content, indent=1))
        os.replace(partial, self.folder / f"checkpoint-{progress.step}")
        for old in self._all()[:-KEPT]:
            # Renamed first: a kill in between must not leave a half-removed checkpoint.
            doomed = old.with_name(f".{old.name}.partial")
            os.replace(old, doomed)
            shutil.rmtree(doomed)

    def _all(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        found = {
            int(number): path
            for path in self.folder.glob("checkpoint-*")
            if (number := path.name.removeprefix("checkpoint-")).isdigit()
        }
        return [found[step] for step in sorted(found)]

    def _check_identity(self, found: dict[str, Any]) -> None:
        ours, theirs = _flat(self._identity), _flat(found)
        for key in sorted(ours.keys() | theirs.keys()):
            if ours.get(key) != theirs.get(key):
                raise ValueError(
                    f"{str(self.folder)!r} holds a run with another {key} ({theirs.get(key)!r}, "
                    f"not {ours.get(key)!r}); choose another --out folder or remove this one"
                )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else None
        flat.update({f"{prefix}{key}": value} if inner is None else inner)
    return flat
