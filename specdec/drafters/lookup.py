"""Copied texts of lookup drafters, merged into one tree and packed into a draft."""

from collections.abc import Sequence

import torch

from specdec.verify import Draft

# One node: (parent's index in its row or -1, token).
Node = tuple[int, int]


def pack_rows(
    rows: Sequence[Sequence[Node]],
    device: torch.device,
    *,
    as_chain: bool,
    confidences: Sequence[Sequence[float]] | None = None,
) -> Draft:
    """Pad the rows' nodes to one deterministic draft.

    Args:
        rows: nodes of each row in topological order.
        device: where the draft goes.
        as_chain: every row is a chain, so no parents are needed.
        confidences: estimates for each row's nodes, see `Draft`; None for no estimate.
    """
    width = max(map(len, rows), default=0)
    if width == 0:
        return Draft.empty(len(rows), device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    tokens = [[token for _, token in row] + [-1] * (width - len(row)) for row in rows]
    confidence = None
    if confidences is not None:
        padded = [[*row, *[0.0] * (width - len(row))] for row in confidences]
        confidence = torch.tensor(padded, device=device)
    if as_chain:
        return Draft.chain(torch.tensor(tokens, device=device), lengths, confidence=confidence)
    parents = [[parent for parent, _ in row] + [-1] * (width - len(row)) for row in rows]
    both = torch.tensor([tokens, parents], device=device)
    depth = max(map(_depth, rows))
    return Draft.tree(both[0], both[1], lengths, depth, confidence=confidence)


def match_confidence(length: int, level: int) -> float:
    """Confidence that a copied text goes on as its source did, down to a level (1, 2, ...).

    A match of n tokens is followed by its continuation with a chance of about n / (n + 1) (the
    rule of succession), and every token taken makes the match one longer: the product of the
    chances is n / (n + level).
    """
    return length / (length + level)


def merge(
    continuations: Sequence[tuple[int, Sequence[int]]], budget: int
) -> tuple[list[Node], list[float]]:
    """Join continuations into one tree; earlier ones are first in line for the budget.

    Args:
        continuations: pairs of how long a match was and what followed it.
        budget: nodes, at most.

    Returns:
        The nodes and the confidence in each.
    """
    nodes: list[Node] = []
    confidences: list[float] = []
    index: dict[Node, int] = {}
    for length, continuation in continuations:
        parent = -1
        for level, token in enumerate(continuation, 1):
            node = (parent, token)
            if node not in index:
                if len(nodes) == budget:
                    return nodes, confidences
                index[node] = len(nodes)
                nodes.append(node)
                above = confidences[parent] if parent >= 0 else 1.0
                confidences.append(min(above, match_confidence(length, level)))
            parent = index[node]
    return nodes, confidences


def _depth(row: Sequence[Node]) -> int:
    depths: list[int] = []
    for parent, _ in row:
        depths.append(1 if parent < 0 else depths[parent] + 1)
    return max(depths, default=0)
