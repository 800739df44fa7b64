"""What a drafter says at every place of texts, against what the target says there."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.analysis.acceptance_math import CHUNK, compare, refuse_not_finite
from specdec.analysis.texts import Text
from specdec.engine.interfaces import Target
from specdec.sampling.config import SamplingConfig
from specdec.sampling.sampler import Sampler
from specdec.targets.taps import Reading, read_text

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Evidence:
    """One row a text, one column a step that might start there, one level a drafted depth.

    Column s (from 0) is the step that starts with s + 1 tokens done; its depth d (from 0) drafts
    the text's token s + 1 + d (from 0), and the tokens above it on the path are the text's own.
    What stands behind a text's end is 0, see `valid`.

    Attributes:
        num_tokens: [B] int64 new tokens, T.
        max_tokens: [B] int64 that were allowed.
        rank: [B, S, D] int32 of the text's token among the drafter's candidates; V where it cannot
            say it.
        accept: [B, S, D, W] float32 probability that the w-th sibling drawn from the drafter's law
            is the accepted one, given the text; at the sampling settings.
        overlap: [B, S, D] float32 sum_x min(p(x), q(x)), at the sampling settings.
        possible: [B, S, D] bool, whether the target would ever say the token at these settings.
        target_prob: [B, S, D] float32 of the token, as the models give it: at temperature 1,
            unfiltered. So are the five below.
        draft_prob: the drafter's probability of the token.
        confidence: the drafter's highest probability.
        target_entropy: in nats.
        draft_entropy: in nats.
        best_draft: [B, S, D] int32 the drafter's likeliest token.
        best_target: [B, S, D] int32 the target's.
    """

    num_tokens: Array
    max_tokens: Array
    rank: Array
    accept: Array
    overlap: Array
    possible: Array
    target_prob: Array
    draft_prob: Array
    confidence: Array
    target_entropy: Array
    draft_entropy: Array
    best_draft: Array
    best_target: Array

    @property
    def depth(self) -> int:
        """D, the levels that were looked at."""
        return int(self.rank.shape[2])

    @property
    def num_siblings(self) -> int:
        """W."""
        return int(self.accept.shape[3])

    @property
    def valid(self) -> Array:
        """[B, S, D] bool, where the text has a token."""
        steps, depths = np.arange(self.rank.shape[1]), np.arange(self.depth)
        token: Array = steps[:, None] + 1 + depths
        return token[None] < self.num_tokens[:, None, None]


_DTYPES = {"rank": np.int32, "best_draft": np.int32, "best_target": np.int32, "possible": np.bool_}


def gather_evidence(
    target: Target,
    drafter: Any,
    texts: Sequence[Text],
    sampling: SamplingConfig,
    depth: int,
    num_siblings: int = 1,
) -> Evidence:
    """Teacher-force target and drafter over texts, one after the other.

    Args:
        target: the model.
        drafter: with what `Forced` asks for.
        texts: see `check_texts`.
        sampling: without penalties; its seed is not used.
        depth: levels to look at; fewer come back of a drafter that has fewer.
        num_siblings: see `Evidence.accept`.

    Raises:
        FloatingPointError: NaN in the target's logits or the drafter's.
    """
    num_steps = max(1, *(len(text.tokens) - 1 for text in texts))
    rows: list[list[dict[str, Tensor]]] = []
    for index, text in enumerate(texts):
        rows.append(
            _levels(target, drafter, text, index, sampling, depth, num_siblings)
            if len(text.tokens) > 1
            else []
        )
    found = max(1, *(len(levels) for levels in rows)) if rows else 1
    arrays = {
        name: _packed(rows, name, (num_steps, found), num_siblings if name == "accept" else 0)
        for name in Evidence.__dataclass_fields__
        if name not in ("num_tokens", "max_tokens")
    }
    return Evidence(
        np.array([len(text.tokens) for text in texts]),
        np.array([text.max_tokens for text in texts]),
        **arrays,
    )


@torch.inference_mode()
def _levels(
    target: Target,
    drafter: Any,
    text: Text,
    index: int,
    sampling: SamplingConfig,
    depth: int,
    num_siblings: int,
) -> list[dict[str, Tensor]]:
    """Facts [T - 1 - k] of every level k."""
    given = [*text.prompt, *text.tokens[:-1]]
    reading: Reading = read_text(target, given, len(text.prompt), drafter.taps)
    refuse_not_finite("target", reading.logits, index)
    emitted = torch.tensor(text.tokens[1:], device=target.device)
    tokens = torch.tensor(given, device=target.device)
    sampler = Sampler([sampling], target.vocab_size, target.device, [text.prompt], ())
    levels = []
    guesses = drafter.forced(tokens, reading.hidden, depth, len(text.prompt) - 1)
    for level, logits in enumerate(guesses):
        refuse_not_finite("drafter", logits, index, may_ban=True)
        levels.append(
            compare(logits, reading.logits[level:], emitted[level:], sampler, num_siblings)
        )
    return levels


def _packed(
    rows: list[list[dict[str, Tensor]]], name: str, size: tuple[int, int], num_siblings: int
) -> Array:
    shape = (len(rows), *size, num_siblings) if num_siblings else (len(rows), *size)
    packed: Array = np.zeros(shape, _DTYPES.get(name, np.float32))
    for row, levels in enumerate(rows):
        for level, facts in enumerate(levels):
            packed[row, : len(facts[name]), level] = facts[name].numpy()
    return packed


NUM_BINS = 10


def reliability(confidence: Array, taken: Array) -> dict[str, Any] | None:
    """Bins of equal width over [0, 1], and the expected calibration error.

    Args:
        confidence: [n] that the target takes a drafted token, given that it took those above.
        taken: [n] whether it did.

    Returns:
        {bins: [{low, high, count, confidence, acceptance}], ece}; None without an observation.

    Source: Guo et al. 2017, arXiv 1706.04599, equation 3.
    """
    if not len(confidence):
        return None
    places = np.clip((confidence * NUM_BINS).astype(int), 0, NUM_BINS - 1)
    bins, error = [], 0.0
    for index in range(NUM_BINS):
        inside = places == index
        count = int(inside.sum())
        shown = float(confidence[inside].mean()) if count else None
        worth = float(taken[inside].mean()) if count else None
        if shown is not None and worth is not None:
            error += count / len(confidence) * abs(shown - worth)
        low, high = index / NUM_BINS, (index + 1) / NUM_BINS
        bins.append(
            {"low": low, "high": high, "count": count, "confidence": shown, "acceptance": worth}
        )
    return {"bins": bins, "ece": error}


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


CLASSES = (
    "special",
    "newline",
    "space",
    "digit",
    "punctuation",
    "word_start",
    "word_piece",
    "other",
)
_WORD_MARKS = ("Ġ", "▁", " ")


@dataclass(frozen=True, eq=False)
class TextFacts:
    """One row a text, one column a step that might start there, as in `Evidence`.

    Attributes:
        entropy: [B, S] float32 of the target's law of the next token, in nats, at temperature 1.
        token_class: [B, S] int8 of the next token, an index into `CLASSES`; -1 without a
            tokenizer and behind a text's end.
    """

    entropy: Array
    token_class: Array


def gather_facts(target: Target, texts: Sequence[Text]) -> TextFacts:
    """One pass of the target over every text.

    Raises:
        FloatingPointError: NaN in the target's logits.
    """
    num_steps = max(1, *(len(text.tokens) - 1 for text in texts), 1)
    entropy = np.zeros((len(texts), num_steps), np.float32)
    token_class = np.full((len(texts), num_steps), -1, np.int8)
    for index, text in enumerate(texts):
        count = len(text.tokens) - 1
        if count:
            entropy[index, :count] = _entropies(target, text, index)
            if target.tokenizer is not None:
                token_class[index, :count] = classify(text.tokens, target.tokenizer)[1:]
    return TextFacts(entropy, token_class)


@torch.inference_mode()
def _entropies(target: Target, text: Text, index: int) -> Array:
    given = [*text.prompt, *text.tokens[:-1]]
    logits = read_text(target, given, len(text.prompt)).logits
    refuse_not_finite("target", logits, index)
    parts = [torch.special.entr(part.float().softmax(-1)).sum(-1) for part in logits.split(CHUNK)]
    entropies: Array = torch.cat(parts).cpu().numpy()
    return entropies


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


def _class(said: str, starts_word: bool) -> str:
    core = said.strip()
    if not core:
        if not said:
            return "other"
        return "newline" if "\n" in said else "space"
    if core[0].isdigit():
        return "digit"
    if not any(letter.isalnum() for letter in core):
        # Half a character is no punctuation.
        return "other" if "\ufffd" in core else "punctuation"
    return "word_start" if starts_word else "word_piece"


ENTROPY_EDGES = (0.0, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)  # nats


@dataclass(frozen=True, eq=False)
class FirstTokens:
    """Places where a step might start, or did.

    Attributes:
        text: [n] int64, which text.
        step: [n] int64, tokens done before it, less one.
        accepted: [n] float64 probability that it accepts a token; None where it is not worked out.
        overlap: [n] float64 sum_x min(p(x), q(x)); None of a drafter without a law.
    """

    text: Array
    step: Array
    accepted: Array | None
    overlap: Array | None

    def entropy_bins(self, facts: TextFacts) -> list[dict[str, Any]]:
        """By the target's entropy: {low, high, count, alpha, acceptance}; the last has no end."""
        entropy = facts.entropy[self.text, self.step]
        edges: list[float | None] = [*ENTROPY_EDGES, None]
        return [
            {"low": low, "high": high, **self._figures(_within(entropy, low, high))}
            for low, high in pairwise(edges)
        ]

    def token_classes(self, facts: TextFacts) -> list[dict[str, Any]]:
        """By the class of the token that came: {name, count, alpha, acceptance}."""
        classes = facts.token_class[self.text, self.step]
        rows = [
            {"name": name, **self._figures(classes == index)} for index, name in enumerate(CLASSES)
        ]
        return [row for row in rows if row["count"]]

    def positions(self) -> list[dict[str, Any]]:
        """By the token's place in its answer, from 0: {low, high, count, alpha, acceptance}."""
        place = self.step + 1
        last = int(place.max()) if len(place) else 0
        edges = [1]
        while edges[-1] <= last:
            edges.append(2 * edges[-1])
        return [
            {"low": low, "high": high, **self._figures(_within(place, low, high))}
            for low, high in pairwise(edges)
        ]

    def _figures(self, mask: Array) -> dict[str, Any]:
        return {
            "count": int(mask.sum()),
            "alpha": _mean(self.overlap, mask),
            "acceptance": _mean(self.accepted, mask),
        }


def _mean(values: Array | None, mask: Array) -> float | None:
    return float(values[mask].mean()) if values is not None and mask.any() else None


def _within(values: Array, low: float | None, high: float | None) -> Array:
    inside: Array = (values >= (-np.inf if low is None else low)) & (
        values < (np.inf if high is None else high)
    )
    return inside
