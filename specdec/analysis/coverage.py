"""Which of a drafter's candidates the target takes."""

import numpy as np

from specdec.analysis.evidence import Array, Evidence

WIDTH = 10


def coverage(evidence: Evidence, width: int = WIDTH) -> list[list[float]]:
    """Share of places where the text takes the candidate of each rank, by depth: [depth][rank].

    At a depth those places count where it took one of the first `width` candidates at every depth
    above: what `best_static_tree` wants to know. Depths without a place are left out.
    """
    counted = evidence.valid.copy()
    table = []
    for level in range(evidence.depth):
        reached: Array = counted[:, :, level]
        num_places = int(reached.sum())
        if not num_places:
            break
        ranks = evidence.rank[:, :, level][reached]
        hits = np.bincount(ranks[ranks < width], minlength=width)
        table.append([round(float(share), 6) for share in hits / num_places])
        if level + 1 < evidence.depth:
            counted[:, :, level + 1] &= reached & (evidence.rank[:, :, level] < width)
    return table
