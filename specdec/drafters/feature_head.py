"""Drafting from the target's features: what EAGLE-1 and EAGLE-3 share, whatever their heads are.

Entry i of the draft cache pairs token t_{i+1} with the target's feature f_i and stands at rotary
position i; its output predicts token t_{i+2}. Committed entries hold true features only; a tree
grows behind them on the head's own outputs and is written over by the next step.
"""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Protocol, Self, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from specdec.common.arguments import require_counts
from specdec.demo import demo_path
from specdec.drafters.forced import FixedShape
from specdec.drafters.heads import load_head
from specdec.drafters.training import rollout
from specdec.drafters.tree_growth import TreeShape, start_growth
from specdec.engine.clock import ForwardClock
from specdec.engine.interfaces import Prompts, TargetOutput
from specdec.engine.kv_cache import SlotCache
from specdec.sampling.sampler import Sampler
from specdec.targets.attention import NAME as ATTENTION
from specdec.targets.masks import Masks
from specdec.verify import Draft, Verdict

Part = tuple[Tensor, dict[int, Tensor], list[int]]


class Pending:
    """What some steps committed: parts of [B, n] tokens with their taps, ragged rows.

    Steps that draft nothing only add to it, so that they cost what plain decoding costs.
    """

    def __init__(self) -> None:
        self._parts: list[Part] = []
        self.num_columns = 0  # of all parts; no row has more entries

    def add(self, tokens: Tensor, taps: dict[int, Tensor], counts: Sequence[int]) -> None:
        """Add a step: tokens [B, n], each tap [B, n, H]; the first `counts[b]` of row b count."""
        self._parts.append((tokens, taps, list(counts)))
        self.num_columns += tokens.shape[1]

    def clear(self) -> None:
        """Forget everything."""
        self._parts, self.num_columns = [], 0

    def join(self, num_rows: int) -> None:
        """Rows without an entry come behind the others."""
        if not self._parts:
            return
        tokens, taps, counts = self.take()
        taps = {tap: _with_rows(states, num_rows) for tap, states in taps.items()}
        self.add(_with_rows(tokens, num_rows), taps, [*counts, *[0] * num_rows])

    def reorder(self, rows: Tensor) -> None:
        """Keep these rows."""
        if not self._parts:
            return
        tokens, taps, counts = self.take()
        kept = [counts[row] for row in rows.tolist()]
        self.add(tokens[rows], {tap: states[rows] for tap, states in taps.items()}, kept)

    def take(self) -> Part:
        """All parts as one, every row's entries moved up behind each other; forgets them."""
        parts = self._parts
        self.clear()
        if len(parts) == 1:
            return parts[0]
        tokens = torch.cat([part[0] for part in parts], 1)
        taps = {tap: torch.cat([part[1][tap] for part in parts], 1) for tap in parts[0][1]}
        counts = [sum(row) for row in zip(*(part[2] for part in parts), strict=True)]
        if min(counts) == tokens.shape[1]:
            return tokens, taps, counts
        index = _places(parts, max(counts)).to(tokens.device)  # [B, longest]
        tokens = tokens.gather(1, index)
        taps = {tap: _gather(states, index) for tap, states in taps.items()}
        return tokens, taps, counts


def _with_rows(values: Tensor, num_rows: int) -> Tensor:
    """Rows of zeros behind those of [B, ...]."""
    return torch.cat([values, values.new_zeros(num_rows, *values.shape[1:])])


def _places(parts: list[Part], width: int) -> Tensor:
    """The columns of every row's entries, 0 padded."""
    rows: list[list[int]] = [[] for _ in parts[0][2]]
    first = 0
    for tokens, _, counts in parts:
        for row, count in zip(rows, counts, strict=True):
            row.extend(range(first, first + count))
        first += tokens.shape[1]
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])


def _gather(states: Tensor, index: Tensor) -> Tensor:
    """Entries [B, n, H] at index [B, m]."""
    return states.gather(1, index.unsqueeze(2).expand(-1, -1, states.shape[2]))


# Long prompts are fed in chunks, which bounds the memory of masks and activations.
CHUNK = 1024
# Entries of a row that may wait while no draft is asked for.
MAX_PENDING = 256
# They are fed in parts, which bounds the cache of ragged rows.
CATCH_UP = 64


