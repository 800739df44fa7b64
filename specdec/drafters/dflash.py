"""DFlash, DSpark and JetSpec: heads that draft a whole block in one forward.

A block is the root and mask tokens behind it. Its queries read the target's features of all tokens
before the root, whose keys and values alone are cached, and each other. A Markov head (DSpark)
makes a token depend on the one before it, so that chains are drawn from a q that can be reported
and every node of a tree has children of its own.

Sources: DFlash, arXiv 2602.06036; DSpark, arXiv 2607.05147 (Markov and confidence heads); JetSpec,
arXiv 2606.18394 (causal blocks).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from specdec.common.compile import as_target
from specdec.common.config import Config
from specdec.drafters.base import DraftShape, FixedShape, in_parts
from specdec.drafters.compiled_block import CompiledBlocks
from specdec.drafters.feature_head import (
    CATCH_UP,
    Backbone,
    DraftLayer,
    FeatureDrafter,
    FeatureHead,
    merged,
    norm,
)
from specdec.drafters.heads import Layer, Size, load_head
from specdec.drafters.training import Level, LossOutput, TrainingBatch, chain_loss, shifted
from specdec.drafters.tree_growth import Candidates, Choices, TreeShape
from specdec.sampling.sampler import Sampler
from specdec.verify import Draft

_PART = 64  # blocks of a text that are run at once where every place has one


class DFlashOptions(Config):
    """The options of a head that drafts blocks."""

    backbone: Backbone = Backbone()
    # HF `hidden_states` indices; None for five of them, spread evenly.
    taps: Annotated[list[Layer], Field(min_length=1)] | None = None
    num_layers: Size = 2
    block_size: Annotated[int, Field(ge=2, le=1024)] = 8  # the root and mask tokens
    # None for the target's padding token, or its last id where it has none.
    mask_token_id: Annotated[int, Field(ge=0)] | None = None
    sample_from_anchor: bool = Field(
        False, description="the root's own slot guesses the token behind it"
    )
    causal: bool = Field(False, description="blocks are causal (JetSpec)")
    markov: Literal["vanilla", "gated"] | None = None
    markov_rank: Size = 64
    confidence: bool = Field(False, description="a confidence head")
    confidence_with_markov: bool = Field(
        False, description="which reads the previous token's Markov embedding"
    )
    own_ends: bool = Field(False, description="its own embedding and vocabulary projection")

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if self.backbone.qk_norm is False:
            raise ValueError("backbone.qk_norm is false, but blocks are attended to with norms")
        if self.confidence_with_markov and not (self.markov and self.confidence):
            raise ValueError("confidence_with_markov needs markov and confidence")
        return self


class _MarkovHead(nn.Module):
    """A token's bias on the logits of the next one, of low rank."""

    def __init__(self, vocab_size: int, rank: int, size: int | None) -> None:
        super().__init__()
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, vocab_size, bias=False)
        nn.init.zeros_(self.markov_w2.weight)  # a new one changes nothing
        if size is not None:
            self.gate_proj = nn.Linear(size + rank, rank)


