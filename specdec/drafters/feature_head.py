"""Drafting from the target's features: what EAGLE-1 and EAGLE-3 share, whatever their heads are.

Entry i of the draft cache pairs token t_{i+1} with the target's feature f_i and stands at rotary
position i; its output predicts token t_{i+2}. Committed entries hold true features only; a tree
grows behind them on the head's own outputs and is written over by the next step.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import gcd
from types import SimpleNamespace
from typing import Any, ClassVar, Self

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import field_validator
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from specdec.common.arguments import require_counts
from specdec.common.compile import as_target, compile_mode
from specdec.common.config import Config
from specdec.drafters.base import DraftShape, ShapeOptions, Tokens, in_parts, set_apart
from specdec.drafters.compiled_head import CompiledHead
from specdec.drafters.heads import Head, HeadDrafter, Size, load_head
from specdec.drafters.training import Level, TrainingBatch, shifted
from specdec.drafters.tree_growth import Choices, Growth, TreeShape
from specdec.engine.interfaces import Prompts, TargetOutput
from specdec.engine.kv_cache import SlotCache
from specdec.sampling.sampler import Sampler
from specdec.targets.attention import NAME as ATTENTION
from specdec.targets.attention import Masks
from specdec.verify import Draft, Verdict

# Long prompts are fed in chunks, which bounds the memory of masks and activations.
CHUNK = 1024
# Steps whose entries may wait while no draft is asked for.
MAX_PENDING = 256
# They are fed in parts, which bounds the cache of ragged rows.
CATCH_UP = 64
# Tokens of prompts that may wait with their taps: of all rows, as many as 32 have pending entries.
MAX_UNREAD = 32 * MAX_PENDING

_SHARED = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "rms_norm_eps", "max_position_embeddings", "vocab_size"),
)


class Backbone(Config):
    """Fields of `LlamaConfig` that a head may set otherwise than its target; None follows it."""

    hidden_size: Size | None = None
    intermediate_size: Size | None = None
    num_attention_heads: Size | None = None
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    hidden_act: str | None = None
    rms_norm_eps: float | None = None
    max_position_embeddings: Size | None = None
    vocab_size: Size | None = None
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    attention_dropout: float | None = None
    qk_norm: bool | None = None  # queries and keys of each head are normed, as Qwen3's

    @field_validator("hidden_act")
    @classmethod
    def _is_known(cls, name: str | None) -> str | None:
        if name is not None and name not in ACT2FN:
            raise ValueError("must be an activation that transformers has, such as silu")
        return name

    def for_target(self, target_config: Any) -> LlamaConfig:
        """A one-layer config as wide as the target, with the target's rotary scaling."""
        fields: dict[str, Any] = {name: getattr(target_config, name, None) for name in _SHARED}
        fields["intermediate_size"] = fields["intermediate_size"] or 4 * fields["hidden_size"]
        if fields["num_key_value_heads"] is None:
            fields["num_key_value_heads"] = fields["num_attention_heads"]
        if rope := getattr(target_config, "rope_parameters", None):
            # Of several kinds of layers, those of full attention; and heads rotate all of each
            # head, whatever share of it the target rotates.
            rope = dict(rope.get("full_attention", rope))
            rope.pop("partial_rotary_factor", None)
        fields |= {"rope_parameters": rope or None, "hidden_act": "silu"}
        fields |= self.model_dump(exclude_none=True, exclude={"qk_norm"})
        known = {name: value for name, value in fields.items() if value is not None}
        try:
            config = LlamaConfig(**known, num_hidden_layers=1)
        except StrictDataclassError as error:
            reason = error.__cause__ or error
            raise ValueError(f"the head cannot use its options, backbone: {reason}") from error
        config.qk_norm = bool(self.qk_norm)
        return config

    @classmethod
    def of(cls, config: LlamaConfig) -> "Backbone":
        """All fields of a config; biases, dropout and norms only where it has them."""
        fields = {name: getattr(config, name) for name in cls.model_fields}
        optional = ("attention_bias", "mlp_bias", "attention_dropout", "qk_norm")
        return cls(**{name: v for name, v in fields.items() if v or name not in optional})


