"""`Draft` and `Verdict`: a drafter's proposal and a rule's answer.

Shapes everywhere in this package: B rows, N draft nodes, D tree depth, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from specdec.verify.tree import ancestors


# eq=False: comparing tensors field by field has no single truth value.
@dataclass(frozen=True, eq=False)
class Draft:
    """A batch of ragged drafts, chains or trees.

    Nodes are topological: a parent's index is smaller than its children's, and siblings are judged
    in index order. Real nodes come first in their row; what stands behind them is padding.

    Attributes:
        tokens: [B, N] int64, padded with -1.
        lengths: [B] int64 nodes in each row; 0 means that the row decodes one token plainly.
        parents: [B, N] int64, -1 for a child of the root and for padding; None for a chain.
        probs: [B, N, V] the full distribution node i was drawn from, given its path and its earlier
            siblings; None when tokens were chosen deterministically (argmax, top-k, lookup).
        depth: at least the longest path of any row. An int, because reading it from the tensors
            would cost a host synchronization.
        confidence: [B, N] the drafter's own estimate that the target takes the whole path down to
            the node, or None. Rules never look at it.
    """

    tokens: Tensor
    lengths: Tensor
    parents: Tensor | None
    probs: Tensor | None
    depth: int
    confidence: Tensor | None = None

    @property
    def batch_size(self) -> int:
        """B, the number of rows."""
        return self.tokens.shape[0]

    @property
    def num_nodes(self) -> int:
        """N, the padded number of nodes of a row."""
        return self.tokens.shape[1]

    @property
    def is_chain(self) -> bool:
        """The draft was declared a chain; `parents` that spell one do not count."""
        return self.parents is None

    @classmethod
    def chain(
        cls,
        tokens: Tensor,
        lengths: Tensor | None = None,
        probs: Tensor | None = None,
        confidence: Tensor | None = None,
    ) -> "Draft":
        """Build a chain from [B, N] tokens; `lengths` None means that every row is full."""
        num_nodes = tokens.shape[1]
        if lengths is None:
            lengths = tokens.new_full(tokens.shape[:1], num_nodes, dtype=torch.long)
        return cls(tokens, lengths, None, probs, num_nodes, confidence)

    @classmethod
    def tree(
        cls,
        tokens: Tensor,
        parents: Tensor,
        lengths: Tensor | None = None,
        depth: int | None = None,
        probs: Tensor | None = None,
        confidence: Tensor | None = None,
    ) -> "Draft":
        """Build a tree from [B, N] tokens and topological [B, N] or shared [N] parents.

        `depth` None means N, which is always enough; the true depth makes verification cheaper.
        """
        chain = cls.chain(tokens, lengths, probs, confidence)
        if parents.dim() == 1:
            parents = parents.expand(tokens.shape)
        deepest = chain.depth if depth is None else depth
        return cls(tokens, chain.lengths, parents, probs, deepest, confidence)

    @classmethod
    def empty(cls, batch_size: int, device: torch.device | str | None = None) -> "Draft":
        """Build a draft with no nodes: every row decodes one token plainly."""
        return cls.chain(torch.empty(batch_size, 0, dtype=torch.long, device=device))

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> "Draft":
        """Apply a change to every tensor, for example to select rows or to move them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in tensors.items()}
        return replace(self, **changed)

    @cached_property
    def ancestors(self) -> Tensor:
        """Ancestors [B, N, D] int64 of each node, itself first, -1 above the root's children."""
        parents = self.explicit_parents() if self.parents is None else self.parents
        return ancestors(parents, self.depth)

    @cached_property
    def depths(self) -> Tensor:
        """Nodes from the root to each node, itself included: [B, N] int64; padding has any."""
        if self.parents is None:
            steps = torch.arange(1, self.num_nodes + 1, device=self.tokens.device)
            return steps.expand(self.batch_size, -1)
        return (self.ancestors >= 0).sum(2)

    def real_nodes(self) -> Tensor:
        """Mark the nodes that are not padding, bool [B, N]."""
        columns = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return columns < self.lengths.unsqueeze(1)

    def explicit_parents(self) -> Tensor:
        """Return parents [B, N] also for a chain, with -1 on padding."""
        parents = self.parents
        if parents is None:
            parents = torch.arange(-1, self.num_nodes - 1, device=self.tokens.device)
        return torch.where(self.real_nodes(), parents, -1)


@dataclass(frozen=True, eq=False)
class Verdict:
    """The decision of a rule about a draft.

    Attributes:
        tokens: [B, D + 1] int64: accepted tokens, then the bonus or corrected one; -1 padded.
        num_accepted: [B] int64 accepted draft tokens, the bonus or corrected one excluded.
        path: [B, D] int64 indices of the accepted nodes from the root down; -1 padded.
        tested: [B, N] bool nodes the rule judged, as each rule explains. Always path within tested
            within real nodes.
    """

    tokens: Tensor
    num_accepted: Tensor
    path: Tensor
    tested: Tensor
