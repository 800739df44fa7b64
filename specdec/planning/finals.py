"""The last word of a plan: the fastest configurations are timed as they are."""

from collections.abc import Callable, Sequence

from specdec.planning.loop_times import TimedRun
from specdec.planning.prediction import Prediction
from specdec.planning.shape import Candidate

# Configurations that are timed at a time; again where one that was not turns out the fastest.
FINALISTS, MOST_FINALS = 6, 3


def confirm(
    ranked: Sequence[Prediction],
    time: Callable[[Sequence[Candidate], int], list[TimedRun]],
    predict: Callable[[Candidate, Sequence[TimedRun]], Prediction],
) -> tuple[list[Prediction], list[TimedRun]]:
    """Rank again, with the fastest ones' own times in place of those that follow from the fits.

    A fit flatters some of the many configurations, and these are the ones that look fastest.

    Args:
        ranked: predictions, the fastest first.
        time: decodes with configurations, given the number of the turn.
        predict: a configuration, from decodings that hold it.

    Returns:
        All predictions in their new order, and what was timed.
    """
    order, finals = list(ranked), list[TimedRun]()
    known: set[str] = set()
    for turn in range(MOST_FINALS):
        new = [p.candidate for p in order[:FINALISTS] if p.candidate.key not in known]
        finals += time(new, turn)
        known |= {candidate.key for candidate in new}
        again = [predict(p.candidate, finals) if p.candidate.key in known else p for p in order]
        order = sorted(again, key=lambda p: -p.speedup)
        if order[0].is_timed:
            break
    return order, finals
