"""From token trees on the host to one draft on the device."""

from collections.abc import Sequence

import torch

from specdec.verify import Draft

# One node: (parent's index in its row or -1, token).
Node = tuple[int, int]


def pack_rows(rows: Sequence[Sequence[Node]], device: torch.device, *, as_chain: bool) -> Draft:
    """Pad the rows' nodes to one deterministic draft.

    Args:
        rows: nodes of each row in topological order.
        device: where the draft goes.
        as_chain: every row is a chain, so no parents are needed.
    """
    width = max(map(len, rows), default=0)
    if width == 0:
        return Draft.empty(len(rows), device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    tokens = [[token for _, token in row] + [-1] * (width - len(row)) for row in rows]
    if as_chain:
        return Draft.chain(torch.tensor(tokens, device=device), lengths)
    parents = [[parent for parent, _ in row] + [-1] * (width - len(row)) for row in rows]
    both = torch.tensor([tokens, parents], device=device)
    return Draft.tree(both[0], both[1], lengths, depth=max(map(_depth, rows)))


def merge(continuations: Sequence[Sequence[int]], budget: int) -> list[Node]:
    """Join continuations into one tree; earlier ones are first in line for the budget."""
    nodes: list[Node] = []
    index: dict[Node, int] = {}
    for continuation in continuations:
        parent = -1
        for token in continuation:
            node = (parent, token)
            if node not in index:
                if len(nodes) == budget:
                    return nodes
                index[node] = len(nodes)
                nodes.append(node)
            parent = index[node]
    return nodes


def _depth(row: Sequence[Node]) -> int:
    depths: list[int] = []
    for parent, _ in row:
        depths.append(1 if parent < 0 else depths[parent] + 1)
    return max(depths, default=0)
