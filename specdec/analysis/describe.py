"""The analysis of one drafter: its configured draft, other shapes, and where it fails."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from specdec.analysis.breakdown import (
    FirstTokens,
    TextFacts,
    chain_confidence,
    reliability,
)
from specdec.analysis.expected import Expected, by_prompt, coverage, first_acceptance
from specdec.analysis.predict import Predictor
from specdec.analysis.replay import ReplayNotes
from specdec.analysis.results import (
    ChainFigures,
    ConfiguredFigures,
    Counterfactuals,
    DrafterAnalysis,
    HardContext,
    ThresholdFigures,
    TreeFigures,
)
from specdec.analysis.teacher_forced import Evidence
from specdec.analysis.texts import Text
from specdec.common.stats import Interval, bootstrap_interval
from specdec.drafters.base import FixedShape, is_forced
from specdec.registry import load_drafter
from specdec.verify.tree import best_static_tree, from_choices

LONGEST_CHAIN = 10
TREE_SIZES = (2, 4, 8, 12, 16, 24, 32, 48)
THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
NUM_CONTEXTS, NUM_BEFORE = 20, 32


def describe(
    predictor: Predictor, facts: TextFacts, name: str, options: Mapping[str, Any]
) -> tuple[DrafterAnalysis, Evidence | None]:
    """Analyze a drafter; a replayed one leaves no evidence."""
    drafter: Any = load_drafter(options, predictor.target)
    inner = {key: value for key, value in options.items() if key != "type"}
    head = {"name": name, "type": options["type"], "options": inner}
    if is_forced(drafter):
        return _forced(predictor, facts, drafter, options, head)
    notes = ReplayNotes()
    configured = predictor.replayed(drafter, notes.note)
    replayed = DrafterAnalysis(
        **head,
        method="replay",
        configured=_configured_figures(configured),
        per_depth_conditional=list(configured.conditional_acceptance_at_depth),
        calibration=notes.calibration(),
        **_by_place(notes.first_tokens(), facts),
    )
    return replayed, None


def _forced(
    predictor: Predictor,
    facts: TextFacts,
    drafter: Any,
    options: Mapping[str, Any],
    head: dict[str, Any],
) -> tuple[DrafterAnalysis, Evidence]:
    shape: FixedShape | None = drafter.fixed_shape
    evidence = predictor.evidence(options, drafter, shape)
    configured, reason = None, None
    try:
        configured = predictor.predict(options)
    except ValueError as error:
        reason = str(error)
    known = evidence.valid[:, :, 0]
    alpha, alpha_ci = _alpha(evidence, predictor.prompt_of)
    depth = shape.tree.depth if shape else evidence.depth
    found = DrafterAnalysis(
        **head,
        method="evidence",
        alpha=alpha,
        alpha_ci=alpha_ci,
        configured=_configured_figures(configured) if configured else None,
        not_configured_because=reason,
        per_depth_conditional=list(configured.conditional_acceptance_at_depth)
        if configured
        else [],
        impossible=float(1 - evidence.possible[:, :, 0][known].mean()) if known.any() else 0.0,
        coverage=coverage(evidence),
        calibration=reliability(*chain_confidence(evidence, depth)),
        **_by_place(_first_tokens(predictor, evidence, shape), facts),
        hardest=hardest_contexts(evidence, predictor.texts, predictor.target.tokenizer),
        expected=_counterfactuals(predictor, options, drafter, evidence),
    )
    return found, evidence


def _figures(expected: Expected) -> dict[str, Any]:
    return {
        "tau": expected.tau,
        "tau_ci": expected.tau_interval(),
        "nodes_per_step": expected.nodes_per_step,
        "nodes_are_exact": expected.drafted_is_exact,
    }


def _configured_figures(expected: Expected) -> ConfiguredFigures:
    return ConfiguredFigures(
        **_figures(expected),
        tokens=expected.tokens,
        steps=expected.steps,
        accepted_at=[float(sum(column)) for column in zip(*expected.accepted_at, strict=True)],
        tested_at=[float(sum(column)) for column in zip(*expected.tested_at, strict=True)],
    )


def _alpha(evidence: Evidence, prompt_of: Sequence[int]) -> tuple[float | None, Interval]:
    """The mean overlap over all places, with its interval over prompts."""
    valid = evidence.valid[:, :, 0]
    overlaps = np.where(valid, evidence.overlap[:, :, 0], 0).sum(1, dtype=np.float64)
    sums = by_prompt(overlaps, prompt_of)
    counts = by_prompt(valid.sum(1).astype(np.float64), prompt_of)
    has_place = counts > 0
    interval = bootstrap_interval(
        (sums[has_place], counts[has_place]), lambda s, c, axis: s.sum(axis=axis) / c.sum(axis=axis)
    )
    return float(sums.sum() / counts.sum()) if counts.sum() else None, interval


def _first_tokens(
    predictor: Predictor, evidence: Evidence, shape: FixedShape | None
) -> FirstTokens:
    """Every place; a draft whose shape is not fixed is looked at as its likeliest token."""
    shape = shape or _chain(1, "top")
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


def _chain(length: int, children: str, threshold: float = 0.0) -> FixedShape:
    choices = [(0,) * (level + 1) for level in range(length)]
    return FixedShape(from_choices(choices), children, threshold)


def _counterfactuals(
    predictor: Predictor, options: Mapping[str, Any], drafter: Any, evidence: Evidence
) -> Counterfactuals:
    """Expectations for other shapes, as far as the drafter has an option for them.

    Chains are left out where the acceptance of the drafter's chains is not worked out.
    """
    children, depth = drafter.children, min(evidence.depth, LONGEST_CHAIN)
    known = drafter.shape_options.all

    def figures(shape: FixedShape) -> dict[str, Any]:
        return _figures(predictor.expect(options, drafter, shape))

    found = Counterfactuals()
    if predictor.why_unknown(_chain(1, children)) is None:
        shown = "top" if predictor.sampling.is_greedy else children
        found.chains = [
            ChainFigures(length=length, children=shown, **figures(_chain(length, children)))
            for length in range(1, depth + 1)
        ]
        found.thresholds = [
            ThresholdFigures(
                threshold=least, length=depth, **figures(_chain(depth, children, least))
            )
            for least in (THRESHOLDS if "confidence_threshold" in known else ())
        ]
    table = coverage(evidence) if "choices" in known else []
    for num_nodes in TREE_SIZES:
        choices = best_static_tree(table, num_nodes) if table else []
        if len(choices) < num_nodes:
            break
        found.trees.append(
            TreeFigures(
                nodes=num_nodes,
                depth=max(map(len, choices)),
                choices=[list(path) for path in choices],
                children="top",
                **figures(FixedShape(from_choices(choices), "top")),
            )
        )
    return found


def hardest_contexts(
    evidence: Evidence, texts: Sequence[Text], tokenizer: Any
) -> list[HardContext]:
    """The places of lowest overlap; among equals, those where the text's token surprised it most.

    Places where the drafter's likeliest token is the text's are left out.
    """
    wrong = evidence.valid[:, :, 0] & (evidence.rank[:, :, 0] != 0)
    rows, steps = np.nonzero(wrong)
    overlap = evidence.overlap[rows, steps, 0]
    surprise = evidence.draft_prob[rows, steps, 0]
    order = np.lexsort((surprise, overlap))[:NUM_CONTEXTS]

    def said(tokens: Sequence[int]) -> str:
        if tokenizer is None:
            return " ".join(map(str, tokens))
        return str(tokenizer.decode(list(tokens)))

    found = []
    for row, step in zip(rows[order].tolist(), steps[order].tolist(), strict=True):
        text, position = texts[row], step + 1
        found.append(
            HardContext(
                prompt=row,
                position=position,
                before=said([*text.prompt, *text.tokens[:position]][-NUM_BEFORE:]),
                drafted=[said([int(evidence.best_draft[row, step, 0])])],
                target=said([text.tokens[position]]),
                p=float(evidence.target_prob[row, step, 0]),
                q=float(evidence.draft_prob[row, step, 0]),
                overlap=float(evidence.overlap[row, step, 0]),
            )
        )
    return found
