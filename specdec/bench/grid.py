"""A grid over the keys of a bench's configuration: the cells of a sweep."""

import copy
import difflib
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_type_hints

from specdec.bench.config import BenchConfig, build_config, read_config
from specdec.bench.product import check_axis, cross_product, in_words

_LONGEST_NAME = 120


@dataclass(frozen=True)
class Cell:
    """One configuration of a sweep.

    Attributes:
        name: of its folder, made from the settings.
        settings: configuration key -> value.
        config: what the bench runs.
    """

    name: str
    settings: dict[str, Any]
    config: BenchConfig


def load_cells(path: str, overrides: Sequence[str] = ()) -> list[Cell]:
    """Read a YAML file whose `grid:` maps keys of the configuration to lists.

    Args:
        path: the file; "demo" is the packaged one.
        overrides: `key=value` each; `grid.sampling.temperature=[0,1]` sets an axis.

    Returns:
        The cross product, the last key changing fastest; one cell without settings for a file
        without a grid.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an axis that is no key of the configuration (with the nearest one) or no list
            of different values, or a cell that cannot be, by name.
    """
    given = read_config(path, overrides)
    if not isinstance(given, dict) or "grid" not in given:
        return [Cell("", {}, build_config(given))]
    axes = _axes(given.pop("grid"))
    _check_set_once(given, axes)
    return [_cell(given, settings) for settings in cross_product(axes)]


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each key, or the whole where two end alike."""
    ends = [key.rpartition(".")[2] for key in keys]
    return {key: end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)}


def _axes(grid: Any) -> dict[str, list[Any]]:
    if not isinstance(grid, dict) or not grid:
        raise ValueError(
            f"config grid is {grid!r} but must map keys of the configuration to lists, as in "
            "{batch_size: [1, 4]}"
        )
    known = list(_keys(BenchConfig))
    axes: dict[str, list[Any]] = {}
    for key, values in _flattened(grid):
        _check_key(key, known)
        axes[key] = check_axis(f"grid.{key}", values)
    return axes


def _flattened(grid: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys with dots, whether they were given with dots or as mappings in mappings."""
    for key, values in grid.items():
        if isinstance(values, dict):
            yield from _flattened(values, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", values


def _keys(schema: Any, prefix: str = "") -> Iterator[str]:
    """Keys of single values."""
    kinds = get_type_hints(schema)
    for field in fields(schema):
        if is_dataclass(kinds[field.name]):
            yield from _keys(kinds[field.name], f"{prefix}{field.name}.")
        elif field.name != "arms":
            yield f"{prefix}{field.name}"


def _check_key(key: str, known: list[str]) -> None:
    if key in known:
        return
    if key.partition(".")[0] == "arms":
        raise ValueError(
            f"config grid.{key} is of the arms, which all cells share; put a grid into the arm, as "
            "in {type: eagle3, grid: {depth: [3, 5]}}"
        )
    ends = {each.rpartition(".")[2]: each for each in known}
    near = difflib.get_close_matches(key, [*known, *ends], n=1)
    hint = f"; did you mean grid.{ends.get(near[0], near[0])}?" if near else ";"
    raise ValueError(
        f"config grid.{key} is no key of the configuration{hint} known: {', '.join(known)}"
    )


def _check_set_once(given: dict[str, Any], axes: dict[str, list[Any]]) -> None:
    for key in axes:
        section, dot, last = key.rpartition(".")
        place = given.get(section) if dot else given
        if isinstance(place, dict) and last in place:
            raise ValueError(
                f"config sets both {key} and grid.{key}; drop one of them, or give the one value "
                f"as grid.{key}=[{place[last]}]"
            )


def _cell(given: dict[str, Any], settings: dict[str, Any]) -> Cell:
    whole = copy.deepcopy(given)
    for key, value in settings.items():
        section, dot, last = key.rpartition(".")
        # A section that is no mapping is refused below, in words.
        place = (whole.get(section) or {}) if dot else whole
        if isinstance(place, dict):
            whole |= {section: place | {last: value}} if dot else {last: value}
    name = _folder_name(settings)
    try:
        return Cell(name, settings, build_config(whole))
    except ValueError as error:
        raise ValueError(f"cell {name}: {error}") from error


def _folder_name(settings: dict[str, Any]) -> str:
    """A name that any file system takes; different for different settings."""
    short = short_names(list(settings))
    text = ",".join(f"{short[key]}={in_words(value)}" for key, value in settings.items())
    name = re.sub(r"[^A-Za-z0-9._,=+-]+", "_", text)
    if name == text and len(name) <= _LONGEST_NAME:
        return name
    mark = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{name[:_LONGEST_NAME]}-{mark}"
