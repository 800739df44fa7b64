"""Medusa: heads on the target's last feature, each guessing one token further ahead.

Sources: Medusa, arXiv 2401.10774; dynamic trees of such heads: DDTree, arXiv 2604.12989.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from specdec.common.compile import ROWS, as_target, compile_mode
from specdec.common.config import Config
from specdec.drafters.base import ShapeOptions, Tokens
from specdec.drafters.heads import Head, HeadDrafter, Layer, Size, compile_head, load_head
from specdec.drafters.training import LossOutput, TrainingBatch, chain_loss
from specdec.drafters.tree_growth import Choices, TreeShape, guessed_acceptance
from specdec.engine.interfaces import Prompts, TargetOutput
from specdec.sampling.sampler import Sampler
from specdec.verify import Draft, Verdict, best_static_tree

_MOST_BLOCKS = 1000  # a number in a config takes no memory, a module does


class MedusaOptions(Config):
    """The options of Medusa heads; without projections of their own they use the target's."""

    hidden_size: Size | None = None
    vocab_size: Size | None = None
    tap: Layer | None = None  # None for the target's last, after its final norm
    num_heads: Size = 4  # tokens guessed behind the root
    num_layers: Size = 1  # residual blocks of each head
    draft_vocab_size: Size | None = None  # of own projections; None for the whole vocabulary
    own_vocab_head: bool = Field(True, description="a vocabulary projection for every head")

    @model_validator(mode="after")
    def _can_be_built(self) -> Self:
        if self.num_heads * self.num_layers > _MOST_BLOCKS:
            raise ValueError(
                f"num_heads {self.num_heads} times num_layers {self.num_layers} of Medusa heads is "
                f"more than {_MOST_BLOCKS}; is the config damaged?"
            )
        if self.draft_vocab_size and not self.own_vocab_head:
            raise ValueError("draft_vocab_size is for projections of their own; drop it")
        return self