class FeatureHead(Protocol):
    """What the drafter asks of a head."""

    config: LlamaConfig
    taps: tuple[int, ...]
    token_map: Tensor | None  # [D] target ids of a reduced draft vocabulary, or None

    def fuse(self, hidden: dict[int, Tensor]) -> Tensor:
        """The target's taps, each [..., H], as features [..., F]."""

    def __call__(
        self, tokens: Tensor, features: Tensor, positions: Tensor, mask: Any, cache: Any
    ) -> Tensor:
        """Outputs [B, n, F] that stand in for the features of the next tokens."""

    def logits(self, outputs: Tensor) -> Tensor:
        """Outputs [..., F] to logits [..., D or V]."""

    def carry(self, outputs: Tensor) -> Tensor:
        """What takes the place of the target's feature one level deeper."""


class FeatureDrafter:
    """Drafts trees with a head that reads the target's hidden states.

    Args:
        head: in eval mode, on the target's device.
        vocab_size: V of the target.
        shape: the tree.
        window: committed entries that the head may look back at; None for all of them. A head
            that was trained on short texts keeps its acceptance on long ones with a window of
            its trained length, because rotary positions matter by their distance only.
    """

    kind = ""  # of `specdec.drafters.heads`
    shape_options: ClassVar[frozenset[str]] = frozenset(
        ("depth", "width", "max_nodes", "choices", "children")
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
        """Load a head for a target.

        Args:
            target: what it drafts for.
            path: folder or hub id in any known layout; "demo" for the embedded head.
            depth: of the tree, and the options behind it: see `TreeShape`.
            width: see `TreeShape`.
            max_nodes: see `TreeShape`.
            choices: see `TreeShape`.
            children: see `TreeShape`.
            window: see the class.
            force: take a head that was trained for another target of the same shape.

        Raises:
            FileNotFoundError: no such checkpoint.
            ValueError: the checkpoint does not fit, or an option is out of its range.
        """
        shape = TreeShape(depth, width, max_nodes, choices, children)
        where = str(demo_path(cls.kind)) if path == "demo" else path
        head, _ = load_head(cls.kind, target, where, force=force)
        return cls(cast(FeatureHead, head), target.vocab_size, shape, window)

    def __init__(
        self, head: FeatureHead, vocab_size: int, shape: TreeShape, window: int | None = None
    ) -> None:
        require_counts(2**30, window=window)
        self.head, self.vocab_size, self.shape, self.window = head, vocab_size, shape, window
        self.taps = head.taps
        self.device = next(head.parameters()).device  # type: ignore[attr-defined]
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
            self._pending.clear()
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
        growth = start_growth(self.shape, self._static, max(budget), sampler, self._num_committed)
        outputs = self._outputs.unsqueeze(1)  # [B, beam, F]
        with self.clock.forward():
            logits = self.head.logits(outputs)
        growth.add_level(*self._scores(logits, None, sampler))
        while not growth.is_done:
            with self.clock.forward():
                outputs = self._feed_beam(outputs, growth.origin, *growth.newest)
                logits = self.head.logits(outputs)
            growth.add_level(*self._scores(logits, growth, sampler))
        return growth.draft(budget)

    def observe(
        self, verdict: Verdict, committed: Sequence[Sequence[int]], hidden: dict[int, Tensor]
    ) -> None:
        """Keep the true features of the root and the accepted path until a draft is asked for."""
        if self._pending.num_columns >= MAX_PENDING:
            self._catch_up()
        num_new = max(map(len, committed))
        taps = {tap: hidden[tap] for tap in self.taps}
        if verdict.path.shape[1]:
            places = torch.nn.functional.pad(verdict.path + 1, (1, 0)).clamp(min=0)  # [B, D + 1]
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
    def children(self) -> str:
        """See `TreeShape`."""
        return self.shape.children

    @property
    def fixed_shape(self) -> FixedShape | None:
        """The static tree; a dynamic one chooses its nodes."""
        return FixedShape(self._static.tree, self.children) if self._static else None

    def forced(
        self, tokens: Tensor, hidden: dict[int, Tensor], depth: int, first: int
    ) -> Iterator[Tensor]:
        """See `Forced`: the head on its own outputs, at every place at once."""
        row = {tap: states.unsqueeze(0) for tap, states in hidden.items()}
        features = self.head.fuse(row)  # [1, L, F]
        num_levels = min(depth, len(tokens) - 1 - first)
        outputs = rollout(self.head, tokens.unsqueeze(0), features, num_levels, self.window)
        for level, states in enumerate(outputs):
            yield self._spread(self.head.logits(states[0, first : len(tokens) - 1 - level]))

    @property
    def cache_bytes(self) -> int:
        """See `HoldsCache`."""
        return self.cache.num_bytes

    def bytes_for(self, num_rows: int, num_slots: int) -> int:
        """See `HoldsCache`."""
        config = self.head.config
        dtype = next(self.head.parameters()).dtype  # type: ignore[attr-defined]
        heads = config.num_key_value_heads or config.num_attention_heads
        size = config.head_dim or config.hidden_size // config.num_attention_heads
        return num_rows * (num_slots + self._num_fed) * 2 * heads * size * dtype.itemsize

    def reserve(self, num_rows: int, num_slots: int, *, join: bool) -> None:
        """See `HoldsCache`."""
        # What joins is cached apart at first, as tightly as it can be.
        self._reserved = 0 if join else num_slots + self._num_fed
        if join:
            self.cache.resize(num_rows, num_slots + self._num_fed)
        else:
            self.cache = SlotCache(1, 1, 1, self.device)

    def wipe(self, rows: Sequence[int]) -> None:
        """See `HoldsCache`."""
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
        self, logits: Tensor, growth: Any, sampler: Sampler
    ) -> tuple[Tensor, Tensor | None]:
        """Scores of the candidates, and the token ids of their columns if they are not ids."""
        ids = self.head.token_map
        if sampler.is_plain and self.shape.children == "top":
            return logits, ids
        logits = self._spread(logits)
        if sampler.is_plain:
            return logits, None
        draft, rows = (None, None) if growth is None else growth.expanded()
        nodes = None if rows is None else rows.expand(len(logits), -1)
        return sampler.scores(logits, draft, nodes), None

    def _spread(self, logits: Tensor) -> Tensor:
        """Logits [..., D] in the target's vocabulary: [..., V], -inf where the head has none."""
        ids = self.head.token_map
        if ids is None:
            return logits
        whole = logits.new_full((*logits.shape[:-1], self.vocab_size), float("-inf"))
        return whole.index_copy(-1, ids, logits)


