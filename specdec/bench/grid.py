"""Grids: every combination of listed values, for the options of an arm or the keys of a run."""

import itertools
from math import prod
from typing import Any

_MOST = 10_000


def cross_product(axes: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Every combination of one value a key; the last key changes fastest."""
    if (num := prod(map(len, axes.values()))) > _MOST:
        raise ValueError(f"config grid has {num:,} combinations but must have at most {_MOST:,}")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def check_axis(key: str, values: Any) -> list[Any]:
    """Refuse what is no list of different values."""
    if not isinstance(values, list):
        raise ValueError(f"config {key} is {values!r} but must be a list of values, as in [1, 2]")
    if not values:
        raise ValueError(f"config {key} is an empty list but must hold at least one value")
    for place, value in enumerate(values):
        if value in values[:place]:
            raise ValueError(f"config {key} holds {value!r} twice; drop one of them")
    return values


def in_words(value: Any) -> str:
    """A value as it is shown in names."""
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def short_names(keys: list[str]) -> dict[str, str]:
    """The last part of each key, or the whole where two end alike."""
    ends = [key.rpartition(".")[2] for key in keys]
    return {key: end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)}


def expand_arms(arms: Any) -> Any:
    """Replace every arm that has a grid by one arm a combination.

    A name may hold options in braces, as in "eagle3 {depth}x{width}"; without any, the values are
    added to it. What is no list of mappings is returned for the configuration to refuse.
    """
    if not isinstance(arms, list):
        return arms
    return [each for place, arm in enumerate(arms) for each in _expand(arm, f"arms.{place}")]


def _expand(arm: Any, where: str) -> list[Any]:
    if not isinstance(arm, dict) or "grid" not in arm:
        return [arm]
    rest = {key: value for key, value in arm.items() if key != "grid"}
    options = rest.get("options") or {}
    if not isinstance(options, dict):
        return [rest]
    grid = arm["grid"]
    if not isinstance(grid, dict) or not grid:
        raise ValueError(
            f"config {where}.grid is {grid!r} but must map options of the arm to lists, as in "
            "{depth: [3, 5]}"
        )
    if both := [key for key in grid if key in options]:
        raise ValueError(
            f"config {where}.grid and the arm's options both set {both[0]!r}; drop it from one of "
            "them"
        )
    axes = {key: check_axis(f"{where}.grid.{key}", values) for key, values in grid.items()}
    return [
        {**rest, "name": _name(rest, options, values, where), "options": {**options, **values}}
        for values in cross_product(axes)
    ]


def _name(arm: dict[str, Any], options: dict[str, Any], values: dict[str, Any], where: str) -> str:
    template = str(arm.get("name") or arm.get("type") or "")
    if "{" not in template:
        return " ".join([template, *(f"{key}={in_words(v)}" for key, v in values.items())])
    known = {key: in_words(value) for key, value in {**options, **values}.items()}
    try:
        return template.format_map(known)
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        raise ValueError(
            f"config {where}.name is {template!r}, but what stands in braces must be an option of "
            f"the arm: {', '.join(sorted(known))}"
        ) from error
