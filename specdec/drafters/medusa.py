"""Medusa: heads on the target's last feature, each guessing one token further ahead.

Source: Medusa, arXiv 2401.10774.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, silu

from specdec.demo import demo_path
from specdec.drafters.forced import FixedShape
from specdec.drafters.heads import load_head
from specdec.drafters.training import LossOutput, TrainingBatch, shifted
from specdec.drafters.tree_growth import StaticGrowth, TreeShape, guessed_acceptance
from specdec.engine.clock import ForwardClock
from specdec.engine.interfaces import Prompts, TargetOutput
from specdec.sampling.sampler import Sampler
from specdec.verify import Draft, Verdict, best_static_tree

_DEFAULT_NODES, _GUESSED_WIDTH = 24, 8


@dataclass(frozen=True)
class MedusaConfig:
    """What makes Medusa heads.

    Attributes:
        hidden_size: H of the target.
        vocab_size: V of the target.
        tap: HF `hidden_states` index they read: the target's last, after its final norm.
        num_heads: tokens guessed behind the root.
        num_layers: residual blocks of each head.
        own_vocab_head: each head brings its own vocabulary projection; otherwise all of them use
            the target's.
    """

    hidden_size: int
    vocab_size: int
    tap: int
    num_heads: int = 4
    num_layers: int = 1
    own_vocab_head: bool = True


class ResBlock(nn.Module):
    """x + SiLU(linear(x)), which starts as the identity."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, states: Tensor) -> Tensor:
        """States [..., H] to states [..., H]."""
        return states + silu(self.linear(states))


class MedusaHeads(nn.Module):
    """K heads. Parameters: `blocks.{head}.{layer}.linear.*` and `vocab_heads.{head}.weight`.

    Args:
        config: see `MedusaConfig`.
        vocab_head: the target's vocabulary projection; not a parameter of the heads.
    """

    def __init__(self, config: MedusaConfig, vocab_head: nn.Module) -> None:
        super().__init__()
        self.config, self.taps = config, (config.tap,)
        size = config.hidden_size
        self.blocks = nn.ModuleList(
            nn.ModuleList(ResBlock(size) for _ in range(config.num_layers))
            for _ in range(config.num_heads)
        )
        if config.own_vocab_head:
            self.vocab_heads = nn.ModuleList(
                nn.Linear(size, config.vocab_size, bias=False) for _ in range(config.num_heads)
            )
        # A tuple keeps the target's projection out of the heads' parameters.
        self._target_head = (vocab_head,)

    def forward(self, feature: Tensor, num_heads: int | None = None) -> Tensor:
        """Logits [..., K, V]: head k guesses the token k + 2 places after the feature [..., H].

        `num_heads` asks the first heads only; None asks all K.
        """
        count = self.config.num_heads if num_heads is None else num_heads
        return torch.stack([self.guess(k, feature) for k in range(count)], -2)

    def guess(self, head: int, feature: Tensor) -> Tensor:
        """Logits [..., V] of one head."""
        states = feature
        for block in self.blocks[head]:  # type: ignore[attr-defined]
            states = block(states)
        project = self.vocab_heads[head] if self.config.own_vocab_head else self._target_head[0]
        logits: Tensor = project(states)
        return logits