class ResBlock(nn.Module):
    """x + SiLU(linear(x)), which starts as the identity."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, states: Tensor) -> Tensor:
        return states + silu(self.linear(states))


class MedusaHeads(Head):
    """K heads. Parameters: `blocks.{head}.{layer}.linear.*` and `vocab_heads.{head}.weight`.

    The rows of their own projections start as copies of the target's; `draft_ids` [D] are the ids
    of a reduced draft vocabulary.
    """

    Options = MedusaOptions
    draft_ids: Tensor

    def __init__(self, options: Mapping[str, Any], target_config: Any, *parts: Any) -> None:
        super().__init__(options, target_config, *parts)
        given = self.given(options)
        tap = target_config.num_hidden_layers if given.tap is None else given.tap
        size = given.hidden_size or target_config.hidden_size
        vocab = given.vocab_size or target_config.vocab_size
        drafted: Any = given.draft_vocab_size or (vocab if given.own_vocab_head else None)
        sizes = {"hidden_size": size, "vocab_size": vocab, "tap": tap, "draft_vocab_size": drafted}
        if drafted and drafted > vocab:
            raise ValueError(f"draft_vocab_size is {drafted} but the target has {vocab} tokens")
        self.options = given.model_copy(update=sizes)
        self.taps, self.max_depth = (tap,), given.num_heads
        heads = range(given.num_heads)
        self.blocks = nn.ModuleList(
            nn.Sequential(*(ResBlock(size) for _ in range(given.num_layers))) for _ in heads
        )
        if given.own_vocab_head:
            self.vocab_heads = nn.ModuleList(nn.Linear(size, drafted, bias=False) for _ in heads)
            if drafted < vocab:
                self.register_buffer("draft_ids", torch.zeros(drafted, dtype=torch.long))
            self.set_draft_vocab(torch.arange(drafted))

    def set_draft_vocab(self, tokens: Tensor) -> None:
        """Draft these target ids [D]; their logits start as the target's."""
        if self.options.draft_vocab_size < self.options.vocab_size:
            self.draft_ids.copy_(tokens)
        if (projection := self._target_parts[1]) is not None:
            own = projection.weight[tokens.to(projection.weight.device)]
            each = {f"{head}.weight": own for head in range(self.options.num_heads)}
            self.vocab_heads.load_state_dict(each)

    @property
    def token_map(self) -> Tensor | None:  # type: ignore[override]
        return self._buffers.get("draft_ids")

    def check_values(self, tensors: Mapping[str, Tensor]) -> None:
        if (ids := tensors.get("draft_ids")) is None:
            return
        if not 0 <= int(ids.min()) <= int(ids.max()) < self.options.vocab_size:
            raise ValueError(
                f"the draft vocabulary holds the target ids {int(ids.min())} to {int(ids.max())}, "
                f"but there are {self.options.vocab_size}"
            )
        if len(ids.unique()) < len(ids):
            raise ValueError("the draft vocabulary holds a target id twice; copy the file again")

    @classmethod
    def target_facts(cls, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        read = {"hidden_size": "blocks.0.0.linear.bias", "vocab_size": "vocab_heads.0.weight"}
        found = {fact: tensors[name] for fact, name in read.items() if name in tensors}
        return {fact: len(tensor) for fact, tensor in found.items() if tensor.ndim}

    def forward(self, feature: Tensor, num_heads: int | None = None) -> Tensor:
        """Logits [..., K, D]: head k guesses the token k + 2 places after the feature [..., H]."""
        heads = range(self.options.num_heads)[:num_heads]
        return torch.stack([self.guess(k, feature) for k in heads], -2)

    def guess(self, head: int, feature: Tensor) -> Tensor:
        """Logits [..., D] of one head."""
        project = self.vocab_heads[head] if self.options.own_vocab_head else self._target_parts[1]
        return project(self.blocks[head](feature))

    def candidates(self, batch: TrainingBatch, depth: int, width: int) -> Tensor:
        return self.likeliest(self(batch.hidden[self.taps[0]]), width)

    def guesses(self, batch: TrainingBatch, mask: Tensor) -> Tensor:
        guessed = self.guess(0, batch.hidden[self.taps[0]][mask])
        return self.spread(guessed, batch.target_logits.shape[-1])

    def loss(  # type: ignore[override]
        self,
        batch: TrainingBatch,
        decay: float = 0.8,
        objective: str = "cross_entropy",
        weighting: str = "decay",
    ) -> LossOutput:
        """An objective of every head: cross-entropy to the text (Medusa-1), or to the target."""
        states = batch.hidden[self.taps[0]]
        each = ((states, partial(self.guess, head)) for head in range(self.options.num_heads))
        levels = self.compared(batch, objective, each)
        found = chain_loss(levels, objective, decay, weighting)
        return replace(found, loss=found.loss * (decay if weighting == "decay" else 1))

    def describe(self, given: Mapping[str, Any]) -> dict[str, str]:
        said = super().describe(given)
        heads, layers = self.options.num_heads, self.options.num_layers
        said["drafts"] += f"; {heads} heads, so as many levels, of {layers} residual blocks each"
        return said


class MedusaDrafter(HeadDrafter):
    """Drafts a tree from one look at the target's last feature; it has no cache."""

    kind, title, head_class = "medusa", "Medusa heads", MedusaHeads
    shape_options: ClassVar[ShapeOptions] = ShapeOptions(
        {"nodes": "max_nodes"}, ("nodes",), ("choices", "acceptance")
    )
    engine_methods: ClassVar[Mapping[str, str]] = {"vllm": "medusa"}

    @classmethod
    def load(
        cls,
        target: Any,
        path: str = "demo",
        max_nodes: int | None = None,
        choices: Choices | None = None,
        acceptance: Sequence[Sequence[float]] | None = None,
        children: str = "top",
        width: int | None = None,
        compile: bool | str | None = None,
        force: bool = False,
    ) -> Self:
        """Load heads for a target, with the tree that is given, comes with them, or is best.

        The option `children` is that of `TreeShape`.

        Args:
            target: the model they draft for.
            path: folder or hub id in any known layout; "demo" for the embedded heads.
            max_nodes: compute the best tree of this many nodes; None takes the checkpoint's own
                tree where it has one, and 24 where not.
            choices: a tree of one's own, one list of ranks a node, or {stem, branches, depth} of a
                `delayed_tree`.
            acceptance: `[depth][rank]` that the computed tree is best for (`best_static_tree`);
                None for what was measured when the heads were trained.
            width: grow a dynamic tree of max_nodes nodes from the probabilities of every step, so
                many nodes a level and children of each; from max_nodes upwards it is the best of
                all trees (DDTree). None for a static tree.
            compile: True (Inductor), "graphs", "auto" or False; None for the target's own mode.
            force: take heads that were trained for another target of the same shape.
        """
        if width is not None and (choices is not None or acceptance is not None):
            raise ValueError(
                f"width is {width}, for a dynamic tree, but choices or acceptance are given, for a "
                "static one; leave out one of them"
            )
        heads, checkpoint = load_head(cls, target, path, force=force)
        mode, num_nodes = as_target(compile, target), 24 if max_nodes is None else max_nodes
        if width is not None:
            shape = TreeShape(heads.max_depth, width, num_nodes, children=children)
            return cls(heads, target.vocab_size, shape, mode)
        if choices is None and max_nodes is None and acceptance is None:
            choices = checkpoint.tree
        if choices is None:
            if acceptance is None:
                acceptance = checkpoint.training.get("acceptance_by_rank")
            if acceptance is None:
                acceptance = guessed_acceptance(heads.max_depth, 8)
            num_tokens = heads.options.draft_vocab_size or target.vocab_size
            ranks = [row[:num_tokens] for row in acceptance]
            choices = best_static_tree(ranks, num_nodes)
        shape = TreeShape(choices=choices, children=children)
        return cls(heads, target.vocab_size, shape, mode)

    def __init__(
        self, head: MedusaHeads, vocab_size: int, shape: TreeShape, compile: bool | str = False
    ) -> None:
        super().__init__(head, vocab_size, shape)
        self._feature = torch.empty(0, device=self.device)  # [B, H] where the root was sampled
        self._num_committed = torch.empty(0, dtype=torch.long, device=self.device)  # [B]
        self._compiled: Callable[..., list[Tensor]] | None = None
        if (mode := compile_mode(compile, self.device)) != "eager":
            example = next(head.parameters()).new_zeros(2, head.options.hidden_size)
            self._compiled = compile_head(
                head, mode, "guess", lambda h: [head(h)], [example], [[ROWS, None]]
            )

    def begin(
        self, prompts: Prompts, output: TargetOutput, sampler: Sampler, *, join: bool = False
    ) -> None:
        counts = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        rows = torch.arange(len(prompts), device=self.device)
        feature = output.hidden[self.taps[0]][rows, counts - 2]
        self._feature = torch.cat([self._feature, feature]) if join else feature
        self._num_committed = torch.cat([self._num_committed, counts]) if join else counts

    def propose(self, root: Tensor, budget: Sequence[int], sampler: Sampler) -> Draft:
        """Fill the tree with the heads' candidates; a level's nodes share their head's guess."""
        if max(budget) < 1:
            return Draft.empty(len(root), root.device)
        growth = self._new_growth(budget, sampler)
        with self.clock.forward():
            if self._compiled:
                (logits,) = self._compiled(self._feature)  # [B, levels, D]
            else:
                logits = self.head(self._feature, growth.num_levels)
        for level in range(growth.num_levels):
            self.add_level(growth, logits[:, level : level + 1])
        return growth.draft(budget)

    def observe(self, verdict: Verdict, committed: Tokens, hidden: dict[int, Tensor]) -> None:
        """Keep the feature where the new root was sampled: the old root's or the last node's."""
        path = pad(verdict.path + 1, (1, 0))  # [B, D + 1]; 0 is the root
        place = path.gather(1, verdict.num_accepted.unsqueeze(1)).squeeze(1)
        states = hidden[self.taps[0]]
        self._feature = states[torch.arange(len(states), device=self.device), place]
        self._num_committed = self._num_committed + verdict.num_accepted + 1

    def reorder(self, rows: Tensor) -> None:
        self._feature, self._num_committed = self._feature[rows], self._num_committed[rows]

    def forced(
        self, tokens: Tensor, hidden: dict[int, Tensor], depth: int, first: int
    ) -> Iterator[Tensor]:
        features = hidden[self.taps[0]][first : len(tokens) - 1]
        for level in range(min(depth, self.head.options.num_heads, len(features))):
            guessed = self.head.guess(level, features[: len(features) - level])
            yield self.head.spread(guessed, self.vocab_size)
