"""Folders of measurements, whose known files are read as the models of their writers."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from specdec.analysis.results import Analysis
from specdec.bench.log import Log, LogEntry
from specdec.bench.results import BenchResults, Results, SuiteResults, SweepResults
from specdec.bench.summary import faster_than_tau
from specdec.checkpoints import TargetIdentity
from specdec.common.config import read_model
from specdec.common.files import parse_line, read_json
from specdec.common.provenance import CodeProvenance, code
from specdec.engines.results import BakeOffResults
from specdec.planning.results import Plan
from specdec.planning.roofline import Estimate
from specdec.train.results import TrainResults

# Kind of run -> the model of its file.
MODELS: dict[str, type[Results | TrainResults]] = {
    "bench": BenchResults,
    "sweep": SweepResults,
    "analysis": Analysis,
    "plan": Plan,
    "estimate": Estimate,
    "suite": SuiteResults,
    "bake-off": BakeOffResults,
    "train": TrainResults,
}
FILES = list(dict.fromkeys(model.FILE for model in MODELS.values()))


@dataclass(frozen=True)
class Run:
    """One file of measurements.

    Attributes:
        label: the folder's name, made longer where two runs share it.
        data: the results model of the file.
        is_found: found below a folder that was given, not given itself.
    """

    kind: str
    label: str
    folder: Path
    data: Any
    is_found: bool = False

    @property
    def provenance(self) -> dict[str, Any]:
        found: dict[str, Any] = self.data.provenance.model_dump()
        return found

    @property
    def config(self) -> dict[str, Any]:
        """The configuration that was run; empty where the file does not hold it."""
        config = self.provenance.get("config") or {}
        return config.get("run", config)  # of a bake-off

    @property
    def identity(self) -> dict[str, Any] | None:
        """The target's identity; None where the file does not say."""
        found = getattr(self.data, "target", None)
        return asdict(found) if isinstance(found, TargetIdentity) else None


def read_runs(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Read the runs that folders are or hold; why a file that was only found is no run, is told."""
    places = [folder.resolve() for folder in folders]
    found: dict[Path, bool] = {}  # file -> was found below
    for folder, place in zip(folders, places, strict=True):
        if places.count(place) > 1:
            raise ValueError(f"the run {str(folder)!r} is given twice; give each folder once")
        if not folder.is_dir():
            raise FileNotFoundError(
                f"no folder {str(folder)!r}; give the --out of specdec bench, plan or train"
            )
        own = [folder / name for name in FILES if (folder / name).is_file()]
        below = sorted(file for name in FILES for file in folder.rglob(name))
        # A sweep holds its cells already.
        known = own or [file for file in below if "cells" not in file.relative_to(folder).parts]
        if not known:
            raise ValueError(
                f"{str(folder)!r} holds none of {', '.join(FILES)}, nor does a folder below; give "
                "the --out folder of a run that has finished, or one that holds such folders"
            )
        for file in known:
            found.setdefault(file, not own)
    parents = list(dict.fromkeys(file.parent for file in found))
    labels = dict(zip(parents, _labels([each.resolve() for each in parents]), strict=True))
    runs, unread = [], []
    for file, is_found in found.items():
        try:
            kind, data = read_file(file)
            run = Run(kind, labels[file.parent], file.parent, data, is_found)
            # A sweep's cells have said so themselves.
            if run.kind in ("bench", "suite") and (impossible := faster_than_tau(run.data)):
                raise ValueError(f"{run.label}: {'; '.join(impossible)}")
            runs.append(run)
        except ValueError as error:
            if not is_found:
                raise
            unread.append(f"{error}.")
    if not runs:
        raise ValueError(unread[0])
    return runs, unread


def read_log(path: Path) -> Run:
    """Read the lines of a performance log that are whole; a `ValueError` if there is none."""
    if not path.is_file():
        raise FileNotFoundError(f"no log {str(path)!r}; specdec bench writes one, see SPECDEC_LOG")
    with path.open("rb") as file:
        entries = [LogEntry.model_validate(row) for row in map(parse_line, file) if row]
    if not entries:
        raise ValueError(f"the log {str(path)!r} holds no line of a bench")
    log = Log(provenance=CodeProvenance(**code()), entries=entries)
    return Run("log", path.name, path.parent, log)


def _labels(places: Sequence[Path]) -> list[str]:
    """Give the last part of each path, with as many parts before it as tell them apart."""
    for depth in range(1, 1 + max(len(place.parts) for place in places)):
        labels = ["/".join(place.parts[-depth:]) for place in places]
        if len(set(labels)) == len(labels):
            break
    return labels


def read_cells(sweep: Run) -> list[Run]:
    """Read the cells of a sweep as benches; one whose folder is gone is left out."""
    found = []
    for cell in sweep.data.cells:
        file = sweep.folder / cell.folder / BenchResults.FILE
        if file.is_file():
            words = ", ".join(f"{key.rpartition('.')[2]} {v}" for key, v in cell.settings.items())
            label = f"{sweep.label}: {words or 'the only cell'}"
            found.append(Run("bench", label, file.parent, read_file(file)[1]))
    return found


def read_file(file: Path) -> tuple[str, Any]:
    """Read a results file: kind of run, and model."""
    content = read_json(file)
    schema = str(content.get("schema"))
    kind = schema.removeprefix("specdec-").rpartition("-")[0]
    if kind not in MODELS:
        raise ValueError(
            f"{str(file)!r} has the schema {schema!r} but must have that of a run: "
            f"{', '.join(MODELS)}; run it again with this version"
        )
    return kind, read_model(MODELS[kind], file)


def title_of(results: Any) -> str:
    """Describe model, machine and settings of a bench, a suite or a bake-off."""
    where, config = results.provenance, results.provenance.config
    is_bake_off = isinstance(results, BakeOffResults)
    config = config.run if is_bake_off else config
    place = "over HTTP" if is_bake_off else f"on {where.device}, {where.dtype}"
    target = f"{last_part(config.target.path)} {place}, T = {config.sampling.temperature:g}"
    if is_bake_off:
        return f"{target}, {results.arms[0].requests} requests one after the other"
    if isinstance(results, SuiteResults):
        repeats = f"{config.repeats} repeat{'s' * (config.repeats > 1)}"
        return f"{results.suite.replace('_', ' ')}: {target}, {repeats}"
    source = f"{results.arms[0].prompts} {last_part(config.prompts.source)} prompts"
    return f"{target}, batch {results.provenance.config.batch_size}, {source}"


def last_part(path: str) -> str:
    """Give a hub id whole; of a path its last part, for others do not share our disks."""
    is_hub_id = path.count("/") == 1 and path[0] not in "./~"
    return path if is_hub_id else Path(path).name or path
