"""Arguments that are what their annotations say, or are refused by name and value."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, wraps
from inspect import signature
from numbers import Integral, Real
from sys import float_info
from types import NoneType, UnionType
from typing import Any, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

Given = ParamSpec("Given")
Answer = TypeVar("Answer")
_KINDS = {int: "a whole number", float: "a finite number", bool: "True or False", str: "a string"}


def plain(value: Any) -> Any:
    """Arrays, tensors and their scalars as Python's own lists and numbers."""
    return value.tolist() if hasattr(value, "tolist") and hasattr(value, "dtype") else value


def checked(function: Callable[Given, Answer]) -> Callable[Given, Answer]:
    """Refuse arguments that are not what the annotations of their parameters say."""
    own, hints = signature(function), lru_cache(lambda: get_type_hints(function))

    @wraps(function)
    def call(*args: Given.args, **options: Given.kwargs) -> Answer:
        try:
            bound = own.bind(*args, **options)
        except TypeError:
            return function(*args, **options)  # which raises Python's own message
        for name, value in bound.arguments.items():
            bound.arguments[name] = fit(name, value, hints().get(name, Any))
        return function(*bound.args, **bound.kwargs)

    return call


def fit(name: str, value: Any, hint: Any) -> Any:
    """A value as plain Python; as it is where the type hint names more than numbers and text.

    Raises:
        ValueError: it is not of the kind that the hint says; True is no number.
    """
    must = _says(hint)
    if must and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if must and not _fits(plain(value), hint):
        raise ValueError(f"{name} is {value!r:.80} but must be {must}")
    return plain(value) if must else value


def require_counts(most: int = 1024, **counts: Any) -> None:
    """Refuse, by name, what is no whole number in [1, most]; None is left to its annotation."""
    for name, value in counts.items():
        if value is not None and not 1 <= fit(name, value, int) <= most:
            raise ValueError(f"{name} is {value} but must be at least 1 and at most {most}")


def _fits(value: Any, hint: Any) -> bool:
    inner = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, each) for each in inner)
    if get_origin(hint) is Sequence:
        is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        return is_list and all(_fits(plain(each), inner[0]) for each in value)
    if get_origin(hint) is Mapping:
        return isinstance(value, Mapping) and all(
            _fits(plain(k), inner[0]) and _fits(plain(v), inner[1]) for k, v in value.items()
        )
    if hint in (int, float):
        kind = Integral if hint is int else Real
        is_number = isinstance(value, kind) and not isinstance(value, bool)
        return is_number and bool(abs(value) <= float_info.max)  # type: ignore[operator]
    return hint is Any or isinstance(value, hint)


def _says(hint: Any) -> str:
    """Words for a hint; empty for one that is not checked."""
    inner = [_says(each) for each in get_args(hint)]
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(inner) if all(inner) else ""
    if get_origin(hint) is Sequence:
        return inner[0] and f"a list, each entry {inner[0]}"
    if get_origin(hint) is Mapping:
        return f"a mapping from {inner[0] or 'names'} to {inner[1] or 'values'}"
    return "None" if hint is NoneType else _KINDS.get(hint, "")
