"""A sweep: the cells of a grid, each a run in a folder of its own, and what they gave together."""

from collections.abc import Sequence
from pathlib import Path

from specdec.bench.arms import build_arm
from specdec.bench.config import Cell, RunConfig
from specdec.bench.measure import PROMPT_ERRORS
from specdec.bench.results import BenchResults, CellResults, SweepProvenance, SweepResults
from specdec.bench.runner import check_results, open_store, run_bench, take_turns
from specdec.bench.workloads import Group, Progress, make_groups
from specdec.common.provenance import code
from specdec.targets.hf import HFTarget
from specdec.targets.load import load_target


def run_sweep(
    cells: Sequence[Cell], folder: Path, progress: Progress = lambda done, total, text: None
) -> SweepResults:
    """Run the cells that are not finished yet, in `cells/NAME`, and write `sweep.json`.

    A target is loaded once for all cells that share it. What a cell cannot do is refused before
    the first one runs; one that fails later is told of in its "error", and the others go on.
    """
    loaded: dict[str, HFTarget] = {}

    def target_of(config: RunConfig) -> HFTarget:
        key = config.target.model_dump_json()
        if key not in loaded:
            loaded.clear()  # two of them may not fit
            loaded[key] = load_target(**config.target.model_dump())
        return loaded[key]

    groups = []
    built: set[str] = set()
    for cell in cells:
        try:
            place, target = folder / "cells" / cell.name, target_of(cell.config)
            groups.append(_check(cell.config, place, target, built, progress))
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(f"cell {cell.name}: {error}") from error
    found = []
    for number, (cell, asked) in enumerate(zip(cells, groups, strict=True), 1):

        def show(done: int, total: int, text: str, number: int = number) -> None:
            progress(done, total, f"cell {number} of {len(cells)}: {text}")

        row = CellResults(
            name=cell.name, settings=cell.settings, folder=f"cells/{cell.name}", error=None, arms=[]
        )
        target = target_of(cell.config)
        try:
            results = run_bench(cell.config, folder / row.folder, show, target=target, groups=asked)
            assert isinstance(results, BenchResults)
            row.arms = results.arms
            check_results(results)
        except (*PROMPT_ERRORS, OSError) as failure:
            row.error = f"{type(failure).__name__}: {failure}"
        found.append(row)
    sweep = SweepResults(provenance=SweepProvenance(**code()), cells=found)
    sweep.write(folder)
    return sweep


def check_sweep(sweep: SweepResults) -> None:
    """Fail a sweep with a cell that failed: `RuntimeError` with the first one's reason."""
    if failed := [cell for cell in sweep.cells if cell.error]:
        names = ", ".join(cell.name for cell in failed)
        raise RuntimeError(
            f"{len(failed)} of {len(sweep.cells)} cells failed: {names}; the first: "
            f"{failed[0].error}"
        )


def _check(
    config: RunConfig, folder: Path, target: HFTarget, built: set[str], progress: Progress
) -> list[Group]:
    """Refuse a cell that cannot run, or whose folder is another run's; returns its workload.

    `built` remembers the arms of other cells, which need not be built again.
    """
    groups = make_groups(config, target, progress)
    with open_store(config, folder, target, groups) as store:
        turns = take_turns(groups, config.arm_names, config.repeats)
        is_done = all(key in store.done for key, *_ in turns)
    for arm in [] if is_done else config.arms:
        key = f"{config.target} {config.rule} {arm}"
        if key not in built:
            build_arm(arm, target, config)
            built.add(key)
    return groups
