"""An arm's option `draft_length`: a schedule over batch sizes, or the controller of a plan."""

from typing import Any

from specdec.draft_length import Schedule

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