class MedusaDrafter:
    """Drafts a static tree from one look at the target's last feature; it has no cache.

    Args:
        heads: in eval mode, on the target's device.
        vocab_size: V of the target.
        shape: a static tree, at most as deep as there are heads.
    """

    shape_options: ClassVar[frozenset[str]] = frozenset(
        ("max_nodes", "choices", "acceptance", "children")
    )

    @classmethod
    def load(
        cls,
        target: Any,
        path: str = "demo",
        max_nodes: int | None = None,
        choices: Sequence[Sequence[int]] | None = None,
        acceptance: Sequence[Sequence[float]] | None = None,
        children: str = "top",
        force: bool = False,
    ) -> Self:
        """Load heads for a target, with the tree that is given, comes with them, or is best.

        Args:
            target: what they draft for.
            path: folder or hub id in any known layout; "demo" for the embedded heads.
            max_nodes: compute the best tree of this many nodes; None takes the checkpoint's own
                tree where it has one, and 24 where not.
            choices: a tree of one's own, one list of ranks a node.
            acceptance: [depth][rank] that the computed tree is best for, see `best_static_tree`;
                None for what was measured when the heads were trained.
            children: see `TreeShape`.
            force: take heads that were trained for another target of the same shape.

        Raises:
            FileNotFoundError: no such checkpoint.
            ValueError: the checkpoint does not fit, or an option is out of its range.
        """
        where = str(demo_path("medusa")) if path == "demo" else path
        heads, checkpoint = load_head("medusa", target, where, force=force)
        assert isinstance(heads, MedusaHeads)
        if choices is None and max_nodes is None and acceptance is None:
            choices = checkpoint.tree
        if choices is None:
            table = acceptance
            if table is None:
                table = checkpoint.training.get("acceptance_by_rank")
            if table is None:
                table = guessed_acceptance(heads.config.num_heads, _GUESSED_WIDTH)
            ranks = [row[: target.vocab_size] for row in table]
            choices = best_static_tree(ranks, _DEFAULT_NODES if max_nodes is None else max_nodes)
        return cls(heads, target.vocab_size, TreeShape(choices=choices, children=children))

    def __init__(self, heads: MedusaHeads, vocab_size: int, shape: TreeShape) -> None:
        self.heads, self.vocab_size, self.shape = heads, vocab_size, shape
        self.taps = heads.taps
        self.device = next(heads.parameters()).device
        self.clock = ForwardClock(self.device)
        self._plan = shape.static_plan(vocab_size, self.device)
        self.makes_trees = not self._plan.is_chain
        depth = self._plan.tree.depth
        if depth > heads.config.num_heads:
            raise ValueError(
                f"the tree has {depth} levels but there are {heads.config.num_heads} heads, one a "
                "level; choose a shallower tree"
            )
        self.max_nodes = self._plan.num_nodes
        self._feature = torch.empty(0, device=self.device)  # [B, H] where the root was sampled
        self._num_committed = torch.empty(0, dtype=torch.long, device=self.device)  # [B]

    def begin(
        self, prompts: Prompts, output: TargetOutput, sampler: Sampler, *, join: bool = False
    ) -> None:
        """Keep the features of the prompts' last tokens."""
        hidden = output.hidden[self.taps[0]]
        counts = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        feature = hidden[torch.arange(len(prompts), device=self.device), counts - 2]
        self._feature = torch.cat([self._feature, feature]) if join else feature
        self._num_committed = torch.cat([self._num_committed, counts]) if join else counts

    def propose(self, root: Tensor, budget: Sequence[int], sampler: Sampler) -> Draft:
        """Fill the tree with the heads' candidates; a level's nodes share their head's guess."""
        if max(budget) < 1:
            return Draft.empty(len(root), root.device)
        growth = StaticGrowth(
            self._plan, self.shape.children, max(budget), sampler, self._num_committed
        )
        with self.clock.forward():
            logits = self.heads(self._feature, growth.num_levels)  # [B, levels, V]
        for level in range(growth.num_levels):
            growth.add_level(self._scores(logits[:, level : level + 1], growth, level, sampler))
        return growth.draft(budget)

    def _scores(self, logits: Tensor, growth: StaticGrowth, level: int, sampler: Sampler) -> Tensor:
        """Scores [B, beam, V] of the candidates behind each node of the newest beam."""
        if level == 0:
            return sampler.scores(logits)
        draft, rows = growth.expanded()
        spread = logits.expand(-1, len(rows), -1)
        return sampler.scores(spread, draft, rows.expand(len(logits), -1))

    def observe(
        self, verdict: Verdict, committed: Sequence[Sequence[int]], hidden: dict[int, Tensor]
    ) -> None:
        """Keep the feature where the new root was sampled: the old root's or the last node's."""
        path = torch.nn.functional.pad(verdict.path + 1, (1, 0))  # [B, D + 1]; 0 is the root
        place = path.gather(1, verdict.num_accepted.unsqueeze(1)).squeeze(1)
        states = hidden[self.taps[0]]
        self._feature = states[torch.arange(len(states), device=self.device), place]
        self._num_committed = self._num_committed + verdict.num_accepted + 1

    def reorder(self, rows: Tensor) -> None:
        """Keep these rows."""
        self._feature, self._num_committed = self._feature[rows], self._num_committed[rows]

    @property
    def children(self) -> str:
        """See `TreeShape`."""
        return self.shape.children

    @property
    def fixed_shape(self) -> FixedShape:
        """The tree."""
        return FixedShape(self._plan.tree, self.children)

    def forced(
        self, tokens: Tensor, hidden: dict[int, Tensor], depth: int, first: int
    ) -> Iterator[Tensor]:
        """See `Forced`: every head at every place."""
        features = hidden[self.taps[0]][first : len(tokens) - 1]
        for level in range(min(depth, self.heads.config.num_heads, len(features))):
            yield self.heads.guess(level, features[: len(features) - level])


def build(
    options: dict[str, Any], target_config: Any, embedding: nn.Module, vocab_head: nn.Module
) -> MedusaHeads:
    """New heads for a target; their own projections start as copies of the target's.

    Args:
        options: fields of `MedusaConfig`; what is missing follows the target.
        target_config: the target's text config.
        embedding: not used.
        vocab_head: the target's vocabulary projection.
    """
    defaults = {
        "hidden_size": target_config.hidden_size,
        "vocab_size": target_config.vocab_size,
        "tap": target_config.num_hidden_layers,
    }
    heads = MedusaHeads(MedusaConfig(**{**defaults, **options}), vocab_head)
    if heads.config.own_vocab_head:
        own = {f"{head}.weight": vocab_head.weight for head in range(heads.config.num_heads)}
        heads.vocab_heads.load_state_dict(own)
    return heads


def loss(
    heads: MedusaHeads, batch: TrainingBatch, decay: float = 0.8, objective: str = "cross_entropy"
) -> LossOutput:
    """Sum over heads of decay^k times the cross-entropy to the text, or the KL to the target.

    Args:
        heads: in train mode.
        batch: see `TrainingBatch`.
        decay: weight of a head over that of the one before; the first has `decay` itself.
        objective: "cross_entropy" (Medusa-1) or "kl" (self-distillation).
    """
    if objective not in ("cross_entropy", "kl"):
        raise ValueError(f"objective is {objective!r} but must be 'cross_entropy' or 'kl'")
    states = batch.hidden[heads.taps[0]]
    total = states.new_zeros((), dtype=torch.float32)
    parts: dict[str, Tensor] = {}
    for k in range(heads.config.num_heads):
        mask = shifted(batch.loss_mask, k + 2)
        logits = heads.guess(k, states[mask]).float()  # [places, V]
        if objective == "kl":
            goal = shifted(batch.target_logits, k + 1)[mask].float().log_softmax(-1)
            each = (goal.exp() * (goal - logits.log_softmax(-1))).sum(-1)
        else:
            goal = shifted(batch.tokens, k + 2)[mask]
            each = cross_entropy(logits, goal, reduction="none")
        part = each.sum() / max(len(each), 1)
        total = total + decay ** (k + 1) * part
        parts[f"{objective}_{k + 1}"] = part.detach()
    return LossOutput(total, parts)
