"""Drafting from the target's features: what EAGLE-1 and EAGLE-3 share, whatever their heads are.

Entry i of the draft cache pairs token t_{i+1} with the target's feature f_i and stands at rotary
position i; its output predicts token t_{i+2}. Committed entries hold true features only; a tree
grows behind them on the head's own outputs and is written over by the next step.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import gcd
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from specdec.common.arguments import require_counts
from specdec.demo import demo_path
from specdec.drafters.backbone import Backbone
from specdec.drafters.base import BaseDrafter, DraftShape, FixedShape, ShapeOptions
from specdec.drafters.heads import Head, load_head
from specdec.drafters.training import TrainingBatch, rollout
from specdec.drafters.tree_growth import (
    DynamicGrowth,
    Growth,
    StaticGrowth,
    TreeShape,
    child_scores,
)
from specdec.engine.interfaces import Prompts, TargetOutput
from specdec.engine.kv_cache import SlotCache
from specdec.engine.metrics import ForwardClock
from specdec.sampling.sampler import Sampler
from specdec.targets.attention import Masks
from specdec.verify import Draft, Verdict

# Long prompts are fed in chunks, which bounds the memory of masks and activations.
CHUNK = 1024
# Entries of a row that may wait while no draft is asked for.
MAX_PENDING = 256
# They are fed in parts, which bounds the cache of ragged rows.
CATCH_UP = 64


class FeatureHead(Head):
    """A head of one Llama layer that predicts the target's next feature.

    Attributes:
        config: the layer's config.
    """

    config: LlamaConfig

    def __init__(self, options: Mapping[str, Any], target_config: Any, *parts: Any) -> None:
        super().__init__(options, target_config, *parts)
        given = self.given(options)
        self.config = given.backbone.for_target(target_config)
        self.options = given.model_copy(update={"backbone": Backbone.of(self.config)})
        self.rotary = LlamaRotaryEmbedding(self.config)

    def fuse(self, hidden: dict[int, Tensor]) -> Tensor:
        """Turn the target's taps, each [..., H], into features [..., F]."""
        raise NotImplementedError

    def forward(
        self, tokens: Tensor, features: Tensor, positions: Tensor, mask: Any, cache: Any
    ) -> Tensor:
        """Outputs [B, n, F] that stand in for the features of the next tokens."""
        raise NotImplementedError

    def logits(self, outputs: Tensor) -> Tensor:
        """Outputs [..., F] to logits [..., D or V]."""
        raise NotImplementedError

    def carry(self, outputs: Tensor) -> Tensor:
        """Take the place of the target's feature one level deeper."""
        return outputs

    def spread(self, logits: Tensor, vocab_size: int) -> Tensor:
        """Logits [..., D] in the target's vocabulary: [..., V], -inf where the head has none."""
        if self.token_map is None:
            return logits
        whole = logits.new_full((*logits.shape[:-1], vocab_size), float("-inf"))
        return whole.index_copy(-1, self.token_map, logits)

    def candidates(self, batch: TrainingBatch, depth: int, width: int) -> Tensor:
        """Feed the head the text's tokens and its own outputs, and take its likeliest ids."""
        levels = []
        for outputs in rollout(self, batch.tokens, self.fuse(batch.hidden), depth):
            logits = self.logits(outputs)
            best = logits.topk(min(width, logits.shape[-1]), -1).indices
            levels.append(best if self.token_map is None else self.token_map[best])
        return torch.stack(levels, 2)

    def guesses(self, batch: TrainingBatch, mask: Tensor) -> Tensor:
        """Guess the token two places ahead of every place of a mask."""
        (outputs,) = rollout(self, batch.tokens, self.fuse(batch.hidden), 1)
        return self.spread(self.logits(outputs[mask]), batch.target_logits.shape[-1])

    @classmethod
    def target_facts(cls, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Sizes of a layer as wide as the target's, read off its matrices."""

        def rows(ending: str) -> int:
            found = [t.shape[0] for n, t in tensors.items() if n.endswith(ending) and t.ndim]
            return found[0] if found else 1

        queries, keys = rows("q_proj.weight"), rows("k_proj.weight")
        head_dim = gcd(queries, keys) or 1
        return {
            "hidden_size": rows("o_proj.weight"),
            "intermediate_size": rows("gate_proj.weight"),
            "num_attention_heads": queries // head_dim,
            "num_key_value_heads": keys // head_dim,
            "head_dim": head_dim,
        }

    def sizes(self) -> dict[str, int]:
        """Sizes of the layer and of what surrounds it."""
        layer = self.options.backbone
        return {
            "hidden_size": layer.hidden_size,
            "vocab_size": layer.vocab_size,
            "intermediate_size": layer.intermediate_size,
            "query_size": layer.num_attention_heads * layer.head_dim,
            "key_size": layer.num_key_value_heads * layer.head_dim,
            **super().sizes(),
        }

    def describe(self, given: Mapping[str, Any]) -> dict[str, str]:
        """Describe the head, and its layer where the checkpoint states facts of it."""
        said = super().describe(given)
        layer = dict(given.get("backbone") or {})
        if not layer:
            return said | {"layer": f"{said['layer']}, the rest as the target"}
        facts = layer | layer.pop("rope_parameters", {})
        return said | {"layer": ", ".join(f"{name} {value}" for name, value in facts.items())}


class Pending:
    """Committed tokens [B, n] of some steps with their taps, in ragged rows.

    Steps that draft nothing only add to it, so that they cost what plain decoding costs.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, dict[int, Tensor], list[int]]] = []
        self.num_columns = 0  # of all parts; no row has more entries

    def add(self, tokens: Tensor, taps: dict[int, Tensor], counts: Sequence[int]) -> None:
        """Add a step: tokens [B, n], each tap [B, n, H]; the first `counts[b]` of row b count."""
        self._parts.append((tokens, taps, list(counts)))
        self.num_columns += tokens.shape[1]

    def join(self, num_rows: int) -> None:
        """Let rows without an entry come behind the others."""

        def longer(values: Tensor) -> Tensor:
            return torch.cat([values, values.new_zeros(num_rows, *values.shape[1:])])

        self._parts = [
            (longer(tokens), {tap: longer(h) for tap, h in taps.items()}, counts + [0] * num_rows)
            for tokens, taps, counts in self._parts
        ]

    def reorder(self, rows: Tensor) -> None:
        """Keep these rows."""
        kept = rows.tolist()
        self._parts = [
            (tokens[rows], {tap: h[rows] for tap, h in taps.items()}, [counts[row] for row in kept])
            for tokens, taps, counts in self._parts
        ]

    def take(self) -> tuple[Tensor, dict[int, Tensor], list[int]]:
        """All parts as one, every row's entries moved up behind each other; forgets them."""
        parts, self._parts, self.num_columns = self._parts, [], 0
        if len(parts) == 1:
            return parts[0]
        tokens = torch.cat([part[0] for part in parts], 1)
        taps = {tap: torch.cat([part[1][tap] for part in parts], 1) for tap in parts[0][1]}
        counts = [sum(row) for row in zip(*(part[2] for part in parts), strict=True)]
        if min(counts) == tokens.shape[1]:
            return tokens, taps, counts
        is_padding = [
            torch.arange(part.shape[1]) >= torch.tensor(lengths).unsqueeze(1)
            for part, _, lengths in parts
        ]
        # A stable sort moves padding to the end and keeps the order of the entries.
        order = torch.cat(is_padding, 1).to(torch.uint8).argsort(dim=1, stable=True)
        order = order[:, : max(counts)].to(tokens.device)  # [B, longest]
        taps = {
            tap: h.gather(1, order.unsqueeze(2).expand(-1, -1, h.shape[2]))
            for tap, h in taps.items()
        }
        return tokens.gather(1, order), taps, counts


class FeatureDrafter(BaseDrafter):
    """Drafts trees with a head that reads the target's hidden states.

    Args:
        head: in eval mode, on the target's device.
        vocab_size: V of the target.
        shape: the tree.
        window: committed entries that the head may look back at; None for all of them. A head
            that was trained on short texts keeps its acceptance on long ones with a window of
            its trained length, because rotary positions matter by their distance only.
    """

    trained_as = "head"
    shape_options: ClassVar[ShapeOptions] = ShapeOptions(
        {"depth": "depth", "width": "width", "nodes": "max_nodes"}, ("chain", "tree"), ("choices",)
    )

    @classmethod
    def load(
        cls,
        target: Any,
        path: str = "demo",
        depth: int = 5,
        width: int = 8,
        max_nodes: int = 24,
        choices: Sequence[Sequence[int]] | None = None,
        children: str = "top",
        window: int | None = None,
        force: bool = False,
    ) -> Self:
        """Load a head for a target; options from depth to children are those of `TreeShape`.

        Args:
            target: the model it drafts for.
            path: folder or hub id in any known layout; "demo" for the embedded head.
            window: see the class.
            force: take a head that was trained for another target of the same shape.
        """
        shape = TreeShape(depth, width, max_nodes, choices, children)
        where = str(demo_path(cls.kind)) if path == "demo" else path
        head: Any = load_head(cls.kind, target, where, force=force)[0]
        return cls(head, target.vocab_size, shape, window)

    def __init__(
        self, head: FeatureHead, vocab_size: int, shape: TreeShape, window: int | None = None
    ) -> None:
        require_counts(2**30, window=window)
        self.head, self.vocab_size, self.shape, self.window = head, vocab_size, shape, window
        self.taps, self.children = head.taps, shape.children
        self.device = next(head.parameters()).device
        self.clock = ForwardClock(self.device)
        ids = head.token_map
        num_tokens = vocab_size if ids is None else len(ids)
        self._static = shape.static_plan(num_tokens, self.device) if shape.is_static else None
        self.max_nodes = self._static.num_nodes if self._static else shape.max_nodes
        self.makes_trees = not (self._static and self._static.is_chain)
        self._masks = Masks(_WindowConfig(window), self.device)
        self.cache = SlotCache(1, 1, 1, self.device)
        self._pending = Pending()
        self._reserved: int | None = None  # slots of the next batch's rows
        self._outputs = torch.empty(0, device=self.device)  # [B, F]
        self._num_committed = torch.empty(0, dtype=torch.long, device=self.device)  # [B]

    def begin(
        self, prompts: Prompts, output: TargetOutput, sampler: Sampler, *, join: bool = False
    ) -> None:
        """Feed every prompt's pairs of token and feature."""
        if join:
            self._pending.join(len(prompts))
        else:
            self._pending = Pending()
        running = self.cache if join else None  # or else it must not stay beside the new one
        outputs, num_committed = self._outputs, self._num_committed
        lengths = [len(prompt) - 1 for prompt in prompts]
        longest = max(lengths)
        capacity = max(2 * longest, 128) if self._reserved is None else self._reserved
        self.cache = SlotCache(1, len(prompts), max(longest, capacity), self.device)
        self._reserved = None
        rows = [[*p[1:], *[0] * (longest - n)] for p, n in zip(prompts, lengths, strict=True)]
        tokens = torch.tensor(rows, device=self.device)
        with self.clock.forward():
            features = self.head.fuse(output.hidden)  # [B, longest, F]
        self._outputs = features.new_zeros(len(prompts), self.head.config.hidden_size)
        self._num_committed = torch.tensor([len(p) for p in prompts], device=self.device)
        self._feed_in_parts(tokens, features, lengths, CHUNK)
        if running:
            running.append(self.cache)
            self.cache = running
            self._outputs = torch.cat([outputs, self._outputs])
            self._num_committed = torch.cat([num_committed, self._num_committed])

    def propose(self, root: Tensor, budget: Sequence[int], sampler: Sampler) -> Draft:
        """Grow a tree behind the root, each level one forward over the beam."""
        if max(budget) < 1:
            return Draft.empty(len(root), root.device)
        self._catch_up()
        growth = self._start_growth(max(budget), sampler)
        outputs = self._outputs.unsqueeze(1)  # [B, beam, F]
        with self.clock.forward():
            logits = self.head.logits(outputs)
        growth.add_level(*self._scores(logits, growth, sampler))
        while not growth.is_done:
            with self.clock.forward():
                outputs = self._feed_beam(outputs, growth.origin, *growth.newest)
                logits = self.head.logits(outputs)
            growth.add_level(*self._scores(logits, growth, sampler))
        return growth.draft(budget)

    def _start_growth(self, budget: int, sampler: Sampler) -> Growth:
        """Begin a tree without levels that the largest of the rows' budgets cannot pay for."""
        if self._static:
            return StaticGrowth(self._static, self.children, budget, sampler, self._num_committed)
        shape = self.shape
        return DynamicGrowth(shape.width, shape.max_nodes, min(shape.depth, budget))

    def observe(
        self, verdict: Verdict, committed: Sequence[Sequence[int]], hidden: dict[int, Tensor]
    ) -> None:
        """Keep the true features of the root and the accepted path until a draft is asked for."""
        if self._pending.num_columns >= MAX_PENDING:
            self._catch_up()
        num_new = max(map(len, committed))
        taps = {tap: hidden[tap] for tap in self.taps}
        if verdict.path.shape[1]:
            places = pad(verdict.path + 1, (1, 0)).clamp(min=0)  # [B, D + 1]
            places = places[:, :num_new].unsqueeze(2)
            taps = {
                tap: states.gather(1, places.expand(-1, -1, states.shape[2]))
                for tap, states in taps.items()
            }
        tokens = verdict.tokens[:, :num_new].clamp(min=0)
        self._pending.add(tokens, taps, [len(new) for new in committed])
        self._num_committed = self._num_committed + verdict.num_accepted + 1

    def reorder(self, rows: Tensor) -> None:
        """Keep these rows."""
        self.cache.reorder(rows)
        self._outputs, self._num_committed = self._outputs[rows], self._num_committed[rows]
        self._pending.reorder(rows)

    @property
    def draft_shape(self) -> DraftShape:
        """The shape of its drafts."""
        depth = min(self.shape.depth, self.max_nodes)
        width = self.shape.width if self.makes_trees else 1
        return DraftShape(depth, width, self.max_nodes, self.makes_trees)

    @property
    def fixed_shape(self) -> FixedShape | None:
        """The static tree; a dynamic one chooses its nodes."""
        return FixedShape(self._static.tree, self.children) if self._static else None

    def forced(
        self, tokens: Tensor, hidden: dict[int, Tensor], depth: int, first: int
    ) -> Iterator[Tensor]:
        """Run the head on its own outputs, at every place of a text at once."""
        row = {tap: states.unsqueeze(0) for tap, states in hidden.items()}
        features = self.head.fuse(row)  # [1, L, F]
        num_levels = min(depth, len(tokens) - 1 - first)
        outputs = rollout(self.head, tokens.unsqueeze(0), features, num_levels, self.window)
        for level, states in enumerate(outputs):
            logits = self.head.logits(states[0, first : len(tokens) - 1 - level])
            yield self.head.spread(logits, self.vocab_size)

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values that are allocated now."""
        return self.cache.num_bytes

    def bytes_for(self, num_rows: int, num_slots: int) -> int:
        """Count the bytes for so many rows with so many committed tokens."""
        config = self.head.config
        dtype = next(self.head.parameters()).dtype
        heads = config.num_key_value_heads or config.num_attention_heads
        size = config.head_dim or config.hidden_size // config.num_attention_heads
        return num_rows * (num_slots + self._num_fed) * 2 * heads * size * dtype.itemsize

    def reserve(self, num_rows: int, num_slots: int, *, join: bool) -> None:
        """Allocate exactly this much for the next batch, or for the running one."""
        # What joins is cached apart at first, as tightly as it can be.
        self._reserved = 0 if join else num_slots + self._num_fed
        if join:
            self.cache.resize(num_rows, num_slots + self._num_fed)
        else:
            self.cache = SlotCache(1, 1, 1, self.device)

    def wipe(self, rows: Sequence[int]) -> None:
        """Zero rows that may hold NaN."""
        self.cache.wipe(rows)

    @property
    def _num_fed(self) -> int:
        """Entries that stand behind the committed ones at most."""
        tree = self._static.num_nodes if self._static else self.shape.width * self.shape.depth
        return max(CATCH_UP, tree)

    def _catch_up(self) -> None:
        """Feed what is committed but not cached."""
        if not self._pending.num_columns:
            return
        tokens, taps, counts = self._pending.take()
        with self.clock.forward():
            features = self.head.fuse(taps)
        self._feed_in_parts(tokens, features, counts, CATCH_UP)

    def _feed_in_parts(
        self, tokens: Tensor, features: Tensor, counts: Sequence[int], size: int
    ) -> None:
        for start in range(0, max(counts), size):
            end = min(start + size, max(counts))
            left = [min(max(n - start, 0), end - start) for n in counts]
            self._feed(tokens[:, start:end], features[:, start:end], left)

    def _feed(self, tokens: Tensor, features: Tensor, counts: Sequence[int]) -> None:
        """Cache the first `counts[b]` of the pairs [B, n]; keep the last ones' outputs [B, F]."""
        width = tokens.shape[1]
        self.cache.open(width)
        offsets = torch.arange(width, device=self.device)
        positions = self.cache.device_lengths.unsqueeze(1) + offsets
        mask = self._masks.chain(self.cache, width)
        with self.clock.forward():
            outputs = self.head(tokens, features, positions, mask, self.cache)
        self.cache.extend(counts)
        fed = torch.tensor(counts, device=self.device)
        last = outputs[torch.arange(len(counts), device=self.device), (fed - 1).clamp(min=0)]
        self._outputs = torch.where((fed > 0).unsqueeze(1), last, self._outputs)

    def _feed_beam(
        self, outputs: Tensor, origin: Tensor, tokens: Tensor, visible: Tensor, levels: Tensor
    ) -> Tensor:
        """One level: the newest beam on its parents' outputs [B, beam before, F]."""
        batch, num_new, num_open = visible.shape
        index = origin.unsqueeze(2).expand(-1, -1, outputs.shape[2])
        features = self.head.carry(outputs.gather(1, index))
        self.cache.open(num_new, behind=num_open - num_new)
        newest = levels[num_open - num_new :]
        positions = self.cache.device_lengths.unsqueeze(1) + newest
        # A window counts committed entries: the whole tree looks back from the last of them, so
        # that deep nodes see no fewer than shallow ones, and always their own path.
        places = torch.full_like(levels, -1).expand(batch, -1)
        mask = self._masks.tree(self.cache, visible, places)
        return self.head(tokens, features, positions, mask, self.cache)

    def _scores(
        self, logits: Tensor, growth: Growth, sampler: Sampler
    ) -> tuple[Tensor, Tensor | None]:
        """Scores of the candidates, and the token ids of their columns if they are not ids."""
        if sampler.is_plain and self.children == "top":
            return logits, self.head.token_map
        return child_scores(growth, self.head.spread(logits, self.vocab_size), sampler), None


class _WindowConfig:
    """The one thing that masks ask of a config."""

    layer_types = None

    def __init__(self, window: int | None) -> None:
        self.sliding_window = window
