"""The analysis of one drafter: its configured draft, other shapes, and where it fails."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import torch

from specdec.analysis import results
from specdec.analysis.predict import (
    Expected,
    Predictor,
    coverage,
    first_acceptance,
    ratio_interval,
)
from specdec.analysis.teacher_forced import CHUNK, Array, Evidence, read_target
from specdec.analysis.texts import Text
from specdec.drafters.base import FixedShape, Forced
from specdec.engine.interfaces import Target
from specdec.registry import load_drafter
from specdec.verify import Draft, Verdict
from specdec.verify.tree import best_static_tree, from_choices

LONGEST_CHAIN = 10
TREE_SIZES = (2, 4, 8, 12, 16, 24, 32, 48)
THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
NUM_CONTEXTS, NUM_BEFORE = 20, 32
NUM_BINS = 10
ENTROPY_EDGES = (0.0, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)  # nats
CLASSES: tuple[results.TokenClass, ...] = get_args(results.TokenClass)
_WORD_MARKS = ("Ġ", "▁", " ")
# One row a text, one column a step that might start there, as in `Evidence`: the target's entropy
# in nats at temperature 1, and the class of the token that came; -1 is none.
Facts = tuple[Array, Array]


def describe(
    predictor: Predictor, facts: Facts, name: str, options: Mapping[str, Any]
) -> tuple[results.DrafterAnalysis, Evidence | None]:
    """Analyze a drafter; a replayed one leaves no evidence."""
    drafter: Any = load_drafter(options, predictor.target)
    inner = dict(options)
    head = {"name": name, "type": inner.pop("type"), "options": inner}
    if not isinstance(drafter, Forced):
        found = results.DrafterAnalysis(**head, **_replayed(predictor, facts, drafter))
        return found, None
    shape: FixedShape | None = drafter.fixed_shape
    evidence = predictor.evidence(options, drafter, shape)
    try:
        configured = _configured(predictor.predict(options))
    except ValueError as error:
        reason = {"not_configured_because": str(error)}
        configured = {"configured": None, "per_depth_conditional": [], **reason}
    valid, overlaps = evidence.valid[:, :, 0], evidence.overlap[:, :, 0].astype(np.float64)
    rows, steps = np.nonzero(valid)
    totals = overlaps.sum(1), valid.sum(1).astype(np.float64)
    depth, table = shape.tree.depth if shape else evidence.depth, coverage(evidence)
    # A draft whose shape is not fixed is looked at as its likeliest token.
    first, accepted = shape or _chain(1, "top"), None
    if predictor.why_unknown(first) is None:
        sampled = predictor.is_sampled(first)
        accepted = first_acceptance(evidence, first, sampled=sampled)[rows, steps]
    found = results.DrafterAnalysis(
        **head,
        **configured,
        **_by_place(facts, rows, steps, accepted, overlaps[rows, steps]),
        method="evidence",
        alpha=float(totals[0].sum() / totals[1].sum()) if len(rows) else None,
        alpha_ci=ratio_interval(*totals, predictor.prompt_of),
        impossible=float(1 - evidence.possible[rows, steps, 0].mean()) if len(rows) else 0.0,
        coverage=table,
        calibration=reliability(*_chain_confidence(evidence, depth)),
        hardest=hardest_contexts(evidence, predictor.texts, predictor.target.tokenizer),
        expected=_counterfactuals(predictor, options, drafter, evidence, table),
    )
    return found, evidence


def _replayed(predictor: Predictor, facts: Facts, drafter: Any) -> dict[str, Any]:
    starts: list[tuple[int, int, bool]] = []  # text, step, and if its first token was taken
    judged: list[tuple[float, bool]] = []  # confidences, and if they were right

    def note(text: int, num_done: int, draft: Draft, verdict: Verdict) -> None:
        starts.append((text, num_done - 1, bool(verdict.num_accepted[0] > 0)))
        if draft.confidence is None or not draft.num_nodes:
            return
        path, whole = set(verdict.path[0].tolist()), draft.confidence[0].tolist()
        parents = draft.explicit_parents()[0].tolist()
        for node, parent in enumerate(parents[: int(draft.lengths[0])]):
            above = whole[parent] if parent >= 0 else 1.0
            # Judged or not: had the step come this far, this child would be the text's or not.
            if (parent < 0 or parent in path) and above > 0:
                judged.append((min(1.0, whole[node] / above), node in path))

    configured = _configured(predictor.replayed(drafter, note))
    text, step, taken = np.array(starts, np.int64).reshape(-1, 3).T
    calibration = reliability(*np.array(judged, float).reshape(-1, 2).T)
    places = _by_place(facts, text, step, taken, None)
    return {**configured, **places, "method": "replay", "calibration": calibration}


def _configured(expected: Expected) -> dict[str, Any]:
    figures = results.ConfiguredFigures(
        **expected.figures(),
        tokens=expected.tokens,
        steps=expected.steps,
        accepted_at=np.sum(expected.accepted_at, 0).tolist(),
        tested_at=np.sum(expected.tested_at, 0).tolist(),
    )
    conditional = expected.conditional_acceptance_at_depth
    return {"configured": figures, "per_depth_conditional": conditional}


def _chain(length: int, children: str, threshold: float = 0.0) -> FixedShape:
    return FixedShape(from_choices([(0,) * n for n in range(1, length + 1)]), children, threshold)


def _counterfactuals(
    predictor: Predictor,
    options: Mapping[str, Any],
    drafter: Any,
    evidence: Evidence,
    table: Sequence[Sequence[float]],
) -> results.Counterfactuals:
    """Expectations for other shapes, as far as the drafter has an option for them.

    Chains are left out where the acceptance of the drafter's chains is not worked out.
    """
    children, depth = drafter.children, min(evidence.depth, LONGEST_CHAIN)
    known = drafter.shape_options.all

    def chain(length: int, threshold: float = 0.0) -> dict[str, Any]:
        shape = _chain(length, children, threshold)
        return {"length": length, **predictor.expect(options, drafter, shape).figures()}

    found = results.Counterfactuals()
    if predictor.why_unknown(_chain(1, children)) is None:
        shown = "top" if predictor.sampling.is_greedy else children
        lengths = range(1, depth + 1)
        found.chains = [results.ChainFigures(children=shown, **chain(n)) for n in lengths]
        ends = THRESHOLDS if "confidence_threshold" in known else ()
        found.thresholds = [results.ThresholdFigures(threshold=t, **chain(depth, t)) for t in ends]
    for num_nodes in TREE_SIZES if table and "choices" in known else ():
        choices = best_static_tree(table, num_nodes)
        if len(choices) < num_nodes:
            break
        expected = predictor.expect(options, drafter, FixedShape(from_choices(choices), "top"))
        found.trees.append(
            results.TreeFigures(
                nodes=num_nodes,
                depth=max(map(len, choices)),
                choices=[*map(list, choices)],
                children="top",
                **expected.figures(),
            )
        )
    return found


def hardest_contexts(
    evidence: Evidence, texts: Sequence[Text], tokenizer: Any
) -> list[results.HardContext]:
    """The places of lowest overlap; among equals, those where the text's token surprised it most.

    Places where the drafter's likeliest token is the text's are left out.
    """

    def said(tokens: Sequence[int]) -> str:
        return " ".join(map(str, tokens)) if tokenizer is None else str(tokenizer.decode(tokens))

    wrong = np.argwhere(evidence.valid[:, :, 0] & (evidence.rank[:, :, 0] != 0))
    order = np.lexsort([array[*wrong.T, 0] for array in (evidence.draft_prob, evidence.overlap)])
    found = []
    for row, step in wrong[order[:NUM_CONTEXTS]].tolist():
        text, position, place = texts[row], step + 1, (row, step, 0)
        found.append(
            results.HardContext(
                prompt=row,
                position=position,
                before=said([*text.prompt, *text.tokens[:position]][-NUM_BEFORE:]),
                drafted=[said([int(evidence.best_draft[place])])],
                target=said([text.tokens[position]]),
                p=evidence.target_prob[place],
                q=evidence.draft_prob[place],
                overlap=evidence.overlap[place],
            )
        )
    return found


def reliability(confidence: Array, taken: Array) -> results.Calibration | None:
    """Bins of equal width over [0, 1], and the expected calibration error.

    Source: Guo et al. 2017, arXiv 1706.04599, equation 3.
    """
    if not len(confidence):
        return None
    places = np.clip((confidence * NUM_BINS).astype(int), 0, NUM_BINS - 1)
    bins = [
        results.CalibrationBin(
            low=index / NUM_BINS,
            high=(index + 1) / NUM_BINS,
            count=(places == index).sum(),
            confidence=_mean(confidence, places == index),
            acceptance=_mean(taken, places == index),
        )
        for index in range(NUM_BINS)
    ]
    errors = (bin.count * abs((bin.confidence or 0) - (bin.acceptance or 0)) for bin in bins)
    return results.Calibration(bins=bins, ece=sum(errors) / len(confidence))


def _chain_confidence(evidence: Evidence, depth: int) -> tuple[Array, Array]:
    """Confidence in the likeliest token and whether it is the text's, along chains that hold.

    At every place and level down to `depth` where the likeliest tokens above are the text's: what
    a chain of likeliest tokens would be judged at.
    """
    is_best = (evidence.rank == 0) & evidence.valid
    reached = evidence.valid[:, :, :depth].copy()
    reached[:, :, 1:] &= np.logical_and.accumulate(is_best, 2)[:, :, : depth - 1]
    confidence = evidence.confidence[:, :, :depth][reached].astype(np.float64)
    return confidence, is_best[:, :, :depth][reached]


@torch.inference_mode()
def gather_facts(target: Target, texts: Sequence[Text]) -> Facts:
    """Run the target once over every text."""
    size = (len(texts), max(1, *(len(text.tokens) - 1 for text in texts)))
    entropy, classes = np.zeros(size, np.float32), np.full(size, -1, np.int8)
    for index, text in enumerate(texts):
        count = len(text.tokens) - 1
        if not count:
            continue
        parts = read_target(target, text, index).logits.split(CHUNK)
        parts = [torch.special.entr(part.float().softmax(-1)).sum(-1) for part in parts]
        entropy[index, :count] = torch.cat(parts).cpu().numpy()
        if target.tokenizer is not None:
            classes[index, :count] = classify(text.tokens, target.tokenizer)[1:]
    return entropy, classes


def classify(tokens: Sequence[int], tokenizer: Any) -> list[int]:
    """The class of every token, as an index into `CLASSES`."""
    special = set(getattr(tokenizer, "all_special_ids", ()))
    pieces = tokenizer.convert_ids_to_tokens(list(tokens))
    found, before = [], " "
    for token, piece in zip(tokens, pieces, strict=True):
        said = str(tokenizer.decode([token]))
        starts = str(piece or "").startswith(_WORD_MARKS) or not before[-1:].isalnum()
        found.append(CLASSES.index("special" if token in special else _class(said, starts)))
        before = said or before
    return found


def _class(said: str, starts_word: bool) -> results.TokenClass:
    core = said.strip()
    if not core:
        return "newline" if "\n" in said else "space" if said else "other"
    if core[0].isdigit():
        return "digit"
    if not any(letter.isalnum() for letter in core):
        # Half a character is no punctuation.
        return "other" if "\ufffd" in core else "punctuation"
    return "word_start" if starts_word else "word_piece"


def _by_place(
    facts: Facts, text: Array, step: Array, accepted: Array | None, overlap: Array | None
) -> dict[str, Any]:
    """Figures of first drafted tokens by the target's entropy, the token that came, and its place.

    All arrays are over places where a step might start, or did: `accepted` is the probability that
    it accepts a token, None where it is not worked out; `overlap` is None without a distribution.
    """

    def figures(inside: Array) -> dict[str, Any]:
        means = {"alpha": _mean(overlap, inside), "acceptance": _mean(accepted, inside)}
        return {"count": int(inside.sum()), **means}

    def bins(values: Array, edges: Sequence[float]) -> list[dict[str, Any]]:
        return [
            {
                "low": low,
                "high": high if high < np.inf else None,
                **figures((values >= low) & (values < high)),
            }
            for low, high in pairwise(edges)
        ]

    entropy, classes = (fact[text, step] for fact in facts)
    doubling = [2**n for n in range(int(max(step + 1, default=0)).bit_length() + 1)]
    return {
        "entropy_bins": bins(entropy, [*ENTROPY_EDGES, np.inf]),
        "token_classes": [
            {"name": name, **figures(classes == index)}
            for index, name in enumerate(CLASSES)
            if (classes == index).any()
        ],
        "positions": bins(step + 1, doubling),
    }


def _mean(values: Array | None, inside: Array) -> float | None:
    """Mean of shares; rounding may have lifted one above 1."""
    return min(1.0, float(values[inside].mean())) if values is not None and inside.any() else None
