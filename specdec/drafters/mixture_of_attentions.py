"""Mixture of Attentions: a drafter that attends to what the target's cache holds of the text.

A layer over the target's *layers* turns the keys and values of each verified token into one state.
Drafting, a self-attention layer reads all tokens, drafts included, and a cross-attention layer the
states of verified tokens alone, so that nothing a drafted token lacks is missed.

Entry i of the draft cache pairs token t_i with the state of token i - 1, at rotary positions i and
i - 1; its output predicts t_{i+1}. No state comes before the first token.

Source: arXiv 2410.03804.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import gcd
from typing import Any, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import pad, smooth_l1_loss
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from specdec.common.config import Config
from specdec.drafters.feature_head import (
    CHUNK,
    Backbone,
    DraftLayer,
    FeatureDrafter,
    FeatureHead,
    norm,
)
from specdec.drafters.heads import Layer
from specdec.drafters.training import LossOutput, TrainingBatch, shifted
from specdec.drafters.training import objective as objective_of
from specdec.engine.interfaces import KEYS_VALUES
from specdec.engine.kv_cache import SlotCache
from specdec.targets.attention import Masks, grouped_attention
from specdec.targets.taps import key_value_sizes


class MixtureOptions(Config):
    """The options of a head; None in a backbone follows the target in the paper's proportions."""

    backbone: Backbone = Backbone()  # of self-attention
    cross: Backbone = Backbone()  # of cross-attention; None follows self-attention
    layers: Backbone = Backbone()  # of the layer over the target's layers
    layer_self_attention: bool = Field(True, description="a layer over the target's layers")
    cross_attention: bool = Field(True, description="cross-attention to verified tokens")
    target_layers: Layer = 0  # last layers of the target that its output goes through, frozen


class _CrossLayer(DraftLayer):
    """A layer whose keys and values are of other states than its queries."""

    input_layernorm: nn.Module

    def forward(  # type: ignore[override]
        self, states: Tensor, others: Tensor, rotary: Any, behind: Any, mask: Tensor, cache: Any
    ) -> Tensor:
        """States and others [B, n, H], turned by `rotary` and `behind`, to [B, n, H]."""
        attention: Any = self.self_attn

        def heads(name: str, given: Tensor) -> Tensor:
            found = getattr(attention, f"{name}_proj")(self.input_layernorm(given))
            found = found.unflatten(-1, (-1, attention.head_dim))
            return getattr(attention, f"{name}_norm", nn.Identity())(found).transpose(1, 2)

        queries, keys = heads("q", states), heads("k", others)
        queries, _ = apply_rotary_pos_emb(queries, queries, *rotary)
        keys, _ = apply_rotary_pos_emb(keys, keys, *behind)
        keys, values = cache.update(keys, heads("v", others), attention.layer_idx)
        dropout = attention.attention_dropout if self.training else 0.0
        found, _ = grouped_attention(
            attention, queries, keys, values, mask, dropout, attention.scaling
        )
        states = states + attention.o_proj(found.flatten(2))
        return states + self.mlp(self.post_attention_layernorm(states))


class _Moved:
    """A cache whose layers have other numbers."""

    def __init__(self, cache: Any, by: int) -> None:
        self._cache, self._by = cache, by

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
        return self._cache.update(keys, values, layer + self._by)


def _check_layers(decoder: Any, num: int) -> None:
    """Refuse layers that cannot be run outside of their model."""
    config, layers = getattr(decoder, "config", None), getattr(decoder, "layers", nn.ModuleList())
    attention = getattr(config, "_attn_implementation", None) or ""
    faults = {
        "is not built as Llama": not hasattr(decoder, "rotary_emb") or not hasattr(decoder, "norm"),
        f"has only {len(layers)}": num > len(layers),
        "is not loaded whole": any(weight.is_meta for weight in layers.parameters()),
        "runs on another attention than sdpa": "sdpa" not in attention,
        "has sliding layers": getattr(config, "sliding_window", None) is not None,
    }
    for fault, is_so in faults.items():
        if is_so:
            raise ValueError(f"target_layers is {num} but the target {fault}; set it to 0")


