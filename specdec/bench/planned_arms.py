"""The choice of a plan beside the arms of a bench, each under a name of its own."""

from collections.abc import Mapping, Sequence
from typing import Any

from specdec.bench.config import ArmConfig


def add_choice(
    plan: dict[str, Any], chosen: Sequence[ArmConfig], arms: Sequence[ArmConfig]
) -> tuple[dict[str, Any], list[ArmConfig]]:
    """Put what a plan chose before the arms that were given.

    A plan knows no draft lengths, and names the shapes that it thinks of itself: what has the name
    of a given arm may be another configuration. It is called "NAME (planned)" then, so that both
    are measured.

    Args:
        plan: the content of `plan.json`.
        chosen: the arm of its choice; none for plain decoding.
        arms: that were given.

    Returns:
        The plan with its configurations under the names of the arms that measure them; and the
        arms, the choice among them once.
    """
    given = {arm.name: arm for arm in arms}
    names = [_name(arm.name, arm.type, arm.options, given) for arm in chosen]
    added = [
        ArmConfig(name, arm.type, arm.options)
        for name, arm in zip(names, chosen, strict=True)
        if name not in given
    ]
    return {
        **plan,
        "choice": _renamed(plan["choice"], given),
        "configurations": [_renamed(row, given) for row in plan["configurations"]],
    }, [*added, *arms]


def _renamed(row: dict[str, Any], given: Mapping[str, ArmConfig]) -> dict[str, Any]:
    return {**row, "name": _name(row["name"], row["type"], row["options"], given)}


def _name(name: str, kind: str, options: dict[str, Any], given: Mapping[str, ArmConfig]) -> str:
    """The name of a configuration: its own, unless a given arm has it and is another one."""
    arm = given.get(name)
    if arm is None or (arm.type, arm.options, arm.draft_length) == (kind, options, None):
        return name
    return _name(f"{name} (planned)", kind, options, given)
