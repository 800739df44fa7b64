"""Everything that is said of one drafter."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from specdec.analysis.expected import Expected, by_prompt, coverage, first_acceptance
from specdec.analysis.predict import Predictor, fixed_shape
from specdec.analysis.replay import ReplayNotes
from specdec.analysis.teacher_forced import (
    Evidence,
    FirstTokens,
    TextFacts,
    chain_confidence,
    reliability,
)
from specdec.analysis.texts import Text
from specdec.common.stats import bootstrap_interval
from specdec.drafters.base import FixedShape, is_forced
from specdec.registry import load_drafter
from specdec.verify.tree import best_static_tree, from_choices

CHAINS = range(1, 11)
TREE_SIZES = (2, 4, 8, 12, 16, 24, 32, 48)
THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class Counterfactuals:
    """Works out the shapes of one drafter.

    Args:
        predictor: with the texts.
        options: that the drafter was loaded with.
        drafter: with what `Forced` asks for.
    """

    def __init__(self, predictor: Predictor, options: Mapping[str, Any], drafter: Any) -> None:
        self._predictor, self._options, self._drafter = predictor, options, drafter
        self._evidence: Evidence = predictor.evidence(options, drafter)
        self._depth = min(self._evidence.depth, max(CHAINS))

    def all(self) -> dict[str, list[dict[str, Any]]]:
        """{chains, trees, thresholds}; a list is empty where the drafter has no such shape.

        So it is where the acceptance of its chains is not worked out.
        """
        known = self._drafter.shape_options.all
        drawn = FixedShape(from_choices(_chain(1)), self._drafter.children)
        has_chains = self._predictor.why_unknown(drawn) is None
        return {
            "chains": self._chains() if has_chains else [],
            "trees": self._trees() if "choices" in known else [],
            "thresholds": self._thresholds()
            if has_chains and "confidence_threshold" in known
            else [],
        }

    def _chains(self) -> list[dict[str, Any]]:
        rows = []
        for length in range(1, self._depth + 1):
            found = self._expect(_chain(length), self._drafter.children)
            rows.append({"length": length, "children": self._children, **figures(found)})
        return rows

    @property
    def _children(self) -> str:
        greedy = self._predictor.sampling.is_greedy
        return "top" if greedy else str(self._drafter.children)

    def _trees(self) -> list[dict[str, Any]]:
        """The best trees of chosen tokens for what these texts took."""
        table, rows = coverage(self._evidence), []
        for num_nodes in TREE_SIZES:
            choices = best_static_tree(table, num_nodes) if table else []
            if len(choices) < num_nodes:
                break
            found = self._expect(choices, "top")
            rows.append(
                {
                    "nodes": num_nodes,
                    "depth": max(map(len, choices)),
                    "choices": [list(path) for path in choices],
                    "children": "top",
                    **figures(found),
                }
            )
        return rows

    def _thresholds(self) -> list[dict[str, Any]]:
        rows = []
        for threshold in THRESHOLDS:
            found = self._expect(_chain(self._depth), self._drafter.children, threshold)
            rows.append({"threshold": threshold, "length": self._depth, **figures(found)})
        return rows

    def _expect(
        self, choices: list[tuple[int, ...]], children: str, threshold: float = 0.0
    ) -> Expected:
        shape = FixedShape(from_choices(choices), children, threshold)
        return self._predictor.expect(self._options, self._drafter, shape)


def _chain(length: int) -> list[tuple[int, ...]]:
    return [(0,) * (level + 1) for level in range(length)]


def figures(expected: Expected) -> dict[str, Any]:
    """What a JSON file says of an expectation."""
    interval = expected.tau_interval()
    return {
        "tau": expected.tau,
        "tau_ci": None if interval is None else list(interval),
        "nodes_per_step": expected.nodes_per_step,
        "nodes_are_exact": expected.drafted_is_exact,
    }


NUM_CONTEXTS, NUM_BEFORE = 20, 32


def hardest_contexts(
    evidence: Evidence, texts: Sequence[Text], tokenizer: Any, count: int = NUM_CONTEXTS
) -> list[dict[str, Any]]:
    """The places of lowest overlap; among equals, those where the text's token surprised it most.

    Places where the drafter's likeliest token is the text's are none.

    Returns:
        {prompt, position, before, drafted, target, p, q, overlap}: the position is the token's in
        its answer, from 0; `before` the text up to it; `drafted` the drafter's likeliest token; p
        and q the models' probabilities of the token that came, at temperature 1.
    """
    wrong = evidence.valid[:, :, 0] & (evidence.rank[:, :, 0] != 0)
    rows, steps = np.nonzero(wrong)
    overlap = evidence.overlap[rows, steps, 0]
    surprise = evidence.draft_prob[rows, steps, 0]
    order = np.lexsort((surprise, overlap))[:count]
    found = []
    for row, step in zip(rows[order].tolist(), steps[order].tolist(), strict=True):
        text, position = texts[row], step + 1
        before = [*text.prompt, *text.tokens[:position]][-NUM_BEFORE:]
        found.append(
            {
                "prompt": row,
                "position": position,
                "before": _said(before, tokenizer),
                "drafted": [_said([int(evidence.best_draft[row, step, 0])], tokenizer)],
                "target": _said([text.tokens[position]], tokenizer),
                "p": float(evidence.target_prob[row, step, 0]),
                "q": float(evidence.draft_prob[row, step, 0]),
                "overlap": float(evidence.overlap[row, step, 0]),
            }
        )
    return found


def _said(tokens: Sequence[int], tokenizer: Any) -> str:
    """Text of tokens; their ids without a tokenizer."""
    if tokenizer is None:
        return " ".join(map(str, tokens))
    return str(tokenizer.decode(list(tokens)))


def describe(
    predictor: Predictor, facts: TextFacts, name: str, options: Mapping[str, Any]
) -> tuple[dict[str, Any], Evidence | None]:
    """Analyse a drafter; see docs/analyze.schema.json for what comes back, beside its evidence.

    Args:
        predictor: with the texts.
        facts: of the same texts.
        name: of the drafter.
        options: of `load_drafter`.

    Raises:
        ValueError: options that cannot be used.
        FloatingPointError: NaN in anyone's logits.
    """
    drafter = load_drafter(options, predictor.target)
    inner = {key: value for key, value in options.items() if key != "type"}
    head = {"name": name, "type": options["type"], "options": inner}
    if not is_forced(drafter):
        return {**head, **_replayed(predictor, facts, drafter)}, None
    evidence = _evidence(predictor, options, drafter)
    found = {**head, **_forced(predictor, facts, drafter, options, evidence)}
    return found, evidence


def _evidence(predictor: Predictor, options: Mapping[str, Any], drafter: Any) -> Evidence:
    """One pass that is wide and deep enough for the configured draft, and for all others."""
    shape = fixed_shape(drafter)
    if shape is None or predictor.why_unknown(shape) is not None:
        return predictor.evidence(options, drafter)
    return predictor.evidence(options, drafter, shape.tree.depth, predictor.num_siblings(shape))


def _forced(
    predictor: Predictor,
    facts: TextFacts,
    drafter: Any,
    options: Mapping[str, Any],
    evidence: Evidence,
) -> dict[str, Any]:
    shape = fixed_shape(drafter)
    configured, reason = _configured(predictor, options)
    depth = shape.tree.depth if shape else evidence.depth
    first = _first_tokens(predictor, evidence, shape)
    known = evidence.valid[:, :, 0]
    return {
        "method": "evidence",
        **_alpha(evidence, predictor.prompt_of),
        "configured": configured and _configured_figures(configured),
        "not_configured_because": reason,
        "per_depth_conditional": list(configured.conditional_acceptance_at_depth)
        if configured
        else [],
        "impossible": float(1 - evidence.possible[:, :, 0][known].mean()) if known.any() else 0.0,
        "coverage": coverage(evidence),
        "calibration": reliability(*chain_confidence(evidence, depth)),
        **_by_place(first, facts),
        "hardest": hardest_contexts(evidence, predictor.texts, predictor.target.tokenizer),
        "expected": Counterfactuals(predictor, options, drafter).all(),
    }


def _replayed(predictor: Predictor, facts: TextFacts, drafter: Any) -> dict[str, Any]:
    notes = ReplayNotes()
    configured = predictor.replayed(drafter, watch=notes.note)
    return {
        "method": "replay",
        "alpha": None,
        "alpha_ci": None,
        "configured": _configured_figures(configured),
        "not_configured_because": None,
        "per_depth_conditional": list(configured.conditional_acceptance_at_depth),
        "impossible": None,
        "coverage": [],
        "calibration": notes.calibration(),
        **_by_place(notes.first_tokens(), facts),
        "hardest": [],
        "expected": {"chains": [], "trees": [], "thresholds": []},
    }


def _configured(
    predictor: Predictor, options: Mapping[str, Any]
) -> tuple[Expected | None, str | None]:
    """The draft as it is configured, or why its acceptance is not worked out."""
    try:
        return predictor.predict(options), None
    except ValueError as error:
        return None, str(error)


def _configured_figures(expected: Expected) -> dict[str, Any]:
    return {
        **figures(expected),
        "tokens": expected.tokens,
        "steps": expected.steps,
        "accepted_at": [float(sum(column)) for column in zip(*expected.accepted_at, strict=True)],
        "tested_at": [float(sum(column)) for column in zip(*expected.tested_at, strict=True)],
    }


def _alpha(evidence: Evidence, prompt_of: Sequence[int]) -> dict[str, Any]:
    """The mean overlap over all places, with its interval over prompts."""
    valid = evidence.valid[:, :, 0]
    overlaps = np.where(valid, evidence.overlap[:, :, 0], 0).sum(1, dtype=np.float64)
    sums = by_prompt(overlaps, prompt_of)
    counts = by_prompt(valid.sum(1).astype(np.float64), prompt_of)
    has_place = counts > 0
    interval = bootstrap_interval(
        (sums[has_place], counts[has_place]), lambda s, c, axis: s.sum(axis=axis) / c.sum(axis=axis)
    )
    return {
        "alpha": float(sums.sum() / counts.sum()) if counts.sum() else None,
        "alpha_ci": None if interval is None else list(interval),
    }


def _first_tokens(
    predictor: Predictor, evidence: Evidence, shape: FixedShape | None
) -> FirstTokens:
    """Every place; a draft whose shape is not fixed is looked at as a chain of likeliest tokens."""
    shape = shape or FixedShape(from_choices([(0,)]), "top")
    rows, steps = np.nonzero(evidence.valid[:, :, 0])
    accepted = None
    if predictor.why_unknown(shape) is None:
        found = first_acceptance(evidence, shape, sampled=predictor.is_sampled(shape))
        accepted = found[rows, steps]
    overlap = evidence.overlap[rows, steps, 0].astype(np.float64)
    return FirstTokens(rows, steps, accepted, overlap)


def _by_place(first: FirstTokens, facts: TextFacts) -> dict[str, Any]:
    return {
        "entropy_bins": first.entropy_bins(facts),
        "token_classes": first.token_classes(facts),
        "positions": first.positions(),
    }
