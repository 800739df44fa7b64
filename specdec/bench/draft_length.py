"""An arm's `draft_length`: a schedule over batch sizes, or the controller of a plan."""

import json
from pathlib import Path
from typing import Any

from specdec.draft_length import DraftLength, OnlineController, Schedule

Option = dict[Any, Any] | None


def check_draft_length(arm: str, option: Option) -> Option:
    """Refuse what is neither `{batch size: nodes}` nor `{plan: PATH}`.

    Args:
        arm: name, for messages.
        option: the arm's `draft_length`.

    Returns:
        The option, its batch sizes in order.

    Raises:
        ValueError: another key, or a number that cannot be.
    """
    if option is None or (set(option) == {"plan"} and isinstance(option["plan"], str)):
        return option
    try:
        Schedule(option)
    except ValueError as error:
        raise ValueError(
            f"config arms: draft_length of {arm!r}: {error}; it must map batch sizes to numbers of "
            "nodes, as in {1: 6, 8: 0}, or be {plan: PATH} of a plan.json"
        ) from error
    return dict(sorted(option.items()))


def load_draft_length(option: Option, makes_trees: bool = False) -> DraftLength | None:
    """What `generate` takes as `draft_length`, built afresh; None for no limit.

    Args:
        option: the arm's `draft_length`.
        makes_trees: whether its drafter does.

    Raises:
        FileNotFoundError: the plan is not there.
        ValueError: it holds no controller.
    """
    if option is None:
        return None
    if "plan" in option:
        path = Path(option["plan"]).expanduser()
        return OnlineController(_step_s(path), trees=makes_trees)
    return Schedule(option)


def _step_s(path: Path) -> dict[int, dict[int, float]]:
    """Seconds of a step by batch size and nodes, which JSON keeps under text keys."""
    if not path.is_file():
        raise FileNotFoundError(
            f"draft_length.plan is {str(path)!r} but must be a plan.json that specdec plan wrote"
        )
    try:
        table = json.loads(path.read_text())["controller"]["step_s"]
        return {
            int(size): {int(nodes): float(seconds) for nodes, seconds in row.items()}
            for size, row in table.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"draft_length.plan {str(path)!r} holds no controller.step_s; give a plan.json that "
            "specdec plan wrote"
        ) from error
