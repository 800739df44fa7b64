"""Acceptance of the first drafted token by kind of place, and calibration of confidences."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar, get_args

import numpy as np
import torch

from specdec.analysis.acceptance_math import CHUNK, refuse_not_finite
from specdec.analysis.results import (
    Calibration,
    CalibrationBin,
    EntropyBin,
    PositionBin,
    TokenClass,
    TokenClassBin,
)
from specdec.analysis.teacher_forced import Array, Evidence
from specdec.analysis.texts import Text
from specdec.engine.interfaces import Target
from specdec.targets.taps import read_text

Bin = TypeVar("Bin", EntropyBin, PositionBin)
CLASSES: tuple[TokenClass, ...] = get_args(TokenClass)
_WORD_MARKS = ("Ġ", "▁", " ")
NUM_BINS = 10
ENTROPY_EDGES = (0.0, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)  # nats


def reliability(confidence: Array, taken: Array) -> Calibration | None:
    """Bins of equal width over [0, 1], and the expected calibration error.

    Source: Guo et al. 2017, arXiv 1706.04599, equation 3.
    """
    if not len(confidence):
        return None
    places = np.clip((confidence * NUM_BINS).astype(int), 0, NUM_BINS - 1)
    bins, error = [], 0.0
    for index in range(NUM_BINS):
        inside = places == index
        count = int(inside.sum())
        shown, worth = _mean(confidence, inside), _mean(taken, inside)
        if shown is not None and worth is not None:
            error += count / len(confidence) * abs(shown - worth)
        bins.append(
            CalibrationBin(
                low=index / NUM_BINS,
                high=(index + 1) / NUM_BINS,
                count=count,
                confidence=shown,
                acceptance=worth,
            )
        )
    return Calibration(bins=bins, ece=error)


def chain_confidence(evidence: Evidence, depth: int) -> tuple[Array, Array]:
    """Confidence in the likeliest token and whether it is the text's, along chains that hold.

    At every place and level down to `depth` where the likeliest tokens above are the text's: what
    a chain of likeliest tokens would be judged at.
    """
    is_best = (evidence.rank == 0) & evidence.valid
    above = np.cumprod(is_best, 2)[:, :, :-1].astype(bool)
    reached = evidence.valid.copy()
    reached[:, :, 1:] &= above
    reached = reached[:, :, :depth]
    return (
        evidence.confidence[:, :, :depth][reached].astype(np.float64),
        is_best[:, :, :depth][reached],
    )


@dataclass(frozen=True, eq=False)
class TextFacts:
    """One row a text, one column a step that might start there, as in `Evidence`.

    Attributes:
        entropy: [B, S] float32 of the target's next token, in nats, at temperature 1.
        token_class: [B, S] int8 of the next token, an index into `CLASSES`; -1 without a
            tokenizer and behind a text's end.
    """

    entropy: Array
    token_class: Array


@torch.inference_mode()
def gather_facts(target: Target, texts: Sequence[Text]) -> TextFacts:
    """Run the target once over every text."""
    num_steps = max(1, *(len(text.tokens) - 1 for text in texts))
    entropy = np.zeros((len(texts), num_steps), np.float32)
    token_class = np.full((len(texts), num_steps), -1, np.int8)
    for index, text in enumerate(texts):
        count = len(text.tokens) - 1
        if not count:
            continue
        logits = read_text(target, [*text.prompt, *text.tokens[:-1]], len(text.prompt)).logits
        refuse_not_finite("target", logits, index)
        parts = [torch.special.entr(p.float().softmax(-1)).sum(-1) for p in logits.split(CHUNK)]
        entropy[index, :count] = torch.cat(parts).cpu().numpy()
        if target.tokenizer is not None:
            token_class[index, :count] = classify(text.tokens, target.tokenizer)[1:]
    return TextFacts(entropy, token_class)


def classify(tokens: Sequence[int], tokenizer: Any) -> list[int]:
    """The class of every token, as an index into `CLASSES`."""
    special = set(getattr(tokenizer, "all_special_ids", ()))
    pieces = tokenizer.convert_ids_to_tokens(list(tokens))
    found, before = [], " "
    for token, piece in zip(tokens, pieces, strict=True):
        said = str(tokenizer.decode([token]))
        starts = str(piece or "").startswith(_WORD_MARKS) or not before[-1:].isalnum()
        name = "special" if token in special else _class(said, starts)
        found.append(CLASSES.index(name))
        before = said or before
    return found


def _class(said: str, starts_word: bool) -> TokenClass:
    core = said.strip()
    if not said:
        return "other"
    if not core:
        return "newline" if "\n" in said else "space"
    if core[0].isdigit():
        return "digit"
    if not any(letter.isalnum() for letter in core):
        # Half a character is no punctuation.
        return "other" if "\ufffd" in core else "punctuation"
    return "word_start" if starts_word else "word_piece"


@dataclass(frozen=True, eq=False)
class FirstTokens:
    """Places where a step might start, or did.

    Attributes:
        text: [n] int64 index of the text.
        step: [n] int64 tokens done before it, less one.
        accepted: [n] float64 probability that it accepts a token; None where it is not worked out.
        overlap: [n] float64 sum_x min(p(x), q(x)); None for a drafter without a distribution.
    """

    text: Array
    step: Array
    accepted: Array | None
    overlap: Array | None

    def entropy_bins(self, facts: TextFacts) -> list[EntropyBin]:
        """By the target's entropy; the last bin has no end."""
        entropy = facts.entropy[self.text, self.step]
        return self._binned(EntropyBin, entropy, [*ENTROPY_EDGES, np.inf])

    def positions(self) -> list[PositionBin]:
        """By the token's place in its answer, in bins that double."""
        place = self.step + 1
        edges = [1]
        while edges[-1] <= max(place, default=0):
            edges.append(2 * edges[-1])
        return self._binned(PositionBin, place, edges)

    def token_classes(self, facts: TextFacts) -> list[TokenClassBin]:
        """By the class of the token that came; classes that never came are left out."""
        classes = facts.token_class[self.text, self.step]
        return [
            TokenClassBin(name=name, **self._figures(classes == index))
            for index, name in enumerate(CLASSES)
            if (classes == index).any()
        ]

    def _binned(self, kind: Callable[..., Bin], values: Array, edges: Sequence[float]) -> list[Bin]:
        return [
            kind(
                low=low,
                high=None if high == np.inf else high,
                **self._figures((values >= low) & (values < high)),
            )
            for low, high in pairwise(edges)
        ]

    def _figures(self, inside: Array) -> dict[str, Any]:
        return {
            "count": int(inside.sum()),
            "alpha": _mean(self.overlap, inside),
            "acceptance": _mean(self.accepted, inside),
        }


def _mean(values: Array | None, inside: Array) -> float | None:
    """Mean of shares; rounding may have lifted one above 1."""
    return min(1.0, float(values[inside].mean())) if values is not None and inside.any() else None
