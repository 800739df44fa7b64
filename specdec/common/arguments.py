"""Checks of what callers pass in: by the type hint, one error that names argument and value."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache, wraps
from inspect import signature
from numbers import Integral, Real
from sys import float_info
from types import NoneType, UnionType
from typing import Any, ParamSpec, TypeVar, Union, get_args, get_origin

Given = ParamSpec("Given")
Answer = TypeVar("Answer")
_KINDS = {int: "a whole number", float: "a finite number", bool: "True or False", str: "a string"}
# What engines and other toolkits call an option, and what it may be called here.
_ELSEWHERE = {
    "method": "type",
    "model": "path",
    "num_speculative_tokens": "num_draft_tokens depth max_nodes",
    "num_assistant_tokens": "num_draft_tokens depth max_nodes",
    "speculative_num_steps": "depth num_draft_tokens",
    "speculative_eagle_topk": "width",
    "speculative_num_draft_tokens": "max_nodes",
    "prompt_lookup_max": "max_ngram",
    "prompt_lookup_min": "min_ngram",
    "max_matching_ngram_size": "max_ngram",
    "kl": "forward_kl",
    "lk": "lk_hybrid",
    "nla": "negative_log_acceptance",
    "tvd": "total_variation",
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "torch_dtype": "dtype",
    "tensor_parallel_size": "device_map",
}


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Find the known name that is meant: by its name elsewhere, or else by its letters."""
    names = list(known)
    same = [each for each in _ELSEWHERE.get(name, "").split() if each in names]
    return next(iter(same or get_close_matches(name, names, n=1)), None)


def plain(value: Any) -> Any:
    """Turn arrays, tensors and their scalars into Python's own lists and numbers."""
    return value.tolist() if hasattr(value, "tolist") and hasattr(value, "dtype") else value


def checked(function: Callable[Given, Answer]) -> Callable[Given, Answer]:
    """Refuse arguments that do not fit the annotations of their parameters."""
    own = signature(function)
    hints = {name: parameter.annotation for name, parameter in own.parameters.items()}

    @wraps(function)
    def call(*args: Given.args, **options: Given.kwargs) -> Answer:
        bound = own.bind(*args, **options)
        for name, value in bound.arguments.items():
            bound.arguments[name] = fit(name, value, hints[name])
        return function(*bound.args, **bound.kwargs)

    return call


def fit(name: str, value: Any, hint: Any) -> Any:
    """Return a value as plain Python, or untouched if the hint names more than numbers and text."""
    must = _describe(hint)
    if not must:
        return value
    value = plain(os.fspath(value) if isinstance(value, os.PathLike) else value)
    if not _fits(value, hint):
        raise ValueError(f"{name} is {value!r:.80} but must be {must}")
    return value


def merged(given: Mapping[str, Any]) -> dict[str, Any]:
    """Put options that stand under "options" beside the others."""
    inner = given.get("options", {})
    if not isinstance(inner, Mapping):
        raise ValueError(f"options is {inner!r:.80} but must be a mapping of option: value")
    flat = {key: value for key, value in given.items() if key != "options"}
    if both := [key for key in inner if key in flat]:
        raise ValueError(f"{both[0]!r} is given twice, in options and beside it; drop one")
    return {**flat, **inner}


def require_counts(most: int = 1024, **counts: Any) -> None:
    """Refuse, by name, every count outside [1, most]; None stands for no count."""
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
        return is_number and bool(abs(value) <= float_info.max)
    return hint is Any or isinstance(value, hint)


@cache
def _describe(hint: Any) -> str:
    """Put a hint into words; empty for one that is not checked."""
    inner = [_describe(each) for each in get_args(hint)]
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(inner) if all(inner) else ""
    if get_origin(hint) is Sequence:
        return inner[0] and f"a list, each entry {inner[0]}"
    if get_origin(hint) is Mapping:
        return f"a mapping from {inner[0] or 'names'} to {inner[1] or 'values'}"
    return "None" if hint is NoneType else _KINDS.get(hint, "")