class DraftLayer(nn.Module):
    """A Llama or Qwen3 layer whose attention may read a wider input than it writes.

    Its caller norms the input.
    """

    def __init__(
        self, config: LlamaConfig, input_size: int, qkv_bias: bool = False, layer_idx: int = 0
    ) -> None:
        super().__init__()
        config._attn_implementation = ATTENTION
        attention: Any = Qwen3Attention if config.qk_norm else LlamaAttention
        self.self_attn = attention(config, layer_idx)
        for name in ("q_proj", "k_proj", "v_proj"):
            size = getattr(self.self_attn, name).out_features
            setattr(self.self_attn, name, nn.Linear(input_size, size, bias=qkv_bias))
        self.mlp = LlamaMLP(config)
        self.post_attention_layernorm = norm(config)

    def forward(
        self, states: Tensor, residual: Tensor, rotary: Any, mask: Any, cache: Any
    ) -> Tensor:
        """States [B, n, W] and residual [B, n, H] to [B, n, H]."""
        # By place, because transformers changed the name of the cache.
        states = residual + self.self_attn(states, rotary, mask, cache)[0]
        return states + self.mlp(self.post_attention_layernorm(states))


def norm(config: LlamaConfig, size: int | None = None) -> LlamaRMSNorm:
    """An RMS norm of the layer's width, or another one."""
    return LlamaRMSNorm(size or config.hidden_size, config.rms_norm_eps)


