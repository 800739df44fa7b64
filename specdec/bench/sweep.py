"""A sweep: the cells of a grid, each a run in a folder of its own, and what they gave together."""

import copy
import difflib
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from specdec.bench.arms import build_arm, decoding_of
from specdec.bench.config import (
    BenchConfig,
    RunConfig,
    TargetConfig,
    build_config,
    read_config,
)
from specdec.bench.grid import check_axis, cross_product, in_words, short_names
from specdec.bench.results import BenchResults, CellResults, SweepProvenance, SweepResults
from specdec.bench.runner import check_results, open_store, run_bench, take_turns
from specdec.bench.workloads import Group, Progress, make_groups
from specdec.common.provenance import code
from specdec.targets.hf import HFTarget
from specdec.targets.load import load_target
from specdec.verify import get_rule

_LONGEST_NAME = 120
# What ends a cell but not the sweep.
_CELL_ERRORS = (ValueError, RuntimeError, MemoryError, FloatingPointError, OSError)


@dataclass(frozen=True)
class Cell:
    """One configuration of a sweep.

    Attributes:
        name: name of its folder, made from the settings.
        settings: configuration key -> value.
        config: configuration to run.
    """

    name: str
    settings: dict[str, Any]
    config: RunConfig


def load_cells(path: str, overrides: Sequence[str] = ()) -> list[Cell]:
    """Read a YAML file whose `grid:` maps keys of the configuration to lists.

    The cells are the cross product, the last key changing fastest. A file without a grid is one
    cell without settings; suites have no grid.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an axis that is no key of the configuration (with the nearest one) or no list
            of different values, or a cell that cannot be, by name.
    """
    given = read_config(path, overrides)
    if not isinstance(given, dict) or "grid" not in given or "suite" in given:
        return [Cell("", {}, build_config(given))]
    grid = given.pop("grid")
    if not isinstance(grid, dict) or not grid:
        raise ValueError(
            f"config grid is {grid!r} but must map keys of the configuration to lists, as in "
            "{batch_size: [1, 4]}"
        )
    known, axes = list(_keys(BenchConfig)), dict[str, list[Any]]()
    for key, values in _flattened(grid):
        _check_key(key, known)
        axes[key] = check_axis(f"grid.{key}", values)
        section, dot, last = key.rpartition(".")
        place = given.get(section) if dot else given
        if isinstance(place, dict) and last in place:
            raise ValueError(
                f"config sets both {key} and grid.{key}; drop one of them, or give the one value "
                f"as grid.{key}=[{place[last]}]"
            )
    return [_cell(given, settings) for settings in cross_product(axes)]


def _flattened(grid: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys with dots, whether they were given with dots or as mappings in mappings."""
    for key, values in grid.items():
        if isinstance(values, dict):
            yield from _flattened(values, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", values


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Keys of single values."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _keys(kind, f"{prefix}{name}.")
        elif name != "arms":
            yield f"{prefix}{name}"


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


def run_sweep(
    cells: Sequence[Cell], folder: Path, progress: Progress = lambda done, total, text: None
) -> SweepResults:
    """Run the cells that are not finished yet and write `sweep.json`.

    A target is loaded once for all cells that share it. What a cell cannot do is refused before
    the first one runs; one that fails later is told of in its "error", and the others go on. The
    folder holds the cells' own folders, `cells/NAME`.

    Raises:
        ValueError: a cell that cannot run, or whose folder is of another run.
        FileNotFoundError: a file that a cell names is not there.
    """
    targets = _Targets()
    makes_trees: dict[str, bool] = {}
    groups = {cell.name: _checked(cell, folder, targets, makes_trees, progress) for cell in cells}
    found = []
    for number, cell in enumerate(cells, 1):

        def show(done: int, total: int, text: str, number: int = number) -> None:
            progress(done, total, f"cell {number} of {len(cells)}: {text}")

        target, where = targets.of(cell.config.target), f"cells/{cell.name}"
        results, error = None, None
        try:
            results = run_bench(
                cell.config, folder / where, show, target=target, groups=groups[cell.name]
            )
            check_results(results)
        except _CELL_ERRORS as failure:
            error = f"{type(failure).__name__}: {failure}"
        arms = results.arms if isinstance(results, BenchResults) else []
        found.append(
            CellResults(
                name=cell.name, settings=cell.settings, folder=where, error=error, arms=arms
            )
        )
    sweep = SweepResults(provenance=SweepProvenance(**code()), cells=found)
    sweep.write(folder)
    return sweep


def check_sweep(sweep: SweepResults) -> None:
    """Fail a sweep with a cell that failed: `RuntimeError` with the first one's reason."""
    failed = [cell for cell in sweep.cells if cell.error]
    if failed:
        names = ", ".join(cell.name for cell in failed)
        raise RuntimeError(
            f"{len(failed)} of {len(sweep.cells)} cells failed: {names}; the first: "
            f"{failed[0].error}"
        )


class _Targets:
    """The target that was loaded last: cells mostly share one."""

    def __init__(self) -> None:
        self._loaded: tuple[TargetConfig, HFTarget] | None = None

    def of(self, config: TargetConfig) -> HFTarget:
        if self._loaded is None or config != self._loaded[0]:
            self._loaded = None  # two of them may not fit
            self._loaded = config, load_target(**config.model_dump())
        return self._loaded[1]


def _checked(
    cell: Cell, folder: Path, targets: _Targets, makes_trees: dict[str, bool], progress: Progress
) -> list[Group]:
    """Refuse a cell that cannot run, or whose folder is another run's; returns its workload.

    `makes_trees` remembers arms that were built for other cells.
    """
    config = cell.config
    try:
        target = targets.of(config.target)
        groups = make_groups(config, target, progress)
        with open_store(config, folder / "cells" / cell.name, target, groups) as store:
            turns = take_turns(groups, config.arm_names, config.repeats)
            is_finished = all(turn.key in store.done for turn in turns)
        for arm in () if is_finished else config.arms:
            key = f"{config.target} {arm}"
            if key not in makes_trees:
                makes_trees[key] = build_arm(arm, target, decoding_of(config)).makes_trees
            if makes_trees[key] and not get_rule(config.rule).supports_trees:
                raise ValueError(
                    f"rule {config.rule!r} judges chains only but the arm {arm.name!r} makes "
                    "trees; give the arm a chain, or the grid another rule"
                )
    except FileNotFoundError as error:
        raise FileNotFoundError(f"cell {cell.name}: {error}") from error
    except ValueError as error:
        raise ValueError(f"cell {cell.name}: {error}") from error
    return groups