class DFlashHead(FeatureHead):
    """The head. Its parameters are named as in the published checkpoints.

    Level l of a block guesses the token l + 1 places behind the root.
    """

    Options = DFlashOptions

    def __init__(self, options: Mapping[str, Any], target_config: Any, *parts: Any) -> None:
        given = self.given(options)
        backbone = given.backbone.model_copy(update={"qk_norm": True})
        whole = given.model_copy(update={"backbone": backbone})
        super().__init__(whole.model_dump(exclude_none=True), target_config, *parts)
        config, size, vocab = self.config, self.config.hidden_size, self.config.vocab_size
        taps = given.taps or list(self.default_taps(target_config.num_hidden_layers))
        mask = given.mask_token_id
        if mask is None:
            mask = getattr(target_config, "pad_token_id", None)
            mask = mask if isinstance(mask, int) and 0 <= mask < vocab else vocab - 1
        if parts and mask >= vocab:
            raise ValueError(f"mask_token_id is {mask} but the vocabulary has only {vocab} tokens")
        self.options = self.options.model_copy(update={"taps": taps, "mask_token_id": mask})
        self.taps, self.num_layers = tuple(taps), given.num_layers
        self.first = 0 if given.sample_from_anchor else 1  # slot of level 0
        self.max_depth = given.block_size - self.first
        self.fc = nn.Linear(len(taps) * target_config.hidden_size, size, bias=False)
        self.hidden_norm, self.norm = norm(config), norm(config)
        self.layers = nn.ModuleList()
        for index in range(given.num_layers):
            layer: Any = DraftLayer(config, size, layer_idx=index)
            layer.input_layernorm = norm(config)
            self.layers.append(layer)
        if given.markov:
            width = size if given.markov == "gated" else None
            self.markov_head = _MarkovHead(vocab, given.markov_rank, width)
        if given.confidence:
            self.confidence_head = nn.Module()
            rank = given.markov_rank if given.confidence_with_markov else 0
            self.confidence_head.proj = nn.Linear(size + rank, 1)
        if given.own_ends:
            self.embed_tokens = nn.Embedding(vocab, size)
            self.lm_head = nn.Linear(size, vocab, bias=False)

    @staticmethod
    def default_taps(num_layers: int) -> tuple[int, ...]:
        """Five taps from 2 to L - 3, as far as there are so many."""
        last = max(num_layers - 3, 1)
        first = min(2, last)
        return tuple(sorted({first + round(i * (last - first) / 4) for i in range(5)}))

    def fuse(self, hidden: dict[int, Tensor]) -> Tensor:
        return self.hidden_norm(self.fc(torch.cat([hidden[tap] for tap in self.taps], -1)))

    def remember(self, features: Tensor, positions: Tensor, cache: Any) -> None:
        """Write the keys and values of features [B, n, H] at positions [B, n] to a cache."""
        rotary = self.rotary(features, positions)
        for index, layer in enumerate(cast(Any, self.layers)):
            attention = layer.self_attn
            shape = (*features.shape[:2], -1, attention.head_dim)
            keys = attention.k_norm(attention.k_proj(features).view(shape)).transpose(1, 2)
            values = attention.v_proj(features).view(shape).transpose(1, 2)
            cache.update(apply_rotary_pos_emb(keys, keys, *rotary)[1], values, index)

    def forward(  # type: ignore[override]
        self, tokens: Tensor, positions: Tensor, mask: Any, cache: Any
    ) -> Tensor:
        """Outputs [B, n, H] of whole blocks of tokens [B, n]; what they write is not to be kept."""
        embed = self.embed_tokens if self.options.own_ends else self._target_parts[0]
        states = embed(tokens)
        rotary, layers = self.rotary(states, positions), cast(Any, self.layers)
        for layer in layers:
            states = layer(layer.input_layernorm(states), states, rotary, mask, cache)
        return self.norm(states)

    def logits(self, outputs: Tensor) -> Tensor:
        logits: Tensor = (self.lm_head if self.options.own_ends else self._target_parts[1])(outputs)
        return logits

    def transition(self, outputs: Tensor, tokens: Tensor) -> Tensor:
        """Add to the logits [..., V] of slots with outputs [..., H], behind tokens [...]."""
        head: Any = self.markov_head
        embedded = head.markov_w1(tokens)
        if self.options.markov == "gated":
            outputs = outputs.expand(*tokens.shape, -1)
            gate = head.gate_proj(torch.cat([outputs, embedded], -1))
            embedded = gate.sigmoid() * embedded
        return head.markov_w2(embedded)

    def confidences(self, outputs: Tensor, tokens: Tensor) -> Tensor:
        """Logits [...] of the chance that what slots with these outputs draw is accepted."""
        if self.options.confidence_with_markov:
            outputs = torch.cat([outputs, self.markov_head.markov_w1(tokens)], -1)
        said: Tensor = cast(Any, self.confidence_head).proj(outputs).squeeze(-1)
        return said

    def block(self, roots: Tensor) -> Tensor:
        """Tokens [..., W] of the blocks of roots [...]."""
        shape = *roots.shape, self.options.block_size - 1
        return torch.cat(
            [roots.unsqueeze(-1), roots.new_full(shape, self.options.mask_token_id)], -1
        )

    def own_mask(self, device: torch.device) -> Tensor:
        """Slots [W, W] that each slot of a block sees."""
        size = self.options.block_size
        ones = torch.ones(size, size, dtype=torch.bool, device=device)
        return ones.tril() if self.options.causal else ones

    def blocks(
        self, tokens: Tensor, features: Tensor, places: Tensor, window: int | None = None
    ) -> Tensor:
        """Outputs [B, A, K, H] of all levels of blocks in a text, all under one mask.

        Args:
            tokens: [B, L].
            features: [B, L, F].
            places: [B, A] of the last features that each block sees; its root is the next token.
            window: features that it sees at most.
        """
        cache, num_blocks = DynamicCache(), places.shape[1]
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        self.remember(features, steps.expand(tokens.shape), cache)
        back = places.unsqueeze(2) - steps  # [B, A, L] how far a feature lies back
        shown = (back >= 0) & (back < (window or tokens.shape[1]))
        own = self.own_mask(tokens.device)
        each = torch.eye(num_blocks, dtype=torch.bool, device=tokens.device)
        inside = torch.kron(each, own).expand(len(tokens), -1, -1)
        mask = torch.cat([shown.repeat_interleave(len(own), 1), inside], 2)
        roots = tokens.gather(1, places + 1)
        positions = (places + 1).unsqueeze(2) + torch.arange(len(own), device=tokens.device)
        outputs = self(self.block(roots).flatten(1), positions.flatten(1), mask.unsqueeze(1), cache)
        return outputs.unflatten(1, (num_blocks, -1))[:, :, self.first :]

    def _everywhere(
        self, tokens: Tensor, features: Tensor, first: int = 0, window: int | None = None
    ) -> Tensor:
        """Outputs [B, places, K, H] of the blocks at all places from the first one on."""
        last = tokens.shape[1] - 2  # behind the last token no root is known
        places = torch.arange(first, tokens.shape[1], device=tokens.device).clamp(max=last)
        parts = places.expand(len(tokens), -1).split(_PART, 1)
        return torch.cat([self.blocks(tokens, features, part, window) for part in parts], 1)

    def level_logits(self, outputs: Tensor, previous: Tensor) -> Tensor:
        """Logits [..., V] of slots with outputs [..., H], each behind a previous token [...]."""
        logits = self.logits(outputs)
        return logits + self.transition(outputs, previous) if self.options.markov else logits

    def candidates(self, batch: TrainingBatch, depth: int, width: int) -> Tensor:
        outputs, found = self._everywhere(batch.tokens, self.fuse(batch.hidden)), []
        for level in range(self.max_depth or 0):
            logits = self.level_logits(outputs[:, :, level], shifted(batch.tokens, 1 + level))
            found.append(self.likeliest(logits, width))
        return torch.stack(found, 2)

    def guesses(self, batch: TrainingBatch, mask: Tensor) -> Tensor:
        outputs = self._everywhere(batch.tokens, self.fuse(batch.hidden))[:, :, 0]
        return self.level_logits(outputs[mask], shifted(batch.tokens, 1)[mask])

    def _levels(
        self, batch: TrainingBatch, num_blocks: int
    ) -> Iterator[tuple[Level, Tensor, Tensor]]:
        """The levels of blocks at places taken by chance, with their outputs and previous tokens.

        Tokens before a level are the text's own.
        """
        usable = shifted(batch.loss_mask, 2)
        chance = torch.rand(usable.shape, device=usable.device).masked_fill(~usable, -1.0)
        count = min(num_blocks, max(1, int(usable.sum(1).max())))
        places = chance.topk(count, 1).indices.sort(1).values.clamp(max=usable.shape[1] - 2)
        outputs = self.blocks(batch.tokens, self.fuse(batch.hidden), places)
        chosen = usable.gather(1, places)
        for level in range(self.max_depth or 0):
            counted = chosen & shifted(batch.loss_mask, 2 + level).gather(1, places)
            mask = torch.zeros_like(usable).scatter(1, places, counted)
            states, previous = outputs[:, :, level][counted], shifted(batch.tokens, 1 + level)[mask]
            goal = shifted(batch.target_logits, 1 + level)[mask]
            said = shifted(batch.tokens, 2 + level)[mask]
            yield Level(self.level_logits(states, previous), goal, said, mask), states, previous

    def loss(  # type: ignore[override]
        self,
        batch: TrainingBatch,
        num_blocks: int = 32,
        decay: float = 0.78,
        objective: str = "soft_cross_entropy",
        weighting: str = "decay",
        cross_entropy_weight: float = 0.0,
        confidence_weight: float = 1.0,
    ) -> LossOutput:
        """An objective of every level of blocks at `num_blocks` places a text, taken by chance.

        Cross-entropy to the text is added by its weight (0.1 in DSpark, to total variation at 0.9),
        and the confidence head learns the acceptance rate. A decay d is DFlash's exp(-1 / gamma).
        """
        if num_blocks < 1:
            raise ValueError(f"loss.num_blocks is {num_blocks} but must be at least 1")
        found = [*self._levels(batch, num_blocks)]
        levels = [level for level, _, _ in found]
        result = chain_loss(levels, objective, decay, weighting)
        if cross_entropy_weight:
            text = chain_loss(levels, "cross_entropy", decay, weighting)
            total = result.loss + cross_entropy_weight * text.loss
            result = LossOutput(total, {**result.parts, **text.parts})
        if self.options.confidence:
            total = result.loss.new_zeros(())
            for depth, (level, states, previous) in enumerate(found):
                goal = level.target_logits.float().softmax(-1)
                rate = torch.minimum(level.logits.detach().float().softmax(-1), goal).sum(-1)
                said = self.confidences(states, previous).float()
                missed = binary_cross_entropy_with_logits(said, rate, reduction="none")
                total = total + decay**depth * (missed.mean() if len(missed) else said.sum())
            parts = {**result.parts, "confidence": total.detach()}
            result = LossOutput(result.loss + confidence_weight * total, parts)
        return result

    def describe(self, given: Mapping[str, Any]) -> dict[str, str]:
        said, options = super().describe(given), self.options
        taps = ", ".join(map(str, given.get("taps") or ["five", "spread evenly"]))
        said["reads"] = f"hidden_states {taps} of the target (0 is its embedding)"
        kind = f", a {options.markov} Markov head of rank {options.markov_rank}"
        said["drafts"] += f"; {self.max_depth} at once{kind if options.markov else ''}"
        return said


