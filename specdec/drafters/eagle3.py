"""EAGLE-3: a one-layer head on three fused taps, with its own recurrent state and vocabulary.

Source: EAGLE-3, arXiv 2503.01840.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from specdec.drafters.feature_head import (
    DraftAttention,
    FeatureDrafter,
    LlamaMLP,
    LlamaRMSNorm,
    Rotary,
    backbone_config,
)
from specdec.drafters.training import (
    LossOutput,
    TrainingBatch,
    rollout,
    shifted,
    soft_cross_entropy,
)


@dataclass(frozen=True)
class Eagle3Config:
    """What makes an EAGLE-3 head.

    Attributes:
        backbone: the decoder layer's config.
        taps: three HF `hidden_states` indices.
        target_hidden_size: H of the target; the backbone's unless it has an embedding of its own.
        draft_vocab_size: D; the target's vocabulary if it is as large.
        norm_before_residual: the residual is the normed feature (speculators).
        norm_before_fc: norm the three taps together before they are fused (speculators).
        norm_output: feed the normed state back, not the raw one (speculators).
        own_embedding: the head brings its embedding instead of sharing the target's.
    """

    backbone: LlamaConfig
    taps: tuple[int, int, int]
    target_hidden_size: int
    draft_vocab_size: int
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    norm_output: bool = False
    own_embedding: bool = False


def default_taps(num_layers: int) -> tuple[int, int, int]:
    """The published taps, 2, L // 2 and L - 3, kept apart and inside a short target."""
    low = min(2, num_layers)
    middle = max(low, num_layers // 2)
    return low, middle, max(middle, num_layers - 3)


class _Layer(nn.Module):
    """A Llama layer that attends over token and feature side by side."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.self_attn = DraftAttention(config, 2 * size)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(size, config.rms_norm_eps)
        self.hidden_norm = LlamaRMSNorm(size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(size, config.rms_norm_eps)


class Eagle3Head(nn.Module):
    """The head. Its parameters are named as in the published checkpoints.

    Args:
        config: see `Eagle3Config`.
        embedding: the target's input embedding; not a parameter of the head.
        vocab_head: the target's vocabulary projection, whose rows the head's own starts from; not a
            parameter of the head.
    """

    d2t: Tensor
    t2d: Tensor

    def __init__(self, config: Eagle3Config, embedding: nn.Module, vocab_head: nn.Module) -> None:
        super().__init__()
        self.options, self.config, self.taps = config, config.backbone, config.taps
        size, vocab = config.backbone.hidden_size, config.backbone.vocab_size
        num_features = len(config.taps) * config.target_hidden_size
        self.fc = nn.Linear(num_features, size, bias=False)
        self.midlayer = _Layer(config.backbone)
        self.norm = LlamaRMSNorm(size, config.backbone.rms_norm_eps)
        self.lm_head = nn.Linear(size, config.draft_vocab_size, bias=False)
        if config.norm_before_fc:
            self.input_norm = LlamaRMSNorm(num_features, config.backbone.rms_norm_eps)
        if config.own_embedding:
            self.embed_tokens = nn.Embedding(vocab, size)
        # A tuple keeps the target's modules out of the head's parameters.
        self._target_parts: tuple[Any, Any] = (embedding, vocab_head)
        self.rotary = Rotary(config.backbone)
        if config.draft_vocab_size < vocab:
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.long))
            self.register_buffer("t2d", torch.zeros(vocab, dtype=torch.bool))
            self.set_draft_vocab(torch.arange(config.draft_vocab_size))
        else:
            self._start_from_target(torch.arange(vocab))

    def set_draft_vocab(self, tokens: Tensor) -> None:
        """Draft these target ids [D], ascending; their logits start as the target's."""
        self.d2t.copy_(tokens - torch.arange(len(tokens), device=tokens.device))
        self.t2d.zero_()[tokens] = True
        self._start_from_target(tokens)

    def _start_from_target(self, tokens: Tensor) -> None:
        rows = self._target_parts[1].weight
        if rows.shape[1] == self.lm_head.in_features and len(rows) > int(tokens.max()):
            with torch.no_grad():
                self.lm_head.weight.copy_(rows[tokens.to(rows.device)])

    @property
    def token_map(self) -> Tensor | None:
        """Target ids [D] of the draft vocabulary; None if both vocabularies are one."""
        if self.options.draft_vocab_size == self.config.vocab_size:
            return None
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def fuse(self, hidden: dict[int, Tensor]) -> Tensor:
        """Three taps [..., H_t] to features [..., H]."""
        joined = torch.cat([hidden[tap] for tap in self.taps], -1)
        if self.options.norm_before_fc:
            joined = self.input_norm(joined)
        return self.fc(joined)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token embeddings [..., H]."""
        own = self.embed_tokens if self.options.own_embedding else self._target_parts[0]
        return own(tokens)

    def forward(
        self, tokens: Tensor, features: Tensor, positions: Tensor, mask: Any, cache: Any
    ) -> Tensor:
        """Un-normed states [B, n, H], see `FeatureHead`."""
        layer = self.midlayer
        normed = layer.hidden_norm(features)
        residual = normed if self.options.norm_before_residual else features
        pair = torch.cat([layer.input_layernorm(self.embed(tokens)), normed], -1)
        attended, _ = layer.self_attn(
            pair, self.rotary(features, positions), mask, past_key_values=cache
        )
        states = residual + attended
        return states + layer.mlp(layer.post_attention_layernorm(states))

    def logits(self, outputs: Tensor) -> Tensor:
        """Logits [..., D] in the draft vocabulary."""
        return self.lm_head(self.norm(outputs))

    def carry(self, outputs: Tensor) -> Tensor:
        """The recurrent state."""
        return self.norm(outputs) if self.options.norm_output else outputs


class Eagle3Drafter(FeatureDrafter):
    """Drafts trees with an EAGLE-3 head."""

    kind = "eagle3"


def build(
    options: dict[str, Any], target_config: Any, embedding: nn.Module, vocab_head: nn.Module
) -> Eagle3Head:
    """A new head for a target.

    Args:
        options: fields of `Eagle3Config` other than the backbone, and "backbone" with fields of
            `LlamaConfig`; what is missing follows the target.
        target_config: the target's text config.
        embedding: the target's input embedding.
        vocab_head: the target's vocabulary projection.
    """
    options = dict(options)
    backbone = backbone_config(target_config, **options.pop("backbone", {}))
    defaults = {
        "taps": default_taps(target_config.num_hidden_layers),
        "target_hidden_size": target_config.hidden_size,
        "draft_vocab_size": backbone.vocab_size,
    }
    config = Eagle3Config(backbone, **{**defaults, **options})
    return Eagle3Head(config, embedding, vocab_head)


def loss(
    head: Eagle3Head, batch: TrainingBatch, num_steps: int = 4, decay: float = 0.8
) -> LossOutput:
    """Training-time test: soft cross-entropy of every step in the draft vocabulary.

    Args:
        head: in train mode.
        batch: see `TrainingBatch`.
        num_steps: drafted depths that are trained.
        decay: weight of a step over that of the step before.

    Raises:
        ValueError: no steps.
    """
    if num_steps < 1:
        raise ValueError(f"loss.num_steps is {num_steps} but must be at least 1")
    total = batch.target_logits.new_zeros(())
    parts: dict[str, Tensor] = {}
    ids = head.token_map
    best = batch.target_logits.argmax(-1)  # [B, L]
    features = head.fuse(batch.hidden)
    for step, outputs in enumerate(rollout(head, batch.tokens, features, num_steps)):
        mask = shifted(batch.loss_mask, 2 + step)
        if ids is not None:
            # The head cannot say these tokens; what it learned there would be noise.
            mask = mask & head.t2d[shifted(best, 1 + step)]
        goal = shifted(batch.target_logits, 1 + step)[mask]  # [places, V]
        part = soft_cross_entropy(head.logits(outputs[mask]), goal if ids is None else goal[:, ids])
        total = total + decay**step * part
        parts[f"cross_entropy_{step + 1}"] = part.detach()
    return LossOutput(total, parts)
