"""Arms with a `grid:` over their options: one arm for each combination."""

from typing import Any

from specdec.bench.product import check_axis, cross_product, in_words


def expand_arms(arms: Any) -> Any:
    """Replace every arm that has a grid by one arm a combination.

    Args:
        arms: as they stand in the file. A name may hold options in braces, as in
            "eagle3 {depth}x{width}"; without any, the values are added to it.

    Returns:
        Arms without grids; what is no list of mappings is returned for others to refuse.

    Raises:
        ValueError: a grid that is no mapping from options to lists, an option that is set twice,
            or a name with an option that is not there.
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
    axes = _axes(arm["grid"], options, f"{where}.grid")
    return [
        {**rest, "name": _name(rest, options, values, where), "options": {**options, **values}}
        for values in cross_product(axes)
    ]


def _axes(grid: Any, options: dict[str, Any], where: str) -> dict[str, list[Any]]:
    if not isinstance(grid, dict) or not grid:
        raise ValueError(
            f"config {where} is {grid!r} but must map options of the arm to lists, as in "
            "{depth: [3, 5]}"
        )
    if both := [key for key in grid if key in options]:
        raise ValueError(
            f"config {where} and the arm's options both set {both[0]!r}; drop it from one of them"
        )
    return {key: check_axis(f"{where}.{key}", values) for key, values in grid.items()}


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
