"""Run the cells of a grid, each a bench in a folder of its own, and join what they gave."""

import copy
import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from specdec.bench.arms import build_arm
from specdec.bench.config import (
    ArmConfig,
    BenchConfig,
    TargetConfig,
    build_config,
    check_axis,
    cross_product,
    in_words,
    read_config,
)
from specdec.bench.runner import (
    RESULTS,
    SCHEMA,
    Processes,
    check_origin,
    check_results,
    encode_prompts,
    fingerprint,
    open_target,
    read_prompts,
    run_bench,
)
from specdec.bench.store import read_run
from specdec.common.files import parse_json, replace_file
from specdec.common.provenance import joined, machine
from specdec.targets.hf import HFTarget
from specdec.verify import Rule, get_rule

_LONGEST_NAME = 120


@dataclass(frozen=True)
class Cell:
    """One configuration of a sweep.

    Attributes:
        name: of its folder, made from the settings.
        settings: configuration key -> value.
        config: what the bench runs.
    """

    name: str
    settings: dict[str, Any]
    config: BenchConfig


def load_cells(path: str, overrides: Sequence[str] = ()) -> list[Cell]:
    """Read a YAML file whose `grid:` maps keys of the configuration to lists.

    Args:
        path: the file; "demo" is the packaged one.
        overrides: `key=value` each; `grid.sampling.temperature=[0,1]` sets an axis.

    Returns:
        The cross product, the last key changing fastest; one cell without settings for a file
        without a grid.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an axis that is no key of the configuration (with the nearest one) or no list
            of different values, or a cell that cannot be, by name.
    """
    given = read_config(path, overrides)
    if not isinstance(given, dict) or "grid" not in given:
        return [Cell("", {}, build_config(given))]
    axes = _axes(given.pop("grid"))
    _check_set_once(given, axes)
    return [_cell(given, settings) for settings in cross_product(axes)]


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each key, or the whole where two end alike."""
    ends = [key.rpartition(".")[2] for key in keys]
    return {key: end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)}


def _axes(grid: Any) -> dict[str, list[Any]]:
    if not isinstance(grid, dict) or not grid:
        raise ValueError(
            f"config grid is {grid!r} but must map keys of the configuration to lists, as in "
            "{batch_size: [1, 4]}"
        )
    known = list(_keys(BenchConfig))
    axes: dict[str, list[Any]] = {}
    for key, values in _flattened(grid):
        _check_key(key, known)
        axes[key] = check_axis(f"grid.{key}", values)
    return axes


def _flattened(grid: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys with dots, whether they were given with dots or as mappings in mappings."""
    for key, values in grid.items():
        if isinstance(values, dict):
            yield from _flattened(values, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", values


def _keys(schema: Any, prefix: str = "") -> Iterator[str]:
    """Keys of single values."""
    kinds = get_type_hints(schema)
    for field in fields(schema):
        if is_dataclass(kinds[field.name]):
            yield from _keys(kinds[field.name], f"{prefix}{field.name}.")
        elif field.name != "arms":
            yield f"{prefix}{field.name}"


def _check_key(key: str, known: list[str]) -> None:
    if key in known:
        return
    if key.partition(".")[0] == "arms":
        raise ValueError(
            f"config grid.{key} is of the arms, which all cells share; put a grid into the arm, as "
            "in {type: eagle3, grid: {depth: [3, 5]}}"
        )
    ends = {each.rpartition(".")[2]: each for each in known}
    near = difflib.get_close_matches(key, [*known, *ends], n=1)
    hint = f"; did you mean grid.{ends.get(near[0], near[0])}?" if near else ";"
    raise ValueError(
        f"config grid.{key} is no key of the configuration{hint} known: {', '.join(known)}"
    )


def _check_set_once(given: dict[str, Any], axes: dict[str, list[Any]]) -> None:
    for key in axes:
        section, dot, last = key.rpartition(".")
        place = given.get(section) if dot else given
        if isinstance(place, dict) and last in place:
            raise ValueError(
                f"config sets both {key} and grid.{key}; drop one of them, or give the one value "
                f"as grid.{key}=[{place[last]}]"
            )


def _cell(given: dict[str, Any], settings: dict[str, Any]) -> Cell:
    whole = copy.deepcopy(given)
    for key, value in settings.items():
        section, dot, last = key.rpartition(".")
        # A section that is no mapping is refused below, in words.
        place = (whole.get(section) or {}) if dot else whole
        if isinstance(place, dict):
            whole |= {section: place | {last: value}} if dot else {last: value}
    name = _folder_name(settings)
    try:
        return Cell(name, settings, build_config(whole))
    except ValueError as error:
        raise ValueError(f"cell {name}: {error}") from error


def _folder_name(settings: dict[str, Any]) -> str:
    """A name that any file system takes; different for different settings."""
    short = short_names(list(settings))
    text = ",".join(f"{short[key]}={in_words(value)}" for key, value in settings.items())
    name = re.sub(r"[^A-Za-z0-9._,=+-]+", "_", text)
    if name == text and len(name) <= _LONGEST_NAME:
        return name
    mark = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{name[:_LONGEST_NAME]}-{mark}"


SWEEP = "sweep.json"
Progress = Callable[[int, int, str], None]

# What ends a cell but not the sweep.
_CELL_ERRORS = (ValueError, RuntimeError, MemoryError, FloatingPointError, OSError)


def run_sweep(
    cells: Sequence[Cell],
    folder: Path,
    progress: Progress = lambda done, total, text: None,
    processes: Processes = Processes(),  # noqa: B008 (frozen)
) -> dict[str, Any]:
    """Run the cells that are not finished yet and write `sweep.json`.

    A target is loaded once for all cells that share it, the finished ones too: their results stand
    beside the others', so they must be of the same machine, target and drafters. What a cell cannot
    do is refused before the first one runs; one that fails later is told of in its "error", and the
    others go on.

    Args:
        cells: see `load_cells`.
        folder: for `sweep.json` and the cells' own folders, `cells/NAME`.
        progress: called with calls of the cell done, its calls in all, and what runs next.
        processes: those that share the calls of each cell; all of them call this.

    Returns:
        The content of `sweep.json`; `check_sweep` says whether it stands.

    Raises:
        ValueError: a cell that cannot run, or whose folder is of another configuration or origin,
            see `settle_origin`.
        FileNotFoundError: a file that a cell names is not there.
        RuntimeError: another process failed.
    """
    targets = _Targets(processes)
    # Nothing is asked of a cell's folder again, so that no process sees another's later results.
    finished = {cell.name: _finished(cell, folder / "cells" / cell.name) for cell in cells}
    with processes.together():
        _check(cells, folder, finished, targets, processes)
    rows = []
    for number, cell in enumerate(cells, 1):
        show = _prefixed(progress, f"cell {number} of {len(cells)}: ")
        results, error = finished[cell.name], None
        try:
            if results is None:
                where, target = folder / "cells" / cell.name, targets.of(cell.config)
                results = run_bench(cell.config, where, show, target=target, processes=processes)
            check_results(results)
        except _CELL_ERRORS as failure:
            error = f"{type(failure).__name__}: {failure}"
        rows.append(_row(cell, results, error))
    sweep = {"schema": "specdec-sweep-2", "provenance": joined(processes.num), "cells": rows}
    text = json.dumps(sweep, indent=1, allow_nan=False) + "\n"
    if processes.is_first:
        replace_file(folder / SWEEP, text.encode())
    content: dict[str, Any] = json.loads(text)
    return content


def check_sweep(sweep: dict[str, Any]) -> None:
    """Fail a sweep with a cell that failed.

    Raises:
        RuntimeError: the cells that did, and why the first one did.
    """
    failed = [cell for cell in sweep["cells"] if cell["error"]]
    if failed:
        names = ", ".join(cell["name"] for cell in failed)
        raise RuntimeError(
            f"{len(failed)} of {len(sweep['cells'])} cells failed: {names}; the first: "
            f"{failed[0]['error']}"
        )


class _Targets:
    """The target that was loaded last: cells mostly share one."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._config: TargetConfig | None = None
        self._target: HFTarget | None = None

    def of(self, config: BenchConfig) -> HFTarget:
        if self._target is None or config.target != self._config:
            self._target = None  # two of them may not fit
            self._target = open_target(config.target, self._processes)
            self._config = config.target
        return self._target


def _prefixed(progress: Progress, words: str) -> Progress:
    return lambda done, total, text: progress(done, total, words + text)


def _row(cell: Cell, results: dict[str, Any] | None, error: str | None) -> dict[str, Any]:
    return {
        "name": cell.name,
        "settings": cell.settings,
        "folder": f"cells/{cell.name}",
        "error": error,
        "arms": results["arms"] if results else [],
    }


def _finished(cell: Cell, folder: Path) -> dict[str, Any] | None:
    """The results of a cell that an earlier command finished."""
    path = folder / RESULTS
    if not path.is_file():
        return None
    try:
        results: dict[str, Any] = parse_json(path.read_text())
        is_same = results["schema"] == SCHEMA and results["provenance"][
            "config_fingerprint"
        ] == fingerprint(cell.config, read_prompts(cell.config))
    except (ValueError, KeyError, TypeError):
        return None
    return results if is_same else None


def _check(
    cells: Sequence[Cell],
    folder: Path,
    finished: dict[str, dict[str, Any] | None],
    targets: _Targets,
    processes: Processes,
) -> None:
    """Refuse every cell that cannot run, or cannot stay, before one runs."""
    makes_trees: dict[str, bool] = {}
    for cell in cells:
        where, is_finished = folder / "cells" / cell.name, finished[cell.name] is not None
        try:
            prompts = read_prompts(cell.config)
            has_calls = is_finished or read_run(where, fingerprint(cell.config, prompts))
            rule = get_rule(cell.config.rule)
            target = targets.of(cell.config)
            # The first process alone writes down the origin, so it is of its own machine.
            if has_calls and processes.is_first:
                check_origin(where, machine(target), target, cell.config.arms)
            if not is_finished:
                encode_prompts(prompts, target)
                for arm in cell.config.arms:
                    _check_arm(arm, cell.config, target, rule, makes_trees)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"cell {cell.name}: {error}") from error
        except ValueError as error:
            raise ValueError(f"cell {cell.name}: {error}") from error


def _check_arm(
    arm: ArmConfig, config: BenchConfig, target: HFTarget, rule: Rule, makes_trees: dict[str, bool]
) -> None:
    """Refuse options that no drafter takes, and trees under a rule for chains.

    Args:
        arm: of the cell.
        config: of the cell.
        target: of the cell.
        rule: of the cell.
        makes_trees: what is known of arms that were built already.
    """
    key = repr((config.target, arm.type, arm.options, arm.draft_length))
    if key not in makes_trees:
        makes_trees[key] = build_arm(config, target, arm).makes_trees
    if makes_trees[key] and not rule.supports_trees:
        raise ValueError(
            f"rule {config.rule!r} judges chains only but the arm {arm.name!r} makes trees; give "
            "the arm a chain, or the grid another rule"
        )
