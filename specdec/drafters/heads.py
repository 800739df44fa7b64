"""Draft heads: what a trainable module says of itself, how it is built, loaded and drafted with."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from specdec.checkpoints import HeadCheckpoint, check_target, identify_target, read_head
from specdec.checkpoints.head import construct, take_tensors
from specdec.common.compile import CannotCompileError, Graphs, compile_bound
from specdec.common.config import Config, validated
from specdec.demo import MODELS, unpacked
from specdec.drafters.base import BaseDrafter, FixedShape
from specdec.drafters.training import Level, LossOutput, TrainingBatch, shifted
from specdec.drafters.tree_growth import (
    DynamicGrowth,
    Growth,
    StaticGrowth,
    StaticPlan,
    TreeShape,
)
from specdec.engine.metrics import ForwardClock
from specdec.registry import head_class
from specdec.sampling.sampler import Sampler
from specdec.targets.load import LOADING

# Far above any real size, and small enough that shapes of a damaged config still fit 64 bits.
Size = Annotated[int, Field(ge=1, le=2**28)]
Layer = Annotated[int, Field(ge=0, le=2**16)]


class Head(nn.Module):
    """A draft head that can be trained. Its class is all that the package knows of its kind.

    A checkpoint holds `options` as JSON and the module's `state_dict`; its shapes are those of the
    module that the options build.

    Args:
        options: fields of `Options`; what is left out follows the target.
        target_config: the target's text config.
        parts: `parts_of` the target, no parameters of the head; none where it is built for its
            shapes alone, on the meta device.
    """

    Options: ClassVar[type[Config]]  # a flag's description is what `specdec inspect` says of it
    options: Any  # all of them, none left to the target
    taps: tuple[int, ...]  # HF `hidden_states` indices that it reads
    max_depth: int | None = None  # levels that it can draft; None for any number
    token_map: Tensor | None = None  # [D] target ids of a reduced draft vocabulary
    unread: ClassVar[Mapping[str, str]] = {}  # flags that a serving engine drops without a word

    def __init__(self, options: Mapping[str, Any], target_config: Any, *parts: Any) -> None:
        super().__init__()
        # A tuple keeps the target's modules out of the head's parameters.
        self._target_parts: tuple[Any, ...] = parts or (None, None)

    @classmethod
    def parts_of(cls, model: Any) -> tuple[Any, ...]:
        """The target's input embedding, its vocabulary projection, and more that a head uses."""
        return model.get_input_embeddings(), model.get_output_embeddings()

    @classmethod
    def given(cls, options: Mapping[str, Any]) -> Any:
        """Check options from JSON, YAML or Python."""
        plain = {key: list(v) if isinstance(v, tuple) else v for key, v in options.items()}
        return validated(cls.Options, plain, "head option")

    @staticmethod
    def default_taps(num_layers: int) -> tuple[int, ...]:
        """Taps of a new head for a target with so many layers: the state after its final norm."""
        return (num_layers,)

    @classmethod
    def target_facts(cls, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Facts of the target's config as a head's tensors tell them, where nothing else does."""
        return {}

    def check_values(self, tensors: Mapping[str, Tensor]) -> None:
        """Refuse, with a ValueError, tensors of the right shapes whose values cannot be meant."""

    def spread(self, logits: Tensor, vocab_size: int) -> Tensor:
        """Logits [..., D] in the target's vocabulary: [..., V], -inf where the head has none."""
        if self.token_map is None:
            return logits
        whole = logits.new_full((*logits.shape[:-1], vocab_size), float("-inf"))
        return whole.index_copy(-1, self.token_map, logits)

    def likeliest(self, logits: Tensor, width: int) -> Tensor:
        """The target ids [..., width] of the best logits [..., D]."""
        best = logits.topk(min(width, logits.shape[-1]), -1).indices
        return best if self.token_map is None else self.token_map[best]

    def compared(
        self,
        batch: TrainingBatch,
        objective: str,
        outputs: Iterable[tuple[Tensor, Callable[[Tensor], Tensor]]],
        kept: Sequence[Tensor] | None = None,
    ) -> Iterator[Level]:
        """Put what is drafted at each level, given the text's own tokens, beside what is said.

        Of a level, outputs [B, L, ...] for t_{i+2+level} at place i, and what makes logits of them;
        `kept` are the places of each level that count, if not all do.
        What an own vocabulary cannot say is left out: what the head learned there would be noise.
        """
        ids = self.token_map
        if ids is not None:
            place = torch.full((self.sizes()["vocab_size"],), -1, device=ids.device)
            place[ids] = torch.arange(len(ids), device=ids.device)  # of an id in the own vocabulary
            best = batch.target_logits.argmax(-1)  # [B, L]
        for level, (states, logits) in enumerate(outputs):
            mask, tokens = (shifted(each, 2 + level) for each in (batch.loss_mask, batch.tokens))
            if kept is not None:
                mask = mask & torch.zeros_like(mask).index_fill(1, kept[level], True)
            if ids is not None:
                said = tokens if objective == "cross_entropy" else shifted(best, 1 + level)
                mask, tokens = mask & (place[said] >= 0), place[tokens]
            goal = shifted(batch.target_logits, 1 + level)[mask]  # [places, V]
            goal = goal if ids is None else goal[:, ids]
            yield Level(logits(states[mask]), goal, tokens[mask], mask)

    def loss(self, batch: TrainingBatch, **options: Any) -> LossOutput:
        """The loss that the head is trained with; a subclass names its options."""
        raise NotImplementedError

    @classmethod
    def loss_options(cls) -> dict[str, Any]:
        """Options of the loss with their defaults."""
        named = list(signature(cls.loss).parameters.values())[2:]
        return {option.name: option.default for option in named}

    def candidates(self, batch: TrainingBatch, depth: int, width: int) -> Tensor:
        """Likeliest ids [B, L, D, width]: at place i for t_{i+2}, t_{i+3}, ..., after the text.

        D is `depth`, or `max_depth` where the head is bound to one.
        """
        raise NotImplementedError

    def guesses(self, batch: TrainingBatch, mask: Tensor) -> Tensor:
        """Logits [places, V] for t_{i+2} at the places i of a mask [B, L].

        Tokens outside a reduced draft vocabulary are -inf.
        """
        raise NotImplementedError

    def sizes(self) -> dict[str, int]:
        known = self.options.model_dump(exclude_none=True)
        return {name: value for name, value in known.items() if name.endswith("_size")}

    def describe(self, given: Mapping[str, Any]) -> dict[str, str]:
        """Say what the head reads, drafts, consists of and has; a checkpoint states `given`."""
        fields, sizes = type(self.options).model_fields, self.sizes()
        flags = [f.description for name, f in fields.items() if getattr(self.options, name) is True]
        size = sizes.get("vocab_size")
        drafts = f"all {size:,} tokens" if size else "all tokens of the target"
        if size and (drafted := sizes.get("draft_vocab_size", size)) < size:
            drafts = f"{drafted:,} of {size:,} tokens"
        return {
            "reads": "the last hidden state of the target, behind its final norm",
            "drafts": drafts,
            "layer": f"width {sizes.get('hidden_size', '?')}",
            "has": ", ".join(filter(None, flags)) or "no optional parts",
        }


def build_head(kind: str, options: Mapping[str, Any], target: Any) -> Head:
    """Build a new head for an `HFTarget`, in float32 on its device."""
    head: Head = construct(kind, options, target.config, *head_class(kind).parts_of(target.model))
    return head.to(target.device)


def fill_head(head: Head, tensors: Mapping[str, Tensor], path: str) -> None:
    """Give a head its tensors, all of them and no others."""
    head.load_state_dict(take_tensors(path, tensors, head))


def load_head(
    drafter: type[BaseDrafter],
    target: Any,
    path: str,
    *,
    force: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Any, HeadCheckpoint]:
    """Load the head of a strategy for an `HFTarget`, in eval mode and the target's dtype.

    `path` is a folder or hub id in any known layout, or "demo" for the embedded head; `force` takes
    a head that was trained for another target of the same shape.
    """
    if path == "demo" and drafter.kind not in MODELS:
        raise ValueError(f"drafter {drafter.kind!r} needs the option 'path': none is embedded")
    target = getattr(target, "ends", target)  # a target of another engine loads them when asked
    checkpoint = read_head(unpacked(f"demo/{drafter.kind}" if path == "demo" else path))
    if head_class(checkpoint.kind) is not drafter.head_class:
        raise ValueError(
            f"{path!r} holds a head of the kind {checkpoint.kind!r}, not one of "
            f"{drafter.__name__}; load it with type={checkpoint.kind}"
        )
    check_target(checkpoint, identify_target(target), force=force)
    with LOADING:
        head = build_head(checkpoint.kind, checkpoint.options, target)
    fill_head(head, checkpoint.tensors, path)
    return head.to(dtype or target.model.dtype).eval(), checkpoint


def compile_head(
    head: Head,
    mode: str,
    name: str,
    function: Callable[..., list[Tensor]],
    inputs: Sequence[Tensor],
    sizes: Sequence[Sequence[str | None]],
    num_held: int = 0,
) -> Callable[..., list[Tensor]]:
    """Compile a function that reads a head, or run it as CUDA graphs.

    Heads of the same options have the same function of a name. The last `num_held` inputs are read
    and written where they are; the rest as in `compile_bound`.
    """
    if mode == "graphs":
        graphs = Graphs(function, inputs[0].device)
        end = len(inputs) - num_held
        return lambda *given: graphs(given[:end], given[end:])
    modules = [head, *(part for part in head._target_parts if part is not None)]
    try:
        with torch.no_grad():
            name = f"{name} of {type(head).__module__}.{type(head).__qualname__} {head.options!r}"
            return compile_bound(name, modules, function, inputs, sizes)
    except CannotCompileError as error:
        raise CannotCompileError(
            f"{type(head).__name__} cannot be compiled: {error}; give its drafter compile=False"
        ) from error


class HeadDrafter(BaseDrafter):
    """Drafts trees with a head.

    Args:
        head: in eval mode, on the target's device.
        vocab_size: V of the target.
        shape: the tree, no deeper than the head, where the head is bound to a depth.
    """

    trained_as = "head"
    plan: StaticPlan | None  # None for a dynamic tree
    _num_committed: Tensor  # [B] tokens of each row, which its randomness depends on

    def __init__(self, head: Any, vocab_size: int, shape: TreeShape) -> None:
        most = head.max_depth or shape.depth
        shape = replace(shape, depth=min(shape.depth, most))
        self.head, self.vocab_size, self.shape = head, vocab_size, shape
        self.taps, self.children = head.taps, shape.children
        self.device = next(head.parameters()).device
        self.clock = ForwardClock(self.device)
        self.plan, self.max_nodes, self.makes_trees = None, shape.max_nodes, True
        self.token_map: Tensor | None = head.token_map  # worked out once
        if shape.is_static:
            num_tokens = vocab_size if self.token_map is None else len(self.token_map)
            self.plan = StaticPlan(shape.static_tree(num_tokens, self.device))
            self.max_nodes, self.makes_trees = self.plan.num_nodes, not self.plan.is_chain
            if head.max_depth and (levels := self.plan.tree.depth) > most:
                raise ValueError(
                    f"the tree has {levels} levels but the head drafts {most}; choose a shallower "
                    "tree"
                )

    def add_level(self, growth: Growth, logits: Tensor) -> None:
        """Grow a level from logits [B, beam or 1, D], in the own vocabulary where it is enough."""
        if growth.sampler.is_plain and self.children == "top":
            growth.add_level(logits, self.token_map)
        else:
            growth.add_level(self.head.spread(logits, self.vocab_size))

    def _new_growth(self, budget: Sequence[int], sampler: Sampler) -> Growth:
        """Begin a draft of at most so many nodes a row."""
        if self.plan:
            counters = self._num_committed
            return StaticGrowth(self.plan, self.children, max(budget), sampler, counters)
        num_levels = min(self.shape.depth, max(budget))
        return DynamicGrowth(self.shape.width, self.max_nodes, num_levels, sampler)

    @property
    def fixed_shape(self) -> FixedShape | None:
        return FixedShape(self.plan.tree, self.children) if self.plan else None
