"""`SamplingConfig`: how one row turns logits into tokens."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

# Below this, logits / temperature overflows float32 for logits of ordinary size.
MIN_TEMPERATURE = 1e-5
_LARGEST = 3.4e38  # in float32, which logits are processed in


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
        for name, holds, rule in self._rules():
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)!r} but must be {rule}")

    def _rules(self) -> Iterator[tuple[str, bool, str]]:
        """List the field, if its rule holds, and the rule; a later rule relies on earlier ones."""
        temperature = _is_finite(self.temperature) and (
            self.temperature == 0 or self.temperature >= MIN_TEMPERATURE
        )
        yield (
            "temperature",
            temperature,
            f"0 or at least {MIN_TEMPERATURE}; use 0 for greedy decoding",
        )
        yield "top_k", _is_count(self.top_k), "a whole number >= 0; use 0 to keep all"
        top_p = _is_finite(self.top_p) and 0 < self.top_p <= 1
        yield (
            "top_p",
            top_p,
            "in (0, 1]; use 1 to keep all tokens, or temperature 0 for greedy decoding",
        )
        min_p = _is_finite(self.min_p) and 0 <= self.min_p <= 1
        yield "min_p", min_p, "in [0, 1]; use 0 to keep all"
        repetition = _is_finite(self.repetition_penalty) and self.repetition_penalty > 1 / _LARGEST
        yield "repetition_penalty", repetition, "finite and > 0 in float32; use 1 for none"
        for name in ("presence_penalty", "frequency_penalty"):
            yield name, _is_finite(getattr(self, name)), "finite in float32; use 0 for none"
        is_bias = isinstance(self.logit_bias, Mapping) and all(map(_is_count, self.logit_bias))
        yield "logit_bias", is_bias, "a mapping from token ids >= 0 to numbers; use {} for none"
        finite = all(_is_finite(bias) or bias == -math.inf for bias in self.logit_bias.values())
        yield (
            "logit_bias",
            finite,
            "finite or -inf for every token, in float32; use -inf to ban a token",
        )
        words = _is_list(self.bad_words) and all(
            _is_list(word) and word and all(map(_is_count, word)) for word in self.bad_words
        )
        yield (
            "bad_words",
            words,
            "non-empty sequences of token ids >= 0; use [[id], ...] to ban single tokens",
        )
        for name, hint in (("min_new_tokens", "0 for none"), ("seed", "the seed modulo 2**63")):
            value = getattr(self, name)
            fits = _is_count(value) and value < 2**63
            yield name, fits, f"a whole number in [0, 2**63); use {hint}"

    @property
    def is_greedy(self) -> bool:
        """The row takes the likeliest token."""
        return self.temperature == 0

    @property
    def is_plain(self) -> bool:
        """The logits are used as they are, whatever the context."""
        return (
            self.repetition_penalty == 1
            and self.presence_penalty == 0
            and self.frequency_penalty == 0
            and self.min_new_tokens == 0
            and not self.logit_bias
            and not self.bad_words
        )

    @classmethod
    def of(cls, given: Any) -> "SamplingConfig":
        """Accept a configuration, a mapping of its fields, or None for the defaults."""
        if isinstance(given, cls):
            return given
        try:
            return cls(**({} if given is None else given))
        except TypeError as error:
            raise TypeError(
                f"sampling is {given!r} but must be a SamplingConfig, its fields or None: {error}"
            ) from error


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return is_number and bool(abs(value) <= _LARGEST)  # NaN fails the comparison


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
