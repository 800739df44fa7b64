"""Fields of a config file, each of the type that it must have."""

from typing import Any


def section(config: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    """An object inside the config; empty if it is null or not there.

    Raises:
        ValueError: it is something else.
    """
    return _of(config, name, where, dict, "an object") or {}


def flag(config: dict[str, Any], name: str, default: bool, where: str) -> bool:
    """True or false; the default if it is null or not there.

    Raises:
        ValueError: it is something else.
    """
    found = _of(config, name, where, bool, "true or false")
    return default if found is None else bool(found)


def text(config: dict[str, Any], name: str, where: str) -> str | None:
    """A string, or None.

    Raises:
        ValueError: it is something else.
    """
    found: str | None = _of(config, name, where, str, "a string")
    return found


def count(config: dict[str, Any], name: str, where: str) -> int | None:
    """A whole number above 0, or None.

    Raises:
        ValueError: it is something else.
    """
    found: int | None = _of(config, name, where, int, "a whole number above 0")
    if found is not None and (found < 1 or isinstance(found, bool)):
        raise ValueError(f"{where!r} has {name} {found!r}, which must be a whole number above 0")
    return found


def _of(config: dict[str, Any], name: str, where: str, kind: type, words: str) -> Any:
    found = config.get(name)
    if found is not None and not isinstance(found, kind):
        raise ValueError(f"{where!r} has {name} {found!r}, which must be {words}")
    return found
