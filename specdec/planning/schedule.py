"""How much to draft as the batch grows: a draft length a batch size, and the table behind it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from specdec.planning.prediction import Forecast, Prediction
from specdec.planning.shape import Candidate, cut

# Predicted gain below which plain decoding is kept: noise must not decide.
MARGIN = 0.02
NODES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)


@dataclass(frozen=True)
class Schedule:
    """Draft lengths by batch size for one drafter.

    Attributes:
        nodes: most nodes a row by batch size; 0 is plain decoding.
        predictions: of every length that was compared, by batch size.
        step_s: seconds of a whole step by batch size and by nodes that it drafts; 0 is plain
            decoding.
    """

    nodes: dict[int, int]
    predictions: dict[int, list[Prediction]]
    step_s: dict[int, dict[int, float]]

    def to_json(self) -> dict[str, Any]:
        """The lengths, and what they were chosen from."""
        return {
            "nodes": {str(size): nodes for size, nodes in self.nodes.items()},
            "predictions": [
                {
                    "batch_size": size,
                    "nodes": each.candidate.shape.nodes,
                    "predicted_tau": each.tau,
                    "predicted_speedup": each.speedup,
                    "predicted_speedup_ci": each.speedup_ci,
                    "is_timed": each.is_timed,
                }
                for size, row in self.predictions.items()
                for each in row
            ],
        }


def cuts(candidate: Candidate) -> Iterator[Candidate]:
    """The candidate with at most 1, 2, 3, ... nodes, itself last."""
    wanted = {nodes for nodes in NODES if nodes < candidate.shape.nodes} | {candidate.shape.nodes}
    for nodes in sorted(wanted):
        options, shape = cut(candidate.type, candidate.options, candidate.shape, nodes)
        if shape.nodes == nodes:
            yield Candidate(f"{nodes} nodes", candidate.type, options, candidate.drafter, shape)


def schedule(forecast: Forecast, candidate: Candidate, batch_sizes: Sequence[int]) -> Schedule:
    """Choose a draft length for every batch size.

    Args:
        forecast: its costs must hold the candidate's drafter at these batch sizes.
        candidate: what drafts.
        batch_sizes: rows.
    """
    lengths = list(cuts(candidate))
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
