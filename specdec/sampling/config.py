"""`SamplingConfig`: how one row turns logits into tokens."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

# Below this, logits / temperature overflows float32 for logits of ordinary size.
MIN_TEMPERATURE = 1e-5
_LARGEST = 3.4e38  # in float32, which logits are processed in


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return is_number and bool(abs(value) <= _LARGEST)  # NaN fails the comparison


def _is_count(value: Any) -> bool:
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    return is_integer and 0 <= int(value) < 2**63


def _is_list_of(holds: Callable[[Any], bool], value: Any) -> bool:
    is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    return is_list and all(map(holds, value))


def _is_bias(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        _is_count(token) and (_is_finite(bias) or bias == -math.inf)
        for token, bias in value.items()
    )


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (
        lambda t: _is_finite(t) and (t == 0 or t >= MIN_TEMPERATURE),
        f"0 or at least {MIN_TEMPERATURE}; use 0 for greedy decoding",
    ),
    "top_k": (_is_count, "a whole number >= 0; use 0 to keep all"),
    "top_p": (
        lambda p: _is_finite(p) and 0 < p <= 1,
        "in (0, 1]; use 1 to keep all tokens, or temperature 0 for greedy decoding",
    ),
    "min_p": (lambda p: _is_finite(p) and 0 <= p <= 1, "in [0, 1]; use 0 to keep all"),
    "repetition_penalty": (
        lambda p: _is_finite(p) and p > 1 / _LARGEST,
        "finite and > 0 in float32; use 1 for none",
    ),
    "presence_penalty": (_is_finite, "finite in float32; use 0 for none"),
    "frequency_penalty": (_is_finite, "finite in float32; use 0 for none"),
    "logit_bias": (
        _is_bias,
        "a mapping from token ids >= 0 to finite numbers or -inf; use -inf to ban, {} for none",
    ),
    "bad_words": (
        lambda words: _is_list_of(lambda word: _is_list_of(_is_count, word) and word, words),
        "non-empty sequences of token ids >= 0; use [[id], ...] to ban single tokens",
    ),
    "min_new_tokens": (_is_count, "a whole number in [0, 2**63); use 0 for none"),
    "seed": (_is_count, "a whole number in [0, 2**63); use the seed modulo 2**63"),
}


@dataclass(frozen=True)
class SamplingConfig:
    """Sampling settings of one row; the defaults are greedy decoding without any penalty.

    Attributes:
        temperature: the logits' divisor; 0 is greedy, a one-hot distribution.
        top_k: number of likeliest tokens to keep, ties with the last included; 0 keeps all.
        top_p: probability mass that the likeliest tokens must exceed; 1 keeps all.
        min_p: fraction of the highest probability below which tokens are dropped; 0 keeps all.
        repetition_penalty: divisor of positive and factor of negative logits of every token in
            the prompt or the output, once however often it occurs; 1 is none (CTRL,
            arXiv 1909.05858).
        presence_penalty: amount subtracted once from the logit of every token in the output.
        frequency_penalty: amount subtracted once per occurrence in the output.
        logit_bias: token id -> amount added to its logit; -inf bans the token.
        bad_words: token id sequences that are never completed, the prompt's end included.
            As in transformers, a sequence that is just an end-of-sequence token is ignored.
        min_new_tokens: number of output tokens before end-of-sequence tokens are allowed.
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
        for name, (holds, rule) in _RULES.items():
            value = getattr(self, name)
            if not holds(value):
                raise ValueError(f"{name} is {value!r} but must be {rule}")

    @property
    def is_greedy(self) -> bool:
        """The row takes the likeliest token."""
        return self.temperature == 0

    @property
    def is_plain(self) -> bool:
        """The logits are used as they are, whatever the context."""
        amounts = (self.presence_penalty, self.frequency_penalty, self.min_new_tokens)
        return self.repetition_penalty == 1 and not (
            any(amounts) or self.logit_bias or self.bad_words
        )

    @classmethod
    def of(cls, given: Any) -> "SamplingConfig":
        """Accept a configuration, a mapping of its fields, or None for the defaults."""
        if isinstance(given, cls):
            return given
        try:
            return cls(**({} if given is None else given))
        except TypeError as error:
            must = f"a SamplingConfig, its fields or None: {error}"
            raise TypeError(f"sampling is {given!r} but must be {must}") from error