class FeatureHead(Head):
    """A head of Llama layers, of this config, that predicts the target's next feature."""

    config: LlamaConfig
    num_layers = 1
    cached_layers: Sequence[Backbone] = ()  # where they are not all like `config`
    is_recursive: ClassVar[bool] = True  # reads its own outputs, one forward a level

    def __init__(self, options: Mapping[str, Any], target_config: Any, *parts: Any) -> None:
        super().__init__(options, target_config, *parts)
        given = self.given(options)
        self.config = given.backbone.for_target(target_config)
        self.options = given.model_copy(update={"backbone": Backbone.of(self.config)})
        self.rotary = LlamaRotaryEmbedding(self.config)
        self.output_size = self.config.hidden_size  # F of its outputs

    def fuse(self, hidden: dict[int, Tensor]) -> Tensor:
        """Turn the target's taps, each [..., H], into features [..., F]."""
        raise NotImplementedError

    def resumed(self, features: Tensor, outputs: Tensor) -> Tensor:
        """Features [B, n, F] of committed tokens behind the one with these outputs [B, 1, F]."""
        return features

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

    def shown(self, mask: Tensor, num_committed: int) -> Any:
        """The mask that `forward` takes, of one [L, K] whose first columns are committed."""
        return mask[None, None]

    def rollout(
        self, tokens: Tensor, features: Tensor, num_steps: int, window: int | None = None
    ) -> Iterator[Tensor]:
        """Yield the outputs [B, L, F] of each step; step k at place i predicts t_{i+2+k}.

        A window bounds the places of the text [B, L] that the head may look back at.
        """
        length, cache = tokens.shape[1], DynamicCache()
        places = torch.arange(length, device=tokens.device).expand(tokens.shape)
        mask = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
        if window is not None:
            mask = mask.triu(1 - window)
        itself = torch.eye(length, dtype=torch.bool, device=tokens.device)
        for step in range(num_steps):
            shown = self.shown(mask, length)
            outputs = self(shifted(tokens, 1 + step), features, places + step, shown, cache)
            yield outputs
            features, mask = self.carry(outputs), torch.cat([mask, itself], 1)

    def levels(self, batch: TrainingBatch, num_steps: int, objective: str) -> Iterator[Level]:
        """The steps of the chains that begin at every place, given the text's own tokens."""
        if num_steps < 1:
            raise ValueError(f"loss.num_steps is {num_steps} but must be at least 1")
        steps = self.rollout(batch.tokens, self.fuse(batch.hidden), num_steps)
        return self.compared(batch, objective, ((outputs, self.logits) for outputs in steps))

    def candidates(self, batch: TrainingBatch, depth: int, width: int) -> Tensor:
        """Feed the head the text's tokens and its own outputs, and take its likeliest ids."""
        steps = self.rollout(batch.tokens, self.fuse(batch.hidden), depth)
        return torch.stack([self.likeliest(self.logits(each), width) for each in steps], 2)

    def guesses(self, batch: TrainingBatch, mask: Tensor) -> Tensor:
        (outputs,) = self.rollout(batch.tokens, self.fuse(batch.hidden), 1)
        return self.spread(self.logits(outputs[mask]), batch.target_logits.shape[-1])

    @classmethod
    def target_facts(cls, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Sizes of a layer as wide as the target's, read off its matrices."""

        matrices = {name: t for name, t in tensors.items() if name.endswith("_proj.weight")}
        rows = {name.split(".")[-2]: t.shape[0] for name, t in matrices.items() if t.ndim}
        queries, keys = rows.get("q_proj", 1), rows.get("k_proj", 1)
        head_dim = gcd(queries, keys) or 1
        return {
            "hidden_size": rows.get("o_proj", 1),
            "intermediate_size": rows.get("gate_proj", 1),
            "num_attention_heads": queries // head_dim,
            "num_key_value_heads": keys // head_dim,
            "head_dim": head_dim,
        }

    def sizes(self) -> dict[str, int]:
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
        said = super().describe(given)
        layer = dict(given.get("backbone") or {})
        if not layer:
            return said | {"layer": f"{said['layer']}, the rest as the target"}
        facts = layer | layer.pop("rope_parameters", {})
        return said | {"layer": ", ".join(f"{name} {value}" for name, value in facts.items())}


# Committed tokens [B, n] of a step and each of its taps [B, n, H], and how many count in each row.
Entries = tuple[list[Tensor], list[int]]


def merged(parts: Sequence[Entries]) -> Entries:
    """All parts as one, every row's entries moved up behind each other."""
    if len(parts) == 1:
        return parts[0]
    columns, lengths = zip(*parts, strict=True)
    values = [torch.cat(each, 1) for each in zip(*columns, strict=True)]
    counts = [sum(row) for row in zip(*lengths, strict=True)]
    is_padding = [
        torch.arange(tokens.shape[1]) >= torch.tensor(part).unsqueeze(1)
        for (tokens, *_), part in parts
    ]
    # A stable sort moves padding to the end and keeps the order of the entries.
    order = torch.cat(is_padding, 1).to(torch.uint8).argsort(dim=1, stable=True)
    order = order[:, : max(counts)].to(values[0].device)  # [B, longest]
    tokens, *taps = values
    taps = [torch.take_along_dim(tap, order.unsqueeze(2), 1) for tap in taps]
    return [tokens.gather(1, order), *taps], counts


class FeatureDrafter(HeadDrafter):
    """Drafts trees with a head that reads the target's hidden states.

    A `window` bounds the committed entries that the head may look back at. A head that was trained
    on short texts keeps its acceptance on long ones with a window of its trained length, because
    rotary positions matter by their distance only.
    """

    shape_options: ClassVar[ShapeOptions] = ShapeOptions(
        {"depth": "depth", "width": "width", "nodes": "max_nodes"}, ("chain", "tree"), ("choices",)
    )
    compiled_class: ClassVar[Any] = CompiledHead
    _masks_class: ClassVar[type[Masks]] = Masks
    _first: ClassVar[int] = 1  # token of the first entry; there is no feature before token 0

    @classmethod
    def load(
        cls,
        target: Any,
        path: str = "demo",
        depth: int = 5,
        width: int = 8,
        max_nodes: int = 24,
        choices: Choices | None = None,
        children: str = "top",
        window: int | None = None,
        compile: bool | str | None = None,
        force: bool = False,
    ) -> Self:
        """Load a head for a target; options from depth to children are those of `TreeShape`.

        Args:
            target: the model it drafts for.
            path: folder or hub id in any known layout; "demo" for the embedded head.
            window: latest tokens that the head looks back at; None for all.
            compile: True (Inductor), "graphs", "auto" or False; None for the target's own mode.
            force: take a head that was trained for another target of the same shape.
        """
        shape = TreeShape(depth, width, max_nodes, choices, children)
        head, _ = load_head(cls, target, path, force=force)
        return cls(head, target.vocab_size, shape, window, as_target(compile, target))

    def __init__(
        self,
        head: FeatureHead,
        vocab_size: int,
        shape: TreeShape,
        window: int | None = None,
        compile: bool | str = False,
    ) -> None:
        require_counts(2**30, window=window)
        super().__init__(head, vocab_size, shape)
        self.window = window
        self._masks = self._masks_class(SimpleNamespace(sliding_window=window), self.device)
        self.cache = SlotCache(head.num_layers, 1, 1, self.device)
        # Steps that draft nothing only add to it, so that they cost what plain decoding costs.
        self._pending: list[Entries] = []
        # Tokens [n] and each of the taps [n, H] of every row's prompt; empty once they are fed.
        self._prompts: list[list[Tensor]] = []
        self._reserved: int | None = None  # slots of the next batch's rows
        # The head's newest outputs [B, 1, F], and their logits where they are known.
        self._outputs = torch.empty(0, device=self.device)
        self._logits: Tensor | None = None
        self._compiled: Any = None
        if (mode := compile_mode(compile, self.device)) != "eager":
            self._compiled = self.compiled_class(head, window, mode)
            self._masks.may_be_none = False
        # Entries that stand behind the committed ones at most.
        tree = self.plan.num_nodes if self.plan else shape.width * shape.depth
        self._num_fed = max(CATCH_UP, tree)

    def begin(
        self, prompts: Prompts, output: TargetOutput, sampler: Sampler, *, join: bool = False
    ) -> None:
        """Keep every prompt's tokens and taps until a draft is asked for."""

        def longer(values: Tensor) -> Tensor:
            return torch.cat([values, values.new_zeros(len(prompts), *values.shape[1:])])

        lengths = [len(prompt) - self._first for prompt in prompts]
        default = max(2 * max(lengths), 128)
        capacity = default if self._reserved is None else max(*lengths, self._reserved)
        size = len(prompts), 1, self.head.output_size
        outputs = next(self.head.parameters()).new_zeros(size)
        cache = self._new_cache(len(prompts), capacity, join)
        self._reserved = self._logits = None
        if join:
            self.cache.append(cache)
            self._outputs = torch.cat([self._outputs, outputs])
        else:
            self.cache, self._outputs, self._pending, self._prompts = cache, outputs, [], []
        self._pending = [
            ([longer(value) for value in values], [*counts, *[0] * len(prompts)])
            for values, counts in self._pending
        ]
        for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            tokens = torch.tensor(prompt[self._first :], device=self.device)
            front = 1 - self._first
            taps = (output.hidden[tap][row, : length - front] for tap in self.taps)
            taps = (pad(tap, (0, 0, front, 0)) if front else tap.clone() for tap in taps)
            self._prompts.append([tokens, *taps])
        if sum(len(each[0]) for each in self._prompts if each) > MAX_UNREAD:
            self._feed_prompts()

    def catch_up(self) -> None:
        self._feed_prompts()

    def propose(self, root: Tensor, budget: Sequence[int], sampler: Sampler) -> Draft:
        """Grow a tree behind the root, each level one forward over the beam."""
        if max(budget) < 1:
            return Draft.empty(len(root), root.device)
        self._catch_up()
        growth = self._new_growth(budget, sampler)
        in_own_vocabulary = sampler.is_plain and self.children == "top"
        outputs, logits = self._outputs, self._logits  # [B, beam, F] and [B, beam, D or V]
        can_grow = self.head.is_recursive and (not self.plan or self.plan.is_chain)
        if self._compiled and in_own_vocabulary and can_grow:
            width = 1 if self.plan else self.shape.width
            with self.clock.forward():
                logits = self.head.logits(outputs) if logits is None else logits
                shape = width, growth.num_levels
                growth.take(self._compiled.grow(outputs, logits, self.cache, *shape))
            return growth.draft(budget)
        for level in range(growth.num_levels):
            with self.clock.forward():
                if level:
                    outputs, logits = self._feed_beam(outputs, growth)
                logits = self.head.logits(outputs) if logits is None else logits
            self.add_level(growth, logits)
        return growth.draft(budget)

    def observe(self, verdict: Verdict, committed: Tokens, hidden: dict[int, Tensor]) -> None:
        """Keep the true features of the root and the accepted path until a draft is asked for."""
        if len(self._pending) >= MAX_PENDING:
            self._catch_up()
        num_new = max(map(len, committed))
        taps = [hidden[tap] for tap in self.taps]
        if verdict.path.shape[1]:
            places = pad(verdict.path + 1, (1, 0)).clamp(min=0)  # [B, D + 1]
            places = places[:, :num_new].unsqueeze(2)
            taps = [torch.take_along_dim(tap, places, 1) for tap in taps]
        tokens = verdict.tokens[:, :num_new].clamp(min=0)
        self._pending.append(([tokens, *taps], [len(new) for new in committed]))

    def reorder(self, rows: Tensor) -> None:
        self.cache.reorder(rows)
        self._outputs, self._logits, kept = self._outputs[rows], None, rows.tolist()
        self._pending = [
            ([value[rows] for value in values], [counts[row] for row in kept])
            for values, counts in self._pending
        ]
        self._prompts = [self._prompts[row] for row in kept]

    @property
    def draft_shape(self) -> DraftShape:
        depth = min(self.shape.depth, self.max_nodes)
        width = self.shape.width if self.makes_trees else 1
        return DraftShape(depth, width, self.max_nodes, self.makes_trees)

    def forced(
        self, tokens: Tensor, hidden: dict[int, Tensor], depth: int, first: int
    ) -> Iterator[Tensor]:
        """Run the head on its own outputs, at every place of a text at once."""
        row = {tap: states.unsqueeze(0) for tap, states in hidden.items()}
        features = self.head.fuse(row)  # [1, L, F]
        num_levels = min(depth, len(tokens) - 1 - first)
        outputs = self.head.rollout(tokens.unsqueeze(0), features, num_levels, self.window)
        for level, states in enumerate(outputs):
            logits = self.head.logits(states[0, first : len(tokens) - 1 - level])
            yield self.head.spread(logits, self.vocab_size)

    @property
    def _num_committed(self) -> Tensor:  # type: ignore[override]
        return self.cache.device_lengths + self._first

    @property
    def cache_bytes(self) -> int:
        return self.cache.num_bytes

    def bytes_for(self, num_rows: int, num_slots: int) -> int:
        layers = self.head.cached_layers or [self.head.options.backbone] * self.head.num_layers
        dtype = next(self.head.parameters()).dtype
        size = sum(2 * layer.num_key_value_heads * layer.head_dim for layer in layers)
        return num_rows * (num_slots + self._num_fed) * size * dtype.itemsize

    def reserve(self, num_rows: int, num_slots: int, *, join: bool) -> None:
        num_slots += self._num_fed
        if join:
            self.cache.resize(num_rows, num_slots)
        else:
            self._reserved = num_slots
            self.cache = SlotCache(self.head.num_layers, 1, 1, self.device)

    def wipe(self, rows: Sequence[int]) -> None:
        self.cache.wipe(rows)

    def _catch_up(self) -> None:
        """Feed what is committed but not cached."""
        self._feed_prompts()
        if not self._pending:
            return
        (tokens, *taps), counts = merged(self._pending)
        self._pending = []
        with self.clock.forward():
            features = self.head.fuse(dict(zip(self.taps, taps, strict=True)))
        self._feed(tokens, features, counts, CATCH_UP)

    def _feed_prompts(self) -> None:
        """Feed the prompts that wait, without padding the rows whose prompts were fed before."""
        new = {row: prompt for row, prompt in enumerate(self._prompts) if prompt}
        if not new:
            return
        lengths = [len(tokens) for tokens, *_ in new.values()]
        columns = zip(*new.values(), strict=True)
        tokens, *taps = (pad_sequence(list(rows), batch_first=True) for rows in columns)
        with self.clock.forward():
            features = self.head.fuse(dict(zip(self.taps, taps, strict=True)))
        self._prompts = [[] for _ in self._prompts]
        running, outputs, rows = self.cache, self._outputs, torch.tensor([*new], device=self.device)
        others, order = set_apart([*new], len(self._prompts))
        capacity = max(lengths) if len(others) else max(*lengths, running.capacity)
        self.cache = self._new_cache(len(new), capacity, len(others) > 0)
        self._outputs = outputs[rows]
        self._feed(tokens, features, lengths, CHUNK)
        if len(others):
            running.reorder(others)
            running.append(self.cache)
            self.cache = running
        self.cache.reorder(order)
        self._outputs = outputs.index_copy(0, rows, self._outputs.to(outputs.dtype))
        self._logits = None

    def _new_cache(self, num_rows: int, num_slots: int, is_apart: bool) -> SlotCache:
        """Return an empty cache; captured graphs point to the storage of the old one."""
        if self._compiled and self._compiled.mode == "graphs" and not is_apart:
            self.cache.restart(num_rows, num_slots)
            return self.cache
        return SlotCache(self.head.num_layers, num_rows, num_slots, self.device)

    def _feed(self, tokens: Tensor, features: Tensor, counts: Sequence[int], size: int) -> None:
        """Cache the first `counts[b]` of the pairs [B, n]; keep the last ones' outputs."""
        for columns, left in in_parts(counts, size):
            new = tokens[:, columns]
            width = new.shape[1]
            self.cache.open(width)
            positions = self.cache.device_lengths.unsqueeze(1)
            positions = positions + torch.arange(width, device=self.device)
            mask = self._masks.chain(self.cache, width)
            fed = torch.tensor(left, device=self.device).unsqueeze(1)
            wanted = (fed - 1).clamp(min=0)
            shown = self.head.resumed(features[:, columns], self._outputs)
            with self.clock.forward():
                outputs, self._logits = self._run(new, shown, positions, mask, wanted)
            self.cache.extend(left)
            if min(left) == 0:
                is_fed = (fed > 0).unsqueeze(2)
                outputs, self._logits = torch.where(is_fed, outputs, self._outputs), None
            self._outputs = outputs

    def _feed_beam(self, outputs: Tensor, growth: Growth) -> tuple[Tensor, Tensor | None]:
        """One level: the newest beam on its parents' outputs [B, beam before, F]."""
        tokens, visible, levels = growth.newest
        features = self.head.carry(torch.take_along_dim(outputs, growth.origin.unsqueeze(2), 1))
        return self._feed_open(tokens, features, visible, levels)

    def _feed_open(
        self, tokens: Tensor, features: Tensor, visible: Tensor, levels: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Feed pairs [B, n] behind the committed ones, the last of S in all; see `newest`."""
        batch, num_new, num_open = visible.shape
        self.cache.open(num_new, behind=num_open - num_new)
        positions = self.cache.device_lengths.unsqueeze(1) + levels[num_open - num_new :]
        # A window counts committed entries: the whole tree looks back from the last of them, so
        # that deep nodes see no fewer than shallow ones, and always their own path.
        places = torch.full_like(levels, -1).expand(batch, -1)
        mask = self._masks.tree(self.cache, visible, places)
        wanted = torch.arange(num_new, device=self.device).expand(batch, -1)
        return self._run(tokens, features, positions, mask, wanted)

    def _run(
        self, tokens: Tensor, features: Tensor, positions: Tensor, mask: Tensor, wanted: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Run the head on [B, n] pairs; outputs of the `wanted` [B, w], and compiled, logits."""
        if self._compiled and self.cache.states and tokens.shape[1] <= CATCH_UP:
            return self._compiled.feed(tokens, features, positions, mask, wanted, self.cache)
        outputs = self.head(tokens, features, positions, mask, self.cache)
        return torch.take_along_dim(outputs, wanted.unsqueeze(2), 1), None