class DFlashDrafter(FeatureDrafter):
    """Drafts a chain or a tree from the slots of one block.

    Above temperature 0 `children="with_replacement"` draws the slots of a head without a Markov
    head independently of each other, which is exact and accepted less often than the likeliest
    tokens of "top"; with a Markov head each token is drawn behind the one before it.
    """

    kind, title, head_class = "dflash", "block head", DFlashHead
    compiled_class: ClassVar[Any] = CompiledBlocks

    @classmethod
    def load(  # type: ignore[override]
        cls,
        target: Any,
        path: str = "demo",
        depth: int = 16,
        width: int = 8,
        max_nodes: int = 24,
        choices: Choices | None = None,
        children: str = "top",
        window: int | None = None,
        confidence_threshold: float = 0.0,
        compile: bool | str | None = None,
        force: bool = False,
    ) -> Self:
        """Load a head for a target; options from depth to children are those of `TreeShape`.

        Args:
            target: the model it drafts for.
            path: folder or hub id in any known layout; "demo" for the embedded head.
            depth: levels, of those that the head was trained for.
            window: latest tokens that the head looks back at; None for all.
            confidence_threshold: a chain ends before the first token whose confidence, as the
                confidence head says it, falls below this; 0 is off.
            compile: True (Inductor), "graphs", "auto" or False; None for the target's own mode.
            force: take a head that was trained for another target of the same shape.
        """
        head, _ = load_head(cls, target, path, force=force)
        shape = TreeShape(depth, width, max_nodes, choices, children)
        mode = as_target(compile, target)
        return cls(head, target.vocab_size, shape, window, mode, confidence_threshold)

    def __init__(
        self,
        head: DFlashHead,
        vocab_size: int,
        shape: TreeShape,
        window: int | None = None,
        compile: bool | str = False,
        confidence_threshold: float = 0.0,
    ) -> None:
        super().__init__(head, vocab_size, shape, window, compile)
        if not 0 <= confidence_threshold < 1:
            raise ValueError(
                f"confidence_threshold is {confidence_threshold} but must be in [0, 1); 0 is off"
            )
        if confidence_threshold and not (head.options.confidence and not self.makes_trees):
            has = "is for chains: set width=1" if head.options.confidence else "the head has none"
            raise ValueError(f"confidence_threshold needs a confidence head, and {has}")
        self.confidence_threshold = confidence_threshold
        self._num_fed = max(CATCH_UP, head.options.block_size)
        self._own = head.own_mask(self.device)

    def propose(self, root: Tensor, budget: Sequence[int], sampler: Sampler) -> Draft:
        """Run one block, and grow a tree from its slots."""
        if max(budget) < 1:
            return Draft.empty(len(root), root.device)
        is_chain = bool(self.plan and self.plan.is_chain)
        is_plain = sampler.is_plain and self.children == "top" and (is_chain or not self.plan)
        width = 1 if self.plan else self.shape.width
        outputs, logits, levels = self._run_block(root, width if is_plain else 0)
        growth = self._new_growth(budget, sampler)
        previous = [root.unsqueeze(1)]  # [B, beam] of each level
        if levels:
            growth.take(levels[: growth.num_levels])
            previous += [level.tokens[:, :1] for level in levels[: growth.num_levels - 1]]
        for level in range(growth.level, growth.num_levels):
            scores = logits[:, level : level + 1]
            previous += [growth.beam] if level else []
            if self.head.options.markov:
                with self.clock.forward():
                    states = outputs[:, level : level + 1]
                    scores = scores + self.head.transition(states, previous[-1])
            self.add_level(growth, scores)
        draft = growth.draft(budget)
        if draft.is_chain and self.head.options.confidence:
            return self._judged(draft, outputs, torch.cat(previous, 1))
        return draft

    def _run_block(self, root: Tensor, width: int) -> tuple[Tensor, Tensor, list[Candidates]]:
        """Run the block of the root, behind what is committed.

        Returns:
            outputs [B, K, H], logits [B, K, V] without a Markov head's part; and where they are
            compiled the levels of a tree of a width above 0.
        """
        self._feed_prompts()
        num_waiting = sum(max(counts) for _, counts in self._pending)
        if self._compiled and self._pending and num_waiting <= CATCH_UP:
            (_, *taps), counts = merged(self._pending)
            self._pending = []
            with self.clock.forward():
                return self._compiled.step(taps, counts, root, self.cache, width)
        self._catch_up()
        with self.clock.forward():
            outputs = self._block(root)
            return outputs, self.head.logits(outputs), []

    def _block(self, root: Tensor) -> Tensor:
        """Outputs [B, K, H] of the levels behind the root."""
        tokens, (width, _) = self.head.block(root), self._own.shape
        self.cache.open(width)
        steps = torch.arange(width, device=self.device)
        positions = self.cache.device_lengths.unsqueeze(1) + steps
        # A window counts committed entries: the whole block looks back from the last of them.
        places = torch.full_like(steps, -1).expand(len(root), -1)
        mask = self._masks.tree(self.cache, self._own.expand(len(root), -1, -1), places)
        return self.head(tokens, positions, mask, self.cache)[:, self.head.first :]

    def _judged(self, draft: Draft, outputs: Tensor, previous: Tensor) -> Draft:
        """End chains where the confidence head, which sees no token of a slot's own, doubts."""
        outputs, previous = outputs[:, : draft.num_nodes], previous[:, : draft.num_nodes]
        said = self.head.confidences(outputs, previous).float().sigmoid()
        alive = draft.real_nodes() & (said >= self.confidence_threshold).cumprod(1).bool()
        return replace(
            draft,
            tokens=draft.tokens.masked_fill(~alive, -1),
            lengths=alive.sum(1),
            confidence=said.cumprod(1),
        )

    def _feed(self, tokens: Tensor, features: Tensor, counts: Sequence[int], size: int) -> None:
        """Cache the first `counts[b]` of the features [B, n]."""
        for columns, left in in_parts(counts, size):
            shown = features[:, columns]
            self.cache.open(shown.shape[1])
            steps = torch.arange(shown.shape[1], device=self.device)
            with self.clock.forward():
                positions = self.cache.device_lengths.unsqueeze(1) + steps
                self.head.remember(shown, positions, self.cache)
            self.cache.extend(left)

    @property
    def fixed_shape(self) -> FixedShape | None:
        return None if self.confidence_threshold else super().fixed_shape

    @property
    def draft_shape(self) -> DraftShape:
        return replace(super().draft_shape, threshold=self.confidence_threshold)

    def forced(
        self, tokens: Tensor, hidden: dict[int, Tensor], depth: int, first: int
    ) -> Iterator[Tensor]:
        """Run the blocks of every place of a text."""
        text = tokens.unsqueeze(0)
        features = self.head.fuse({tap: states.unsqueeze(0) for tap, states in hidden.items()})
        outputs = self.head._everywhere(text, features, first, self.window)[0]  # [places, K, H]
        for level in range(min(depth, self.head.max_depth or 0, len(tokens) - 1 - first)):
            end = len(tokens) - 1 - level
            states, previous = outputs[: end - first, level], tokens[first + 1 + level :]
            yield self.head.level_logits(states, previous)
