"""What a report reads: folders of measurements, recognised by the schema of their files."""

import inspect
import json
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from specdec.common.files import parse_json
from specdec.common.stats import Work, Works, total_speed
from specdec.registry import DRAFTERS


class Content(dict[str, Any]):
    """An object of a JSON file; asked for a key that it lacks, it tells the file and the place.

    Attributes:
        file: that it was read from.
        place: where in it, as in "arms[2].options"; "" for the whole.
    """

    def __init__(self, values: Mapping[str, Any], file: Path, place: str = "") -> None:
        super().__init__(values)
        self.file, self.place = file, place

    def __missing__(self, key: str) -> Any:
        raise ValueError(
            f"{str(self.file)!r} has no {_below(self.place, key)}, which the report needs; restore "
            "the file, or run it again"
        )


def read_content(value: Any, file: Path, place: str = "") -> Any:
    """Turn what JSON gave into the same with `Content` for its objects, all the way down."""
    if isinstance(value, list):
        return [read_content(each, file, f"{place}[{i}]") for i, each in enumerate(value)]
    if isinstance(value, dict):
        inner = {key: read_content(v, file, _below(place, key)) for key, v in value.items()}
        return Content(inner, file, place)
    return value


def part(whole: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The object under a key; where there is none, an empty one in its place."""
    found: dict[str, Any] = whole.get(key) or {}
    if found or not isinstance(whole, Content):
        return found
    return Content({}, whole.file, _below(whole.place, key))


def _below(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key


_MEANS = ("specdec-bench-1", "specdec-bench-2", "specdec-sweep-1", "specdec-suite-1")


def renew(data: dict[str, Any], domains: Sequence[str] = ()) -> None:
    """Turn the speedups of older results into ratios of total times, as far as their records tell.

    With figures by prompt it is what a bench writes today. Without them, of rows that were decoded
    one at a time, the ratio is known and its interval is not. The former headline stands as
    `mean_speedup_vs_plain`. A plan's intervals are then those of tau: it did not keep the error of
    its costs.

    Args:
        data: the content of a results file, changed in place; today's files stay as they are.
        domains: of the prompts, where the file does not hold them.
    """
    if data.get("schema") == "specdec-plan-1":
        for each in (*data["configurations"], data["choice"], *data["runners_up"]):
            ratio = each["plain_step_ms"] / each["step_ms"]["wall"]
            interval = each["predicted_tau_ci"]
            each["predicted_speedup"] = each["predicted_tau"] * ratio
            each["predicted_speedup_ci"] = interval and [end * ratio for end in interval]
    elif data.get("schema") in _MEANS:
        config = (data.get("provenance") or {}).get("config") or {}
        one_row = config.get("batch_size", 1) == 1 and data.get("suite") != "concurrent"
        names = [prompt["domain"] for prompt in data.get("prompts") or ()] or list(domains)
        for part in data.get("cells") or data.get("groups") or [data]:
            alone = one_row and "cells" not in data  # a sweep does not say of which rows it is
            _renew_arms(part["arms"], alone, config.get("repeats") or _repeats(part["arms"]), names)


def _repeats(arms: list[dict[str, Any]]) -> int:
    """Repeats of a sweep's cell: tokens of all of them over those of the first."""
    arm = next((arm for arm in arms if not arm["failed"]), None)
    tokens = sum(each["tokens"] for each in arm["per_prompt"]) if arm else 0
    return round(tokens / arm["tokens"]) if arm else 0


def _renew_arms(
    arms: list[dict[str, Any]], one_row: bool, repeats: int, domains: Sequence[str]
) -> None:
    works = {arm["name"]: _works(arm, one_row, repeats) for arm in arms}
    totals = [[_total(arm.get("batch_tokens_per_s") if one_row else None)] for arm in arms]
    for arm, total in zip(arms, totals, strict=True):
        arm["mean_speedup_vs_plain"] = arm["speedup_vs_plain"]
        arm |= _speeds(arm["name"], works)
        arm |= total_speed("end_to_end_speedup_vs_plain", [total], totals[:1])
        for name, figures in (arm.get("domains") or {}).items():
            rows = [place for place, domain in enumerate(domains) if domain == name]
            figures |= _speeds(arm["name"], {n: [w[row] for row in rows] for n, w in works.items()})


def _speeds(name: str, works: dict[str, Works]) -> dict[str, Any]:
    found = total_speed("decode_tokens_per_s", [works[name]])
    for key, baseline in (("plain", "plain"), ("hf", "hf_generate")):
        if baseline in works:
            found |= total_speed(f"speedup_vs_{key}", [works[name]], [works[baseline]])
    return found


def _works(arm: dict[str, Any], one_row: bool, repeats: int) -> Works:
    """By prompt; without figures by prompt, the whole as though it were one."""
    if "per_prompt" in arm:
        failed = [each["prompt"] for each in arm["failures"]]
        prompts = enumerate(arm["per_prompt"])
        return [_work(each, repeats - failed.count(place)) for place, each in prompts]
    speed = arm.get("batch_decode_tokens_per_s")
    if "requests" in arm and one_row and arm["time_s"]["wall"]:
        speed = repeats * (arm["tokens"] - arm["requests"]) / arm["time_s"]["wall"]
    return [_total(speed if one_row and not arm["failed"] else None)]


def _work(figures: dict[str, Any] | None, repeats: int) -> Work | None:
    """A prompt's mean tokens after the first, at the median speed, which the file holds."""
    if figures is None:
        return None
    speed = figures["decode_tokens_per_s"]
    tokens = figures["tokens"] / repeats - 1 if repeats else 0.0
    found = Work(tokens, tokens / speed) if speed and tokens > 0 else None
    figures |= {"decode_tokens": found and found.tokens, "decode_s": found and found.seconds}
    return found


def _total(speed: float | None) -> Work | None:
    return Work(speed, 1.0) if speed else None


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


def with_defaults(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a registered strategy; of an unknown one what was given."""
    found = {**_defaults(kind), **options}
    given = found.get("drafters", ())
    inner = [{"type": each} if isinstance(each, str) else each for each in given]
    if inner:
        found["drafters"] = [
            {"type": each["type"], **with_defaults(each["type"], each)} for each in inner
        ]
    return found


def same_key(kind: str, options: Mapping[str, Any]) -> str:
    """A text that two arms share when they are the same strategy."""
    return json.dumps([kind, with_defaults(kind, options)], sort_keys=True, default=str)


def _defaults(kind: str) -> dict[str, Any]:
    if kind not in DRAFTERS:
        return {}
    module, name = DRAFTERS[kind].split(":")
    drafter = getattr(import_module(module), name)
    parameters = inspect.signature(getattr(drafter, "load", drafter)).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def results_title(results: dict[str, Any]) -> str:
    """Model, machine and settings; paths are cut to their last part."""
    where = results["provenance"]
    config = where["config"]
    return (
        f"{_name(config['target']['path'])} on {where['device']}, {where['dtype']}, batch "
        f"{config['batch_size']}, T = {config['sampling']['temperature']:g}, "
        f"{results['arms'][0]['prompts']} {_name(config['prompts']['source'])} prompts"
    )


def _name(path: str) -> str:
    return Path(path).name if path.count("/") != 1 or path[0] in "./~" else path
