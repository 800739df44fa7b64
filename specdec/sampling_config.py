"""`SamplingConfig`: how one row turns logits into tokens; and the checks of all other arguments."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, wraps
from inspect import signature
from numbers import Integral, Real
from sys import float_info
from types import NoneType, UnionType
from typing import Any, ParamSpec, TypeVar, Union, get_args, get_origin

Given = ParamSpec("Given")
Answer = TypeVar("Answer")
_KINDS = {int: "a whole number", float: "a finite number", bool: "True or False", str: "a string"}
# Below this, logits / temperature overflows float32 for logits of ordinary size.
MIN_TEMPERATURE = 1e-5
_LARGEST = 3.4e38


@dataclass(frozen=True)
class SamplingConfig:
    """Sampling settings of one row; the defaults are greedy decoding without any penalty.

    Attributes:
        temperature: 0 is greedy, a one-hot distribution; otherwise the logits' divisor.
        top_k: keep the k likeliest tokens, ties with the k-th included; 0 keeps all.
        top_p: keep the likeliest tokens until their mass exceeds this; 1 keeps all.
        min_p: drop tokens less likely than this fraction of the likeliest one; 0 keeps all.
        repetition_penalty: divides positive and multiplies negative logits of every token in the
            prompt or the output, once however often it occurs; 1 is none (CTRL, arXiv 1909.05858).
        presence_penalty: subtracted from the logit of every token in the output, once.
        frequency_penalty: subtracted once per occurrence in the output.
        logit_bias: token id -> what is added to its logit; -inf bans the token.
        bad_words: token id sequences that are never completed, the prompt's end included.
            As in transformers, a sequence that is just an end-of-sequence token is ignored.
        min_new_tokens: end-of-sequence tokens are banned in the first so many output tokens.
        seed: the row's randomness.

    Raises:
        ValueError: a value breaks its rule; the message names the field, the value and the rule.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: Sequence[Sequence[int]] = ()
    min_new_tokens: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_filters()
        self._check_penalties()
        self._check_tokens()
        count = "a whole number in [0, 2**63); use 0 for none"
        fits = _is_count(self.min_new_tokens) and self.min_new_tokens < 2**63
        self._require("min_new_tokens", fits, count)
        fits = _is_count(self.seed) and self.seed < 2**63
        self._require("seed", fits, "a whole number in [0, 2**63); use the seed modulo 2**63")

    def _check_filters(self) -> None:
        warm = _is_finite(self.temperature) and self.temperature >= MIN_TEMPERATURE
        self._require(
            "temperature",
            warm or (_is_finite(self.temperature) and self.temperature == 0),
            f"0 or at least {MIN_TEMPERATURE}; use 0 for greedy decoding",
        )
        self._require("top_k", _is_count(self.top_k), "a whole number >= 0; use 0 to keep all")
        self._require(
            "top_p",
            _is_finite(self.top_p) and 0 < self.top_p <= 1,
            "in (0, 1]; use 1 to keep all tokens, or temperature 0 for greedy decoding",
        )
        self._require(
            "min_p", _is_finite(self.min_p) and 0 <= self.min_p <= 1, "in [0, 1]; use 0 to keep all"
        )

    def _check_penalties(self) -> None:
        positive = _is_finite(self.repetition_penalty) and self.repetition_penalty > 1 / _LARGEST
        self._require("repetition_penalty", positive, "finite and > 0 in float32; use 1 for none")
        for name in ("presence_penalty", "frequency_penalty"):
            self._require(
                name, _is_finite(getattr(self, name)), "finite in float32; use 0 for none"
            )

    def _check_tokens(self) -> None:
        mapping = isinstance(self.logit_bias, Mapping)
        self._require(
            "logit_bias",
            mapping and all(map(_is_count, self.logit_bias)),
            "a mapping from token ids >= 0 to numbers; use {} for none",
        )
        self._require(
            "logit_bias",
            all(_is_finite(bias) or bias == -math.inf for bias in self.logit_bias.values()),
            "finite or -inf for every token, in float32; use -inf to ban a token",
        )
        self._require(
            "bad_words",
            _is_sequence(self.bad_words)
            and all(_is_sequence(word) and len(word) > 0 for word in self.bad_words)
            and all(_is_count(token) for word in self.bad_words for token in word),
            "non-empty sequences of token ids >= 0; use [[id], ...] to ban single tokens",
        )

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"{name} is {getattr(self, name)!r} but must be {rule}")

    @property
    def is_greedy(self) -> bool:
        """Whether the row takes the likeliest token."""
        return self.temperature == 0

    @property
    def is_plain(self) -> bool:
        """Whether the logits are used as they are, whatever the context."""
        return (
            self.repetition_penalty == 1
            and self.presence_penalty == 0
            and self.frequency_penalty == 0
            and self.min_new_tokens == 0
            and not self.logit_bias
            and not self.bad_words
        )


def _is_finite(value: object) -> bool:
    """In float32, which logits are processed in; NaN fails the comparison."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return is_number and abs(value) <= _LARGEST  # type: ignore[arg-type]


def _is_count(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0


def _is_sequence(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def plain(value: Any) -> Any:
    """Arrays, tensors and their scalars as Python's own lists and numbers."""
    return value.tolist() if hasattr(value, "tolist") and hasattr(value, "dtype") else value


def checked(function: Callable[Given, Answer]) -> Callable[Given, Answer]:
    """Refuse arguments that are not what the annotations of their parameters say."""
    own = signature(function)

    @wraps(function)
    def call(*args: Given.args, **options: Given.kwargs) -> Answer:
        bound = own.bind(*args, **options)
        for name, value in bound.arguments.items():
            bound.arguments[name] = fit(name, value, own.parameters[name].annotation)
        return function(*bound.args, **bound.kwargs)

    return call


def fit(name: str, value: Any, hint: Any) -> Any:
    """A value as plain Python; as it is where the type hint names more than numbers and text.

    Raises:
        ValueError: it is not of the kind that the hint says; True is no number.
    """
    must = _says(hint)
    if not must:
        return value
    value = plain(os.fspath(value) if isinstance(value, os.PathLike) else value)
    if not _fits(value, hint):
        raise ValueError(f"{name} is {value!r:.80} but must be {must}")
    return value


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
        return is_number and bool(abs(value) <= float_info.max)
    return hint is Any or isinstance(value, hint)


@cache
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
