"""EAGLE-3: a head of few layers on fused taps, with its own recurrent state and vocabulary.

Source: EAGLE-3, arXiv 2503.01840; EAGLE-3.1 norms each tap and feeds the normed state back.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from specdec.common.config import Config
from specdec.drafters.feature_head import Backbone, DraftLayer, FeatureDrafter, FeatureHead, norm
from specdec.drafters.heads import Layer, Size
from specdec.drafters.training import LossOutput, TrainingBatch, chain_loss


class Eagle3Options(Config):
    """The options of an EAGLE-3 head; the norms are those of speculators."""

    backbone: Backbone = Backbone()
    # HF `hidden_states` indices, usually three; None for the published ones.
    taps: Annotated[list[Layer], Field(min_length=1)] | None = None
    target_hidden_size: Size | None = None  # another than the layer's where the embedding is own
    draft_vocab_size: Size | None = None  # None for the target's whole vocabulary
    num_layers: Annotated[int, Field(ge=1, le=100)] = 1  # the first reads token and feature
    norm_before_residual: bool = Field(False, description="the normed feature is the residual")
    norm_before_fc: bool = Field(
        False, description="the joined taps are normed before they are fused"
    )
    fc_norm: bool = Field(False, description="each tap is normed before they are fused")
    norm_output: bool = Field(False, description="the normed state is fed back")
    own_embedding: bool = Field(False, description="its own embedding")

    @model_validator(mode="after")
    def _one_norm(self) -> Self:
        if self.fc_norm and self.norm_before_fc:
            raise ValueError("fc_norm and norm_before_fc are both true; the taps are normed once")
        return self


class Eagle3Head(FeatureHead):
    """The head. Its parameters are named as in the published checkpoints.

    The rows of its own vocabulary projection start as copies of the target's.
    """

    Options = Eagle3Options
    unread: ClassVar[Mapping[str, str]] = {
        "sglang": "norm_before_residual fc_norm backbone.qk_norm",
        "llama.cpp": "norm_output fc_norm backbone.qk_norm num_layers",
        "tensorrt-llm": "norm_before_residual norm_before_fc fc_norm backbone.qk_norm",
    }
    d2t: Tensor
    t2d: Tensor

    def __init__(self, options: Mapping[str, Any], target_config: Any, *parts: Any) -> None:
        super().__init__(options, target_config, *parts)
        given, config = self.options, self.config
        size, vocab = config.hidden_size, config.vocab_size
        num_drafted = given.draft_vocab_size or vocab
        taps = given.taps or list(self.default_taps(target_config.num_hidden_layers))
        width = given.target_hidden_size or target_config.hidden_size
        sizes = {"taps": taps, "target_hidden_size": width, "draft_vocab_size": num_drafted}
        self.options, self.taps = given.model_copy(update=sizes), tuple(taps)
        self.fc = nn.Linear(len(taps) * width, size, bias=False)
        # It attends over token and feature side by side.
        self.midlayer = DraftLayer(config, 2 * size)
        self.midlayer.input_layernorm, self.midlayer.hidden_norm = norm(config), norm(config)
        self.num_layers = given.num_layers
        self.layers = nn.ModuleDict()  # further ones, named as speculators counts them
        for index in range(1, given.num_layers):
            further: Any = DraftLayer(config, size, layer_idx=index)
            further.input_layernorm = norm(config)
            self.layers[str(index)] = further
        self.norm = norm(config)
        self.lm_head = nn.Linear(size, num_drafted, bias=False)
        if given.norm_before_fc:
            self.input_norm = norm(config, len(taps) * width)
        if given.fc_norm:
            self.fc_norm = nn.ModuleList([norm(config, width) for _ in taps])
        if given.own_embedding:
            self.embed_tokens = nn.Embedding(vocab, size)
        if num_drafted < vocab:
            self.register_buffer("d2t", torch.zeros(num_drafted, dtype=torch.long))
            self.register_buffer("t2d", torch.zeros(vocab, dtype=torch.bool))
        self.set_draft_vocab(torch.arange(num_drafted))

    @staticmethod
    def default_taps(num_layers: int) -> tuple[int, ...]:
        """The published taps, 2, L // 2 and L - 3, kept apart and inside a short target."""
        low = min(2, num_layers)
        middle = max(low, num_layers // 2)
        return low, middle, max(middle, num_layers - 3)

    @classmethod
    def target_facts(cls, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Read sizes; a vocabulary is as large as its map, else as the projection."""
        names = ("t2d", "embed_tokens.weight", "lm_head.weight")
        named = next((tensors[name] for name in names if name in tensors), torch.empty(1))
        return super().target_facts(tensors) | {"vocab_size": len(named) if named.ndim else 1}

    def check_values(self, tensors: Mapping[str, Tensor]) -> None:
        # `d2t` [D] holds offsets: draft id i is target id i + d2t[i]. `t2d` [V] marks these ids.
        if "d2t" not in tensors:
            return
        ids, t2d = _target_ids(tensors["d2t"].long().cpu()), tensors["t2d"].cpu()
        if not 0 <= int(ids.min()) <= int(ids.max()) < len(t2d):
            raise ValueError(
                f"d2t leads to the target ids {int(ids.min())} to {int(ids.max())}, but there are "
                f"{len(t2d)}; d2t must hold offsets, target id minus draft id"
            )
        marked = torch.zeros_like(t2d).index_fill(0, ids, True)
        if int(marked.sum()) != len(ids):
            raise ValueError("d2t leads to a target id twice; copy the file again")
        if not torch.equal(marked, t2d):
            raise ValueError("t2d marks other target ids than d2t leads to; copy the file again")

    def set_draft_vocab(self, tokens: Tensor) -> None:
        """Draft these target ids [D], ascending; their logits start as the target's."""
        if self.options.draft_vocab_size < self.config.vocab_size:
            self.d2t.copy_(tokens - torch.arange(len(tokens), device=tokens.device))
            self.t2d.zero_()[tokens] = True
        if self._target_parts[1] is None:
            return
        rows = self._target_parts[1].weight
        if rows.shape[1] == self.lm_head.in_features and len(rows) > int(tokens.max()):
            with torch.no_grad():
                self.lm_head.weight.copy_(rows[tokens.to(rows.device)])

    @property
    def token_map(self) -> Tensor | None:  # type: ignore[override]
        if self.options.draft_vocab_size == self.config.vocab_size:
            return None
        return _target_ids(self.d2t)

    def fuse(self, hidden: dict[int, Tensor]) -> Tensor:
        return self.join([hidden[tap] for tap in self.taps])

    def join(self, taps: Sequence[Tensor]) -> Tensor:
        """Taps, each [..., H], to features [..., F]."""
        if self.options.fc_norm:
            taps = [each(tap) for each, tap in zip(self.fc_norm, taps, strict=True)]
        joined = torch.cat([*taps], -1)
        return self.fc(self.input_norm(joined) if self.options.norm_before_fc else joined)

    def forward(
        self, tokens: Tensor, features: Tensor, positions: Tensor, mask: Any, cache: Any
    ) -> Tensor:
        layer: Any = self.midlayer
        embed = self.embed_tokens if self.options.own_embedding else self._target_parts[0]
        normed = layer.hidden_norm(features)
        residual = normed if self.options.norm_before_residual else features
        pair = torch.cat([layer.input_layernorm(embed(tokens)), normed], -1)
        rotary = self.rotary(features, positions)
        states = layer(pair, residual, rotary, mask, cache)
        further: Any
        for further in self.layers.values():
            states = further(further.input_layernorm(states), states, rotary, mask, cache)
        return states

    def logits(self, outputs: Tensor) -> Tensor:
        return self.lm_head(self.norm(outputs))

    def carry(self, outputs: Tensor) -> Tensor:
        return self.norm(outputs) if self.options.norm_output else outputs

    def loss(  # type: ignore[override]
        self,
        batch: TrainingBatch,
        num_steps: int = 4,
        decay: float = 0.8,
        objective: str = "soft_cross_entropy",
        weighting: str = "decay",
    ) -> LossOutput:
        """Training-time test: an objective of every drafted step, in the draft vocabulary."""
        return chain_loss(self.levels(batch, num_steps, objective), objective, decay, weighting)

    def describe(self, given: Mapping[str, Any]) -> dict[str, str]:
        said = super().describe(given)
        said["reads"] = "hidden_states 2, L // 2 and L - 3 of a target with L layers, as published"
        if given.get("taps"):
            taps = ", ".join(map(str, given["taps"]))
            said["reads"] = f"hidden_states {taps} of the target (0 is its embedding)"
        if self.num_layers > 1:
            said["layer"] = f"{self.num_layers} layers, {said['layer']}"
        return said


def _target_ids(d2t: Tensor) -> Tensor:
    return d2t + torch.arange(len(d2t), device=d2t.device)


class Eagle3Drafter(FeatureDrafter):
    """Drafts trees with an EAGLE-3 head."""

    kind, title, head_class = "eagle3", "EAGLE-3 head", Eagle3Head
    engine_methods: ClassVar[Mapping[str, str]] = {
        **{"vllm": "eagle3", "sglang": "EAGLE3"},
        **{"tensorrt-llm": "Eagle3", "llama.cpp": "draft-eagle3"},
    }
