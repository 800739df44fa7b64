"""What a report reads: folders of measurements, recognised by the schema of their files."""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdec.files import parse_json
from specdec.report.content import part, read_content
from specdec.report.older import renew

# File -> schemas that are read, and the kind of run.
FILES = {
    "results.json": (("specdec-bench-1", "specdec-bench-2", "specdec-bench-3"), "bench"),
    "sweep.json": (("specdec-sweep-1", "specdec-sweep-2"), "sweep"),
    "analysis.json": (("specdec-analysis-1",), "analysis"),
    "plan.json": (("specdec-plan-1", "specdec-plan-2"), "plan"),
    "estimate.json": (("specdec-estimate-1",), "estimate"),
    "suite.json": (("specdec-suite-1", "specdec-suite-2"), "suite"),
}


@dataclass(frozen=True)
class Run:
    """One file of measurements.

    Attributes:
        kind: "bench", "sweep", "analysis", "plan", "estimate" or "suite".
        label: the folder's name, made longer where two runs share it.
        folder: where it lies.
        data: the file's content.
    """

    kind: str
    label: str
    folder: Path
    data: dict[str, Any]

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the figures come from; empty where the file does not say."""
        return part(self.data, "provenance")

    @property
    def config(self) -> dict[str, Any]:
        """The bench configuration that was run; empty where the file does not hold it."""
        return part(self.provenance, "config")

    @property
    def identity(self) -> dict[str, Any] | None:
        """Which model the target was; None where the file does not say."""
        found = self.data.get("target")
        return found if isinstance(found, dict) else None  # an estimate lists its forwards there

    @property
    def arms(self) -> list[dict[str, Any]]:
        """Of a bench; version 1 says what they are in its configuration alone."""
        given = {arm["name"]: arm for arm in self.config.get("arms") or ()}
        return [_completed(arm, given.get(arm["name"], {})) for arm in self.data["arms"]]

    def is_bench(self, version: int) -> bool:
        """Whether it is a bench of at least this version."""
        return self.kind == "bench" and int(self.data["schema"].rpartition("-")[2]) >= version


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read every known file of every folder.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: the same folder twice, a folder without a known file, or a file that is damaged
            or of an unknown schema.
    """
    places = [folder.resolve() for folder in folders]
    twice = [folder for folder in folders if places.count(folder.resolve()) > 1]
    if twice:
        raise ValueError(f"the run {str(twice[0])!r} is given twice; give each folder once")
    labels = _labels(places)
    found = []
    for folder, label in zip(folders, labels, strict=True):
        found += _read_folder(folder, label)
    return found


def cells(sweep: Run) -> list[Run]:
    """The cells of a sweep as bench runs; a cell whose folder is gone has its arms alone."""
    found = []
    for cell in sweep.data["cells"]:
        file = sweep.folder / cell["folder"] / "results.json"
        data = _content(file) if file.is_file() else {"schema": "specdec-bench-3"}
        words = ", ".join(f"{key.rpartition('.')[2]} {v}" for key, v in cell["settings"].items())
        label = f"{sweep.label}: {words or 'the only cell'}"
        data["arms"] = cell["arms"]
        found.append(Run("bench", label, file.parent, data))
    return found


def _read_folder(folder: Path, label: str) -> list[Run]:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder {str(folder)!r}; give the --out folder of specdec bench, analyze or plan"
        )
    known = [name for name in FILES if (folder / name).is_file()]
    if not known:
        raise ValueError(
            f"{str(folder)!r} holds none of {', '.join(FILES)}; give the --out folder of a run "
            "that has finished"
        )
    return [_run(folder, name, label) for name in known]


def _run(folder: Path, name: str, label: str) -> Run:
    schemas, kind = FILES[name]
    data = _content(folder / name)
    if data.get("schema") not in schemas:
        raise ValueError(
            f"{str(folder / name)!r} has the schema {data.get('schema')!r} but must have "
            f"{' or '.join(schemas)}; run it again with this version"
        )
    renew(data)
    return Run(kind, label, folder, data)


def _content(file: Path) -> dict[str, Any]:
    try:
        data = parse_json(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is no JSON ({error}); run it again") from error
    if not isinstance(data, dict):
        raise ValueError(f"{str(file)!r} must hold a JSON object; run it again")
    found: dict[str, Any] = read_content(data, file)
    return found


def _completed(arm: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """An arm with what its configuration says of it besides."""
    whole = copy(arm)
    for key, value in given.items():
        whole.setdefault(key, value)
    return whole


def _labels(places: Sequence[Path]) -> list[str]:
    """The last part of each path, with as many parts before it as tell them apart."""
    for depth in range(1, 1 + max(len(place.parts) for place in places)):
        labels = ["/".join(place.parts[-depth:]) for place in places]
        if len(set(labels)) == len(labels):
            break
    return labels
