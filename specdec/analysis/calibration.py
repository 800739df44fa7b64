"""Whether a drafter's confidence is what it is worth."""

from typing import Any

import numpy as np

from specdec.analysis.evidence import Array, Evidence

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
