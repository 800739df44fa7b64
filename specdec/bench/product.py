"""The cross product of lists of values under keys, as they stand in a YAML file."""

import itertools
from math import prod
from typing import Any

_MOST = 10_000


def cross_product(axes: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Every combination of one value a key; the last key changes fastest.

    Raises:
        ValueError: there are more of them than anyone can run.
    """
    if (num := prod(map(len, axes.values()))) > _MOST:
        raise ValueError(f"config grid has {num:,} combinations but must have at most {_MOST:,}")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def check_axis(where: str, values: Any) -> list[Any]:
    """Refuse what is no list of different values.

    Args:
        where: the key in the file, for messages.
        values: what stands there.

    Raises:
        ValueError: it is no list, is empty, or holds a value twice.
    """
    if not isinstance(values, list):
        raise ValueError(f"config {where} is {values!r} but must be a list of values, as in [1, 2]")
    if not values:
        raise ValueError(f"config {where} is an empty list but must hold at least one value")
    for place, value in enumerate(values):
        if value in values[:place]:
            raise ValueError(f"config {where} holds {value!r} twice; drop one of them")
    return values


def in_words(value: Any) -> str:
    """A value as it is shown in names."""
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
