"""The last word of a plan: the fastest configurations are timed as they are."""

from collections.abc import Callable, Sequence

from specdec.planning.loop_times import TimedRun
from specdec.planning.prediction import Prediction
from specdec.planning.shape import Candidate


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
