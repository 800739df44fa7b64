"""An arm's `draft_length`: a schedule over batch sizes, or the controller of a plan."""

import json
from pathlib import Path
from typing import Any

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
    for size, nodes in option.items():
        if not (_is_int(size) and size >= 1 and _is_int(nodes) and nodes >= 0):
            raise ValueError(
                f"config arms: draft_length of {arm!r} holds {size!r}: {nodes!r}, but must map "
                "batch sizes from 1 to numbers of nodes from 0, as in {1: 6, 8: 0}, or be "
                "{plan: PATH} of a plan.json"
            )
    if not option:
        raise ValueError(
            f"config arms: draft_length of {arm!r} is empty but must hold at least one batch size, "
            "as in {1: 6, 8: 0}; or leave it out"
        )
    return dict(sorted(option.items()))


def load_draft_length(option: Option) -> Any:
    """What `generate` takes as `draft_length`, built afresh; None for no limit.

    Raises:
        FileNotFoundError: the plan is not there.
        ValueError: it holds no controller.
    """
    if option is None:
        return None
    from specdec.draft_length import OnlineController, Schedule

    if "plan" in option:
        return OnlineController(_step_s(Path(option["plan"]).expanduser()))
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


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
