"""Of which machine, target and drafters the calls in a folder are: of one each."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specdec.bench.arm_marks import checkpoint_mark, plan_mark
from specdec.bench.config import ArmConfig
from specdec.checkpoints.identity import TARGET, as_json, check_resumed, identify_target
from specdec.files import parse_json, replace_file

ORIGIN = "origin.json"
_MACHINE = ("device", "cpu", "cpu_count", "dtype", "quantized")


def settle_origin(
    folder: Path,
    provenance: dict[str, Any],
    target: Any,
    arms: Sequence[ArmConfig],
    num_done: int,
    num_calls: int,
) -> dict[str, Any]:
    """Refuse to add calls of another origin; write down of which one those here are.

    A configuration does not say these: `target.path`, `draft_length.plan` and the folders in an
    arm's options may hold something else by now, and a device or dtype that is left out follows
    the machine. Another commit is not refused: the provenance tells which one measured last.

    Args:
        folder: of the run.
        provenance: of now, see `provenance.machine`.
        target: an `HFTarget`.
        arms: of the configuration.
        num_done: finished calls in the folder.
        num_calls: of the whole run.

    Returns:
        The provenance of now; where nothing is left to measure, that of the last start that
        measured anything.

    Raises:
        ValueError: finished calls in the folder are of another machine, target, plan or
            checkpoint of an arm.
    """
    conditions = _conditions(provenance, target, arms)
    earlier = _read(folder / ORIGIN) if num_done else None
    if earlier is not None:
        _compare(folder, earlier["conditions"], conditions)
        conditions = earlier["conditions"] | conditions
    if num_done == num_calls:
        return provenance if earlier is None else dict(earlier["provenance"])
    text = json.dumps({"conditions": conditions, "provenance": provenance}, indent=1)
    replace_file(folder / ORIGIN, f"{text}\n".encode())
    return provenance


def check_origin(
    folder: Path, provenance: dict[str, Any], target: Any, arms: Sequence[ArmConfig]
) -> None:
    """Refuse a folder with finished calls as `settle_origin` does, and write nothing."""
    earlier = _read(folder / ORIGIN)
    if earlier is not None:
        _compare(folder, earlier["conditions"], _conditions(provenance, target, arms))


def _conditions(
    provenance: dict[str, Any], target: Any, arms: Sequence[ArmConfig]
) -> dict[str, Any]:
    known = identify_target(target)
    checkpoints = {f"the checkpoint of {arm.name!r}": checkpoint_mark(arm) for arm in arms}
    return {
        **{name: provenance[name] for name in _MACHINE},
        "the target's weights": known.weights,
        TARGET: as_json(known),
        **{f"the plan of {arm.name!r}": plan_mark(arm) for arm in arms},
        # A checkpoint that is gone is not another one.
        **{name: mark for name, mark in checkpoints.items() if mark is not None},
    }


def _read(path: Path) -> dict[str, Any] | None:
    """None for a folder of an older version, or a file that is damaged."""
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
        return {key: dict(found[key]) for key in ("conditions", "provenance")}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _compare(folder: Path, earlier: dict[str, Any], now: dict[str, Any]) -> None:
    for name, value in now.items():
        if name == TARGET:
            check_resumed(folder, earlier.get(name), value)
        elif name in earlier and earlier[name] != value:
            raise ValueError(
                f"{str(folder)!r} holds calls with another origin: {name} was {earlier[name]!r} "
                f"and is {value!r} now; choose another --out folder or remove this one"
            )
