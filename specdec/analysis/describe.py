"""Everything that is said of one drafter."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from specdec.analysis.calibration import chain_confidence, reliability
from specdec.analysis.counterfactuals import Counterfactuals, figures
from specdec.analysis.coverage import coverage
from specdec.analysis.evidence import Evidence
from specdec.analysis.expected import Expected, by_prompt, first_acceptance
from specdec.analysis.facts import TextFacts
from specdec.analysis.first_tokens import FirstTokens
from specdec.analysis.hardest import hardest_contexts
from specdec.analysis.predict import Predictor, fixed_shape
from specdec.analysis.replayed import ReplayNotes
from specdec.bench.interval import bootstrap_interval
from specdec.drafters.forced import FixedShape, is_forced
from specdec.registry import load_drafter
from specdec.verify.tree import from_choices


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
