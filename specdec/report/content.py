"""What a run's file holds, and the words for what it lacks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Content(dict[str, Any]):
    """An object of a JSON file; asked for a key that it lacks, it tells the file and the place.

    Attributes:
        file: that it was read from.
        place: where in it, as in "arms[2].options"; "" for the whole.
    """

    def __init__(self, values: Mapping[str, Any], file: Path, place: str = "") -> None:
        super().__init__(values)
        self.file, self.place = file, place

    def __missing__(self, key: str) -> Any:
        raise ValueError(
            f"{str(self.file)!r} has no {_below(self.place, key)}, which the report needs; restore "
            "the file, or run it again"
        )


def read_content(value: Any, file: Path, place: str = "") -> Any:
    """Turn what JSON gave into the same with `Content` for its objects, all the way down."""
    if isinstance(value, list):
        return [read_content(each, file, f"{place}[{i}]") for i, each in enumerate(value)]
    if isinstance(value, dict):
        inner = {key: read_content(v, file, _below(place, key)) for key, v in value.items()}
        return Content(inner, file, place)
    return value


def part(whole: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The object under a key; where there is none, an empty one in its place."""
    found: dict[str, Any] = whole.get(key) or {}
    if found or not isinstance(whole, Content):
        return found
    return Content({}, whole.file, _below(whole.place, key))


def _below(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key
