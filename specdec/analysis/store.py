"""The folder of an analysis: every finished drafter is kept, so that a killed run resumes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from specdec.analysis.evidence import Array, Evidence
from specdec.checkpoints import TargetIdentity
from specdec.checkpoints.folder import read_json
from specdec.checkpoints.identity import as_json, check_resumed
from specdec.files import disk_trouble, parse_json, replace_file

RESULT, EVIDENCE = "analysis.json", "evidence.safetensors"
_FIELDS = tuple(Evidence.__dataclass_fields__)


class AnalysisStore:
    """One JSON and one safetensors file a finished drafter, under `drafters/`.

    Args:
        folder: made if it is not there.
        fingerprint: of configuration and texts; a folder of another one is refused.
        target: identity of the target, likewise.

    Raises:
        ValueError: the folder holds an analysis of another configuration or target.
        PermissionError: it cannot be written.
        OSError: there is no space left.
    """

    def __init__(self, folder: Path, fingerprint: str, target: TargetIdentity) -> None:
        self._folder, self._parts = folder, folder / "drafters"
        try:
            self._parts.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_trouble(folder, error) from error
        known, mark = self._parts / "target", self._parts / "fingerprint"
        written_by = mark.read_text() if mark.is_file() else "its fingerprint is gone"
        # A run that finished no drafter leaves a folder that serves any configuration.
        if not any(self._parts.glob("*.json")):
            replace_file(known, json.dumps(as_json(target)).encode())
            replace_file(mark, fingerprint.encode())
        elif written_by != fingerprint:
            raise ValueError(
                f"{str(folder)!r} holds an analysis of another configuration or of other texts "
                f"({written_by}, not {fingerprint}); choose another --out folder or remove this one"
            )
        else:
            check_resumed(folder, read_json(known) if known.is_file() else None, as_json(target))

    def read(self, index: int) -> dict[str, Any] | None:
        """What is said of drafter `index`; None where it is not finished."""
        path = self._parts / f"{index}.json"
        try:
            found: dict[str, Any] = parse_json(path.read_text())
            if found["method"] == "evidence":
                load_file(self._parts / f"{index}.safetensors")
        except (OSError, ValueError, KeyError, SafetensorError):
            return None
        return found

    def write(self, index: int, described: dict[str, Any], evidence: Evidence | None) -> None:
        """Keep a finished drafter; its JSON, which makes it count, is written last.

        Raises:
            OSError: the folder cannot be written, or is full.
        """
        if evidence is not None:
            arrays = {name: np.ascontiguousarray(getattr(evidence, name)) for name in _FIELDS}
            replace_file(self._parts / f"{index}.safetensors", save(arrays))
        text = json.dumps(described, indent=1, allow_nan=False) + "\n"
        replace_file(self._parts / f"{index}.json", text.encode())

    def finish(self, result: dict[str, Any], names: list[str]) -> None:
        """Write the evidence of all drafters, each field as NAME/FIELD, and then the analysis.

        Raises:
            OSError: the folder cannot be written, or is full.
        """
        arrays: dict[str, Array] = {}
        for index, name in enumerate(names):
            path = self._parts / f"{index}.safetensors"
            if path.is_file():
                arrays |= {f"{name}/{field}": array for field, array in load_file(path).items()}
        replace_file(self._folder / EVIDENCE, save(arrays))
        text = json.dumps(result, indent=1, allow_nan=False) + "\n"
        replace_file(self._folder / RESULT, text.encode())