class _WindowConfig:
    """The one thing that masks ask of a config."""

    layer_types = None

    def __init__(self, window: int | None) -> None:
        self.sliding_window = window


_SHARED = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("rms_norm_eps", "max_position_embeddings", "vocab_size"),
)


def backbone_config(target_config: Any, **changes: Any) -> LlamaConfig:
    """A one-layer Llama config as wide as the target, with the target's rotary scaling.

    Args:
        target_config: the target's text config.
        changes: fields of `LlamaConfig` to set otherwise.

    Raises:
        ValueError: a change of no field, or one that contradicts the others.
    """
    unknown = sorted(set(changes) - set(LlamaConfig().to_dict()))
    if unknown:
        # LlamaConfig takes any name; a theta beside the target's parameters would do nothing.
        raise ValueError(
            f"backbone has {unknown[0]!r}, which is no field of LlamaConfig; check the spelling "
            "(rotary settings are one field, rope_parameters)"
        )
    fields: dict[str, Any] = {name: getattr(target_config, name, None) for name in _SHARED}
    if fields["intermediate_size"] is None:
        fields["intermediate_size"] = 4 * fields["hidden_size"]
    if fields["num_key_value_heads"] is None:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    fields["head_dim"] = getattr(target_config, "head_dim", None)
    fields = {name: value for name, value in fields.items() if value is not None}
    rope = _rope_parameters(target_config)
    if rope is not None:
        fields["rope_parameters"] = rope
    try:
        return LlamaConfig(**{**fields, "num_hidden_layers": 1, "hidden_act": "silu", **changes})
    except StrictDataclassError as error:
        reason = error.__cause__ or error
        raise ValueError(f"the head cannot use its options, backbone: {reason}") from error


def _rope_parameters(config: Any) -> dict[str, Any] | None:
    """The target's rotary parameters; of several kinds of layers, those of full attention."""
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return None
    rope = rope.get("full_attention", rope) if isinstance(rope, dict) else rope
    # Heads rotate all of each head, whatever share of it the target rotates.
    return {name: value for name, value in rope.items() if name != "partial_rotary_factor"}


class DraftAttention(LlamaAttention):
    """Llama attention whose queries, keys and values may read a wider input than it writes.

    Args:
        config: of the backbone.
        input_size: width of the input; None for the hidden size.
        qkv_bias: give queries, keys and values a bias.
    """

    def __init__(
        self, config: LlamaConfig, input_size: int | None = None, qkv_bias: bool = False
    ) -> None:
        config._attn_implementation = ATTENTION
        super().__init__(config, layer_idx=0)
        width = input_size or config.hidden_size
        for name in ("q_proj", "k_proj", "v_proj"):
            size = getattr(self, name).out_features
            setattr(self, name, nn.Linear(width, size, bias=qkv_bias))


class Rotary(LlamaRotaryEmbedding):
    """Llama's rotary embedding, whose frequencies are no parameters and never saved."""


__all__ = ["DraftAttention", "LlamaMLP", "LlamaRMSNorm", "Rotary", "backbone_config"]
