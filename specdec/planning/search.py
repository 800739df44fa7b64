"""Finding the fastest configuration without asking for the acceptance of every one.

A draft that holds another one accepts at least as much. So what a large shape accepts, at the
price of a smaller one, bounds the smaller one's speed; shapes whose bound is below the speeds that
are wanted are never looked at.
"""

from collections.abc import Callable, Sequence
from math import inf

from specdec.planning.prediction import Prediction
from specdec.planning.shape import Candidate

# A bound is believed to this share: a dynamic tree's reranking may drop what a smaller one kept.
SLACK = 0.03


def search(
    candidates: Sequence[Candidate],
    predict: Callable[[Candidate], Prediction],
    bound: Callable[[Candidate, Candidate], float],
    wanted: int = 1,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> list[Prediction]:
    """Predict whatever may be among the fastest, and every given configuration.

    Args:
        candidates: distinct configurations.
        predict: of one; dear.
        bound: of a candidate's speed, given a larger one whose prediction is known; cheap.
        wanted: how many of the fastest.
        progress: called with candidates settled, candidates in all, and what comes next.

    Returns:
        Predictions, the fastest first; of equally fast ones the smaller draft first. Every
        candidate that is left out is slower than the first `wanted` of them.
    """
    found: list[Prediction] = []
    waiting = list(candidates)
    bounds = dict.fromkeys(range(len(waiting)), inf)
    left = sorted(bounds, key=lambda i: _largest_first(waiting[i]))
    while left:
        index = max(left, key=lambda i: (waiting[i].is_given, bounds[i]))
        candidate = waiting[index]
        if not candidate.is_given and bounds[index] < _least(found, wanted):
            break
        progress(len(waiting) - len(left), len(waiting), candidate.name)
        left.remove(index)
        found.append(predict(candidate))
        for other in left:
            if _covers(candidate, waiting[other]):
                limit = bound(waiting[other], candidate) * (1 + SLACK)
                bounds[other] = min(bounds[other], limit)
    progress(len(waiting), len(waiting), "search")
    return sorted(found, key=lambda p: (-p.speedup, p.candidate.shape.nodes, p.candidate.name))


def _least(found: Sequence[Prediction], wanted: int) -> float:
    """The speed that a candidate has to reach: of the last one wanted, as far as there are."""
    speeds = sorted((each.speedup for each in found), reverse=True)
    return speeds[wanted - 1] if len(speeds) >= wanted else 0.0


def _covers(larger: Candidate, smaller: Candidate) -> bool:
    same = larger.drafter == smaller.drafter
    return same and larger.shape.covers(smaller.shape)


def _largest_first(candidate: Candidate) -> tuple[float, ...]:
    shape = candidate.shape
    return (-shape.nodes, -shape.depth, -shape.width, shape.threshold)
