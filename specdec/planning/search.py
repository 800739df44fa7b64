"""The choice: a bounded search over shapes, finals of the fastest, and lengths by batch size."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

from specdec.planning.candidates import Candidate
from specdec.planning.prediction import Forecast, Prediction
from specdec.planning.results import ScheduledLength
from specdec.planning.times import TimedRun

# Predicted gain below which plain decoding is kept: noise must not decide.
MARGIN = 0.02
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
        predict: the prediction of one candidate; dear.
        bound: the most speed of a candidate, given a larger one whose prediction is known; cheap.
        wanted: how many of the fastest.
        progress: called with candidates settled, candidates in all, and what comes next.

    Returns:
        Predictions, the fastest first; of equally fast ones the smaller draft first. Every
        candidate that is left out is slower than the first `wanted` of them.
    """

    def largest_first(index: int) -> tuple[float, ...]:
        shape = candidates[index].shape
        return (-shape.nodes, -shape.depth, -shape.width, shape.threshold)

    found: list[Prediction] = []
    bounds = [inf] * len(candidates)
    left = sorted(range(len(candidates)), key=largest_first)
    while left:
        index = max(left, key=lambda i: (candidates[i].is_given, bounds[i]))
        candidate = candidates[index]
        speeds = sorted((each.speedup for each in found), reverse=True)
        is_hopeless = len(speeds) >= wanted and bounds[index] < speeds[wanted - 1]
        if is_hopeless and not candidate.is_given:
            break
        progress(len(candidates) - len(left), len(candidates), candidate.name)
        left.remove(index)
        found.append(predict(candidate))
        for i in left:
            other = candidates[i]
            if candidate.drafter == other.drafter and candidate.shape.covers(other.shape):
                bounds[i] = min(bounds[i], bound(other, candidate) * (1 + SLACK))
    progress(len(candidates), len(candidates), "search")
    return sorted(found, key=lambda p: (-p.speedup, p.candidate.shape.nodes, p.candidate.name))


def confirm(
    ranked: Sequence[Prediction],
    finalists: int,
    time: Callable[[Sequence[Candidate]], list[TimedRun]],
    predict: Callable[[Sequence[Candidate], Sequence[TimedRun]], list[Prediction]],
) -> tuple[list[Prediction], list[TimedRun]]:
    """Rank again, with the fastest ones' own times in place of those that follow from the fits.

    A fit flatters some of the many configurations, and these are the ones that look fastest. So
    the choice is among those that were timed, all of them in the same rounds: a machine's speed
    moves, and what was timed at another moment cannot be compared within a few percent.

    Args:
        ranked: predictions, the fastest first.
        finalists: how many are timed.
        time: decodes with configurations.
        predict: configurations, from decodings that hold them.

    Returns:
        The finalists, the fastest first, then the others as they were; and what was timed.
    """
    chosen = [prediction.candidate for prediction in ranked[:finalists]]
    finals = time(chosen)
    again = sorted(predict(chosen, finals), key=lambda prediction: -prediction.speedup)
    return [*again, *ranked[finalists:]], finals


@dataclass(frozen=True)
class Schedule:
    """Draft lengths by batch size for one drafter.

    Attributes:
        nodes: most nodes a row by batch size; 0 is plain decoding.
        predictions: every length that was compared, by batch size.
        step_s: seconds of a whole step by batch size and by nodes that it drafts; 0 is plain
            decoding.
    """

    nodes: dict[int, int]
    predictions: dict[int, list[Prediction]]
    step_s: dict[int, dict[int, float]]

    def described(self) -> list[ScheduledLength]:
        """The lengths as a plan holds them."""
        return [
            ScheduledLength(
                batch_size=size,
                nodes=each.candidate.shape.nodes,
                predicted_tau=each.tau,
                predicted_speedup=each.speedup,
                predicted_speedup_ci=each.speedup_ci,
                is_timed=each.is_timed,
            )
            for size, row in self.predictions.items()
            for each in row
        ]


def schedule(forecast: Forecast, candidate: Candidate, batch_sizes: Sequence[int]) -> Schedule:
    """Choose a draft length for every batch size, for which the costs hold the drafter."""
    lengths = list(candidate.cuts())
    predictions = {size: [forecast(each, size) for each in lengths] for size in batch_sizes}
    nodes = {}
    for size, row in predictions.items():
        # The choice of a plan was timed as it is, and has beaten its cuts already.
        best = row[-1] if row[-1].is_timed else max(row, key=lambda p: p.speedup)
        nodes[size] = best.candidate.shape.nodes if best.speedup > 1 + MARGIN else 0
    step_s = {
        size: {
            0: forecast.plain(size).wall_s,
            **{each.shape.nodes: forecast.full_step(each, size).wall_s for each in lengths},
        }
        for size in batch_sizes
    }
    return Schedule(nodes, predictions, step_s)
