"""Of which machine and target the calls in a folder are: of one, which a finished run keeps."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specdec.bench.config import ArmConfig
from specdec.bench.store import replace_file
from specdec.checkpoints.identity import identify_target

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
    """Refuse to add calls of another machine, target or plan; write down what those here are of.

    A configuration does not say these: `target.path` and `draft_length.plan` may hold something
    else by now, and a device or dtype that is left out follows the machine.

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
        ValueError: finished calls in the folder are of another machine, target or plan.
    """
    conditions = {
        **{name: provenance[name] for name in _MACHINE},
        "the target's weights": identify_target(target).weights,
        **{f"the plan of {arm.name!r}": _plan_mark(arm) for arm in arms},
    }
    earlier = _read(folder / ORIGIN) if num_done else None
    if earlier is not None:
        _check(folder, earlier["conditions"], conditions)
    if num_done == num_calls:
        return provenance if earlier is None else dict(earlier["provenance"])
    text = json.dumps({"conditions": conditions, "provenance": provenance}, indent=1)
    replace_file(folder / ORIGIN, f"{text}\n".encode())
    return provenance


def _plan_mark(arm: ArmConfig) -> str | None:
    """A short hash of the plan that an arm follows; None without one, or where it is not there."""
    option = arm.draft_length or {}
    path = Path(str(option["plan"])).expanduser() if "plan" in option else None
    if path is None or not path.is_file():
        return None
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _read(path: Path) -> dict[str, Any] | None:
    """None for a folder of an older version, or a file that is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {key: dict(found[key]) for key in ("conditions", "provenance")}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _check(folder: Path, earlier: dict[str, Any], now: dict[str, Any]) -> None:
    for name, value in now.items():
        if name in earlier and earlier[name] != value:
            raise ValueError(
                f"{str(folder)!r} holds calls with another origin: {name} was {earlier[name]!r} "
                f"and is {value!r} now; choose another --out folder or remove this one"
            )
