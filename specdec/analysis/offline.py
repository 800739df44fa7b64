"""The loop's steps along a text, from what a trainee drafts at every place of it.

A drafter that is given the text itself says at every place what it would draft there. Where the
text is the target's greedy one, a draft is accepted as far as it is the text, so that the steps
of the loop can be walked without decoding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from specdec.analysis.replay import untimed_step
from specdec.analysis.texts import Text
from specdec.drafters.training import shifted
from specdec.engine.metrics import StepRecord
from specdec.verify.tree import StaticTree, from_choices


@dataclass(frozen=True, eq=False)
class DraftShape:
    """A chain or a static tree.

    Nodes are counted from 1, in the order in which a budget keeps them; 0 is the root.

    Attributes:
        tree: the nodes.
        children: [N + 1, width] int64, the child of each rank behind each node, -1 for none.
    """

    tree: StaticTree
    children: Tensor

    @classmethod
    def from_choices(cls, choices: Sequence[Sequence[int]]) -> Self:
        """A static tree, one list of ranks a node."""
        tree = from_choices(choices)
        children = torch.full((len(tree.parents) + 1, int(tree.ranks.max()) + 1), -1)
        children[tree.parents + 1, tree.ranks] = torch.arange(1, len(tree.parents) + 1)
        return cls(tree, children)

    @classmethod
    def chain(cls, depth: int) -> Self:
        """One node a level."""
        return cls.from_choices([(0,) * (level + 1) for level in range(depth)])

    @property
    def depth(self) -> int:
        """Number of levels."""
        return self.tree.depth

    @property
    def width(self) -> int:
        """Candidates that are asked for at each level."""
        return self.children.shape[1]

    @property
    def num_nodes(self) -> int:
        """Number of nodes, the root not counted."""
        return len(self.tree.parents)

    def __str__(self) -> str:
        if self.num_nodes == self.depth:
            return f"chain of {self.depth} tokens"
        return f"tree of {self.num_nodes} nodes on {self.depth} levels"


def matching_nodes(drafted: Tensor, tokens: Tensor, shape: DraftShape) -> Tensor:
    """Nodes [B, L, D] that the text takes in the draft behind each place; -1 where it leaves it.

    `drafted` [B, L, D, width] holds a trainee's candidates.
    """
    children = shape.children.to(tokens.device)
    node = torch.zeros_like(tokens)
    path = []
    for level in range(shape.depth):
        hits = drafted[:, :, level] == shifted(tokens, 2 + level).unsqueeze(-1)  # [B, L, width]
        goes_on = hits.any(-1) & (node >= 0)
        node = torch.where(goes_on, children[node.clamp(min=0), hits.byte().argmax(-1)], -1)
        path.append(node)
    return torch.stack(path, 2)


def walk(
    index: int, text: Text, path: Sequence[Sequence[int]], shape: DraftShape
) -> list[StepRecord]:
    """The steps that the loop would take along a text; nothing is timed."""
    records: list[StepRecord] = []
    first_child = [min((c for c in row if c > 0), default=None) for row in shape.children.tolist()]
    num_done = 1
    while num_done < len(text.tokens):
        place = len(text.prompt) + num_done - 2  # drafts behind the token after it, the root
        # As `Request.budget`: the nodes that can still be kept, beside the step's own token.
        budget = min(text.max_tokens - num_done - 1, shape.num_nodes)
        left = len(text.tokens) - num_done
        nodes = [node for node in path[place] if 0 < node <= budget]
        below = first_child[nodes[-1] if nodes else 0]
        depth_tested = len(nodes) + (below is not None and below <= budget)
        # The last token of a text counts as its step's own, whoever found it.
        num_accepted = min(len(nodes), left - 1)
        records.append(
            untimed_step(index, budget, num_accepted, min(depth_tested, left), len(records))
        )
        num_done += num_accepted + 1
    return records