class MixtureHead(FeatureHead):
    """The head. Its parameters are named as in the published code."""

    Options = MixtureOptions

    def __init__(self, options: Mapping[str, Any], target_config: Any, *parts: Any) -> None:
        given, like = self.given(options), Backbone().for_target(target_config)
        size, heads = like.hidden_size, like.num_attention_heads
        width, shared, _ = key_value_sizes(like)
        own = {"num_key_value_heads": gcd(heads, shared // 2 or 1)}
        own |= {"intermediate_size": 3 * size // 2}
        own |= given.backbone.model_dump(exclude_none=True)
        super().__init__({**options, "backbone": own}, target_config, *parts)
        filled = self.options.backbone.model_dump(exclude_none=True)
        over = {"hidden_size": width, "intermediate_size": 3 * width // 2}
        over |= {"num_attention_heads": heads, "num_key_value_heads": shared}
        over |= {"head_dim": max(2, width // heads // 2 * 2)}
        cross, layers = (
            Backbone(**{**filled, **changes, **each.model_dump(exclude_none=True)})
            for changes, each in (({}, given.cross), (over, given.layers))
        )
        sizes = {"backbone": size, "cross": size, "layers": width}
        for name, layer in zip(sizes, (self.options.backbone, cross, layers), strict=True):
            if layer.hidden_size != sizes[name]:
                raise ValueError(
                    f"{name}.hidden_size is {layer.hidden_size} but must be {sizes[name]}, as the "
                    "target's; leave it out"
                )
        self.options = self.options.model_copy(update={"cross": cross, "layers": layers})
        self._num_read, last = target_config.num_hidden_layers, given.target_layers
        self.taps = KEYS_VALUES, *sorted({self._num_read - last, self._num_read})
        self.taps = self.taps[not given.cross_attention :]  # the others are what the loss aims at
        own_layers = [self.options.backbone, cross][: 1 + given.cross_attention]
        self.cached_layers = [*own_layers, *[Backbone.of(like)] * last]
        self.num_layers = len(self.cached_layers)
        if last and parts:
            _check_layers(parts[2], last)
        self.self_attention = DraftLayer(self.config, size)
        self.self_attention.input_layernorm = norm(self.config)
        if given.cross_attention:
            config = cross.for_target(target_config)
            self.cross_attention = _CrossLayer(config, size, layer_idx=1)
            self.cross_attention.input_layernorm = norm(config)
            self.cross_rotary = LlamaRotaryEmbedding(config)
            self.Ekv2E = nn.Linear(width, size)
        if given.cross_attention and given.layer_self_attention:
            config = layers.for_target(target_config)
            self.layer_self_attention = DraftLayer(config, width)
            self.layer_self_attention.input_layernorm = norm(config)
            self.layer_self_attention.self_attn.is_causal = False
            self.layer_rotary = LlamaRotaryEmbedding(config)

    @classmethod
    def parts_of(cls, model: Any) -> tuple[Any, ...]:
        return *super().parts_of(model), getattr(model, "get_decoder", lambda: None)()

    @staticmethod
    def default_taps(num_layers: int) -> tuple[int, ...]:
        """Keys and values, and the last state, which the loss aims at."""
        return KEYS_VALUES, num_layers

    def fuse(self, hidden: dict[int, Tensor]) -> Tensor:
        """Turn keys and values [..., L * W] into states [..., H]; [..., 0] where none are read."""
        states, width = hidden[self.taps[0]], self.options.layers.hidden_size
        if not self.options.cross_attention:
            return states[..., :0]
        if states.shape[-1] != self._num_read * width:
            raise ValueError(
                f"the target caches {states.shape[-1]} numbers a token but the head reads "
                f"{self._num_read} layers of {width}; use one that was trained for this target"
            )
        parts = states.reshape(-1, self._num_read, width).split(CHUNK)
        return torch.cat([self._over_layers(part) for part in parts]).view(*states.shape[:-1], -1)

    def _over_layers(self, states: Tensor) -> Tensor:
        """Keys and values [n, L, W] of tokens to their states [n, H]."""
        if self.options.layer_self_attention:
            layer: Any = self.layer_self_attention
            places = torch.arange(states.shape[1], device=states.device).unsqueeze(0)
            rotary = self.layer_rotary(states, places)
            states = layer(layer.input_layernorm(states), states, rotary, None, None)
        mixed: Tensor = self.Ekv2E(states.mean(1))
        return mixed

    def forward(
        self, tokens: Tensor, features: Tensor, positions: Tensor, mask: Any, cache: Any
    ) -> Tensor:
        states = self._draft(tokens, features, positions, mask, cache)
        return self._finish(states, positions, mask, cache)

    def _draft(
        self, tokens: Tensor, features: Tensor, positions: Tensor, mask: Any, cache: Any
    ) -> Tensor:
        """Outputs [B, n, H] that the target's last layers go on from, or its projection."""
        own, verified = mask
        layer: Any = self.self_attention
        states = self._target_parts[0](tokens)
        rotary = self.rotary(states, positions)
        states = layer(layer.input_layernorm(states), states, rotary, own, cache)
        if self.options.cross_attention:
            # Nothing is there before the first token; what attends to zeros adds nothing.
            features = features * (positions > 0).unsqueeze(-1)
            turns = (self.cross_rotary(states, places) for places in (positions, positions - 1))
            states = self.cross_attention(states, features, *turns, verified, cache)
        return states

    def _finish(self, states: Tensor, positions: Tensor, mask: Any, cache: Any) -> Tensor:
        """Go through the target's last layers, over the drafter's own tokens, and its norm."""
        if not (last := self.options.target_layers):
            return states
        decoder = self._target_parts[2]
        rotary = decoder.rotary_emb(states, positions)
        held = _Moved(cache, self.num_layers - self._num_read)
        for layer in decoder.layers[-last:]:
            states = layer(states, mask[0], positions, held, position_embeddings=rotary)
        normed: Tensor = decoder.norm(states)
        return normed

    def logits(self, outputs: Tensor) -> Tensor:
        return self._target_parts[1](outputs)

    def shown(self, mask: Tensor, num_committed: int) -> Any:
        own = mask[None, None]
        is_committed = torch.arange(own.shape[-1], device=own.device) < num_committed
        return own, _verified(own & is_committed)

    def rollout(
        self, tokens: Tensor, features: Tensor, num_steps: int, window: int | None = None
    ) -> Iterator[Tensor]:
        tokens, features = pad(tokens, (1, 0)), pad(features, (0, 0, 1, 0))
        for outputs in super().rollout(tokens, features, num_steps, window):
            yield outputs[:, 1:]  # place i begins with entry i + 1

    def loss(  # type: ignore[override]
        self,
        batch: TrainingBatch,
        min_segment: int = 6,
        max_segment: int = 14,
        staircase: float = 0.25,
        cross_entropy_weight: float = 0.1,
        objective: str = "forward_kl",
    ) -> LossOutput:
        """Smooth L1 to the target's last state, and an objective, by the weight of that name.

        With `target_layers`, half of the first is to the state that goes into these layers.
        A row is cut into segments of a length that it draws; a place sees the states up to the
        first one of its segment, as a draft does. With the chance `staircase`, which the paper lets
        fall from 1 to 0 over half of the training, it sees its own segment's tokens alone.
        """
        if not 1 <= min_segment <= max_segment or not 0 <= staircase <= 1:
            raise ValueError(
                f"loss has min_segment {min_segment}, max_segment {max_segment} and staircase "
                f"{staircase}; segments must be 1 or longer, min no more than max, and staircase "
                "within 0 and 1"
            )
        (rows, length), device = batch.tokens.shape, batch.tokens.device
        lengths = torch.randint(min_segment, max_segment + 1, (rows, 1), device=device)
        entries = torch.arange(length, device=device)
        first = (entries - 1) // lengths * lengths + 1  # [B, L] entry of each one's segment
        is_cut = torch.rand(rows, 1, 1, device=device) < staircase
        own = (entries <= entries.unsqueeze(1)) & (
            ~is_cut | (first.unsqueeze(2) == first.unsqueeze(1))
        )
        seen = entries <= first.unsqueeze(2)
        features = pad(self.fuse(batch.hidden)[:, :-1], (0, 0, 1, 0))
        masks = own.unsqueeze(1), _verified(seen.unsqueeze(1))
        places, cache = entries.expand(rows, -1), DynamicCache()
        states = self._draft(batch.tokens, features, places, masks, cache)
        outputs = self._finish(states, places, masks, cache)
        mask = shifted(batch.loss_mask, 1) & (entries > 0)
        predicted = outputs[mask]  # [places, H]
        goal, tokens = batch.target_logits[mask], shifted(batch.tokens, 1)[mask]
        token_part = objective_of(objective, self.logits(predicted), goal, tokens)
        feature_part = token_part.new_zeros(())
        if len(predicted):
            feature_part = smooth_l1_loss(predicted, batch.hidden[self.taps[-1]][mask])
            if self.options.target_layers:
                aim = batch.hidden[self.taps[-2]][mask]
                feature_part = (feature_part + smooth_l1_loss(states[mask], aim)) / 2
        return LossOutput(
            feature_part + cross_entropy_weight * token_part,
            {"feature": feature_part.detach(), objective: token_part.detach()},
        )

    @classmethod
    def target_facts(cls, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Sizes of self-attention and of the target's keys and values, read off the matrices."""
        name = "self_attention."
        facts = super().target_facts({n: t for n, t in tensors.items() if n.startswith(name)})
        if (mixes := tensors.get("Ekv2E.weight")) is not None and mixes.ndim == 2:
            facts["num_key_value_heads"] = max(1, mixes.shape[1] // (2 * facts["head_dim"]))
        return facts

    def describe(self, given: Mapping[str, Any]) -> dict[str, str]:
        said = super().describe(given)
        if self.options.cross_attention:
            said["reads"] = "keys and values of all layers of the target"
        return said


def _verified(mask: Tensor) -> Tensor:
    """Hide the first entry, which has no state, where any other one is seen."""
    others = mask[..., 1:]
    return torch.cat([~others.any(-1, keepdim=True), others], -1)


class _PairedMasks(Masks):
    """The masks of self-attention and of cross-attention, which sees no draft."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.may_be_none = False

    def chain(self, cache: SlotCache, num_new: int) -> Any:
        mask = super().chain(cache, num_new)
        return mask, _verified(mask)

    def tree(self, cache: SlotCache, own: Tensor, depths: Tensor) -> Any:
        committed = super().tree(cache, torch.zeros_like(own), depths)
        return super().tree(cache, own, depths), _verified(committed)


class MixtureDrafter(FeatureDrafter):
    """Drafts trees with a Mixture of Attentions head; it is not compiled."""

    kind, title, head_class = "mixture_of_attentions", "Mixture of Attentions head", MixtureHead
    _masks_class, _first = _PairedMasks, 0

    @classmethod
    def load(  # type: ignore[override]
        cls,
        target: Any,
        path: str,
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
            path: folder or hub id; none is embedded.
        """
        shape = depth, width, max_nodes, choices, children
        return super().load(target, path, *shape, window, compile=False, force=force)
