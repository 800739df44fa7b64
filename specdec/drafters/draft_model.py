"""A small causal LM as drafter: sampled or greedy chains, and best-first trees."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from specdec.common.arguments import require_counts
from specdec.demo import demo_path
from specdec.drafters.adapters import load_adapter
from specdec.drafters.base import BaseDrafter, DraftShape, FixedShape, ShapeOptions
from specdec.drafters.tree_growth import DynamicGrowth, child_scores
from specdec.engine.interfaces import Prompts, Target, TargetOutput
from specdec.sampling.randomness import row_exponentials
from specdec.sampling.sampler import Sampler, sample
from specdec.targets.hf import HFTarget
from specdec.targets.load import load_target
from specdec.targets.taps import read_text
from specdec.verify import Draft, Verdict
from specdec.verify.tree import from_choices

# Level i of a chain draws from stream 16 + i of its row's randomness.
FIRST_STREAM = 16
# What piled up while nothing was drafted is fed in parts, which bounds the cache of ragged rows.
CATCH_UP = 64


class DraftModel(BaseDrafter):
    """Drafts with a language model that shares the target's tokenizer.

    A chain (`width` 1) is the argmax at temperature 0 and otherwise sampled from the model's own
    processed distribution, which it reports. A tree (`width` > 1) holds the top `width` children of
    the best `width` nodes of each level, reranked to `max_nodes`; it is deterministic.

    Args:
        model: the drafter's language model; it owns the KV cache.
        vocab_size: V of the target. Draft logits are cropped or padded to it.
        num_draft_tokens: levels of the draft, at least 1.
        width: children per node and nodes expanded per level.
        max_nodes: node budget of a tree; None for `num_draft_tokens * width`.
        confidence_threshold: a chain ends where the product of the model's highest probabilities
            falls below this. It looks at the distribution, never at the token drawn from it, so a
            sampled chain stays lossless.

    Source: Leviathan et al. 2022, arXiv 2211.17192; trees: EAGLE-2, arXiv 2406.16858.
    """

    kind, title, trained_as = "draft_model", "Draft model", "language_model"
    shape_options: ClassVar[ShapeOptions] = ShapeOptions(
        {
            "depth": "num_draft_tokens",
            "width": "width",
            "nodes": "max_nodes",
            "threshold": "confidence_threshold",
        },
        ("chain", "tree", "threshold"),
    )
    children = "with_replacement"  # of a chain, above temperature 0

    def __init__(
        self,
        model: HFTarget,
        vocab_size: int,
        num_draft_tokens: int = 5,
        width: int = 1,
        max_nodes: int | None = None,
        confidence_threshold: float = 0.0,
    ) -> None:
        require_counts(num_draft_tokens=num_draft_tokens, width=width, max_nodes=max_nodes)
        if max_nodes is None:
            max_nodes = num_draft_tokens * width
        if not 0 <= confidence_threshold < 1:
            raise ValueError(
                f"confidence_threshold is {confidence_threshold} but must be in [0, 1); 0 is off"
            )
        self.model = model
        self.vocab_size = vocab_size
        self.num_draft_tokens = num_draft_tokens
        self.width = width
        self.max_nodes = num_draft_tokens if width == 1 else max_nodes
        self.makes_trees = width > 1
        # The cache keeps the accepted part of a chain: what is judged must be this very chain.
        self.caches_draft = not self.makes_trees
        self.confidence_threshold = confidence_threshold
        self.clock = model.clock
        self._committed: list[list[int]] = []

    @classmethod
    def load(
        cls,
        target: Target,
        path: str,
        adapter: str | None = None,
        dtype: Any = None,
        device: Any = None,
        quantization: str | None = None,
        num_draft_tokens: int = 5,
        width: int = 1,
        max_nodes: int | None = None,
        confidence_threshold: float = 0.0,
    ) -> "DraftModel":
        """Load the model for a target.

        Args:
            target: the model it drafts for; device and dtype default to its device and float32 on a
                CPU, the checkpoint's dtype elsewhere.
            path: "demo", a folder or a hub id.
            adapter: folder or hub id of a LoRA adapter; merged, unless the model is quantized.
            quantization: "8bit", "4bit" or None.
        """
        name = str(demo_path("draft")) if path == "demo" else path
        model = load_target(
            name,
            dtype=dtype,
            device=target.device if device is None else device,
            quantization=quantization,
        )
        for each, weight in model.model.named_parameters():
            if weight.is_floating_point() and not weight.isfinite().all():
                raise ValueError(
                    f"draft model {path!r}: {each} holds NaN or infinite values; copy or download "
                    "it again"
                )
        if adapter is not None:
            model = _with_adapter(model, adapter, is_quantized=quantization is not None)
        check_same_tokenizer(model.tokenizer, target.tokenizer, path)
        shape = num_draft_tokens, width, max_nodes, confidence_threshold
        return cls(model, target.vocab_size, *shape)

    def begin(
        self, prompts: Prompts, output: TargetOutput, sampler: Sampler, *, join: bool = False
    ) -> None:
        """Cache all but each prompt's root."""
        committed = [self._known(prompt) for prompt in prompts]
        self._committed = [*self._committed, *committed] if join else committed
        limit = self.model.max_context_len
        self.model.prefill([row[:-1][:limit] for row in committed], join=join)

    def propose(self, root: Tensor, budget: Sequence[int], sampler: Sampler) -> Draft:
        """Draft a chain or a tree, each level one forward of the model."""
        room = [self.model.max_context_len - len(row) for row in self._committed]
        budget = [min(b, r) if r > 0 else 0 for b, r in zip(budget, room, strict=True)]
        num_levels = min(self.num_draft_tokens, max(budget))
        if num_levels <= 0:
            return Draft.empty(root.shape[0], root.device)
        logits = self._catch_up()
        if self.makes_trees:
            draft = self._grow_tree(logits, num_levels, budget, sampler)
        else:
            draft = self._extend_chain(logits, num_levels, budget, sampler)
        if draft.tokens.device == root.device:
            return draft
        return draft.map_rows(lambda tensor: tensor.to(root.device))

    def observe(
        self, verdict: Verdict, committed: Sequence[Sequence[int]], hidden: dict[int, Tensor]
    ) -> None:
        """Roll the cache back to what was accepted."""
        lengths = []
        for row, new, cached in zip(self._committed, committed, self.model.lengths, strict=True):
            lengths.append(min(cached, len(row) + len(new) - 1))
            row.extend(self._known(new))
        self.model.rollback(lengths)

    def reorder(self, rows: Tensor) -> None:
        """Keep these rows."""
        rows = rows.to(self.model.device)
        self._committed = [self._committed[row] for row in rows.tolist()]
        self.model.reorder(rows)

    @property
    def draft_shape(self) -> DraftShape:
        """The shape of its drafts."""
        depth = min(self.num_draft_tokens, self.max_nodes)
        threshold = self.confidence_threshold
        return DraftShape(depth, self.width, self.max_nodes, self.makes_trees, threshold)

    @property
    def fixed_shape(self) -> FixedShape | None:
        """A chain; a tree chooses its nodes."""
        if self.makes_trees:
            return None
        chain = from_choices([(0,) * (level + 1) for level in range(self.num_draft_tokens)])
        return FixedShape(chain, self.children, self.confidence_threshold)

    def forced(
        self, tokens: Tensor, hidden: dict[int, Tensor], depth: int, first: int
    ) -> Iterator[Tensor]:
        """Read all levels off one pass over a text."""
        limit, num_tokens = self.model.max_context_len, len(tokens)
        size = (num_tokens - 1 - first, self.vocab_size)
        logits = torch.full(size, float("-inf"), device=self.model.device)
        known = self._known(tokens.tolist())[:limit]
        if first + 1 < len(known):
            seen = self._fit(read_text(self.model, known, first + 1).logits)
            logits[: len(seen)] = seen
        for level in range(min(depth, len(logits))):
            drafted = logits[level:].clone()
            # `propose` leaves room for the step's own token: the last place drafts nothing.
            drafted[max(0, limit - 2 - level - first) :] = float("-inf")
            yield drafted.to(tokens.device)

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values that are allocated now."""
        return self.model.cache_bytes

    def bytes_for(self, num_rows: int, num_slots: int) -> int:
        """Count the bytes for so many rows with so many committed tokens."""
        return self.model.bytes_for(num_rows, num_slots + self._num_fed)

    def reserve(self, num_rows: int, num_slots: int, *, join: bool) -> None:
        """Allocate exactly this much for the next batch, or for the running one."""
        self.model.reserve(num_rows, num_slots + self._num_fed, join=join)

    def wipe(self, rows: Sequence[int]) -> None:
        """Zero rows that may hold NaN."""
        self.model.wipe(rows)

    @property
    def _num_fed(self) -> int:
        """Tokens that stand behind the committed ones at most."""
        return max(CATCH_UP, self.num_draft_tokens * self.width)

    def _catch_up(self) -> Tensor:
        """Feed what is committed but not cached, the root last; logits [B, V] after the root."""
        limit = self.model.max_context_len
        pending = [
            row[cached:limit]
            for row, cached in zip(self._committed, self.model.lengths, strict=True)
        ]
        counts = [len(row) for row in pending]
        width = max(counts)
        padded = [row + [0] * (width - len(row)) for row in pending]
        tokens = torch.tensor(padded, device=self.model.device)
        if width <= CATCH_UP:
            return self._fit(self.model.feed(tokens, counts))
        logits = self.model.feed(tokens[:, :CATCH_UP], [min(n, CATCH_UP) for n in counts])
        for start in range(CATCH_UP, width, CATCH_UP):
            left = [min(max(n - start, 0), CATCH_UP) for n in counts]
            newest = self.model.feed(tokens[:, start : start + CATCH_UP], left)
            has_more = torch.tensor(left, device=self.model.device) > 0
            logits = torch.where(has_more.unsqueeze(1), newest, logits)
        return self._fit(logits)

    def _known(self, tokens: Sequence[int]) -> list[int]:
        """Tokens behind a smaller vocabulary read as its last one: any will do, none is right."""
        return [min(token, self.model.vocab_size - 1) for token in tokens]

    def _fit(self, logits: Tensor) -> Tensor:
        """Crop or pad the last dimension to the target's vocabulary."""
        missing = self.vocab_size - logits.shape[-1]
        if missing == 0:
            return logits
        if missing < 0:
            return logits[..., : self.vocab_size]
        return pad(logits, (0, missing), value=float("-inf"))

    def _extend_chain(
        self, logits: Tensor, num_levels: int, budget: Sequence[int], sampler: Sampler
    ) -> Draft:
        # A row whose context is full drafts nothing and must not grow with its neighbours.
        counts = [int(limit > 0) for limit in budget]
        chosen: list[Tensor] = []  # [B, 1] of each level
        reported: list[Tensor] = []
        lengths = torch.tensor([min(n, num_levels) for n in budget], device=logits.device)
        if not sampler.is_greedy:  # the numbers of committed tokens
            counters = torch.tensor([len(row) for row in self._committed], device=logits.device)
        survival: Tensor | float = 1.0
        is_ragged = bool(self.confidence_threshold) or min(budget) < num_levels
        for level in range(num_levels):
            scores = self._scores(logits, chosen, sampler)  # [B, V]
            if self.confidence_threshold:
                survival = scores.float().softmax(-1).amax(-1) * survival
                ended = survival < self.confidence_threshold
                lengths = torch.where(ended, lengths.clamp(max=level), lengths)
                # Only where it costs no synchronisation does an ended batch save its forwards.
                if logits.device.type == "cpu" and bool((lengths <= level).all()):
                    break
            if sampler.is_greedy:
                chosen.append(scores.argmax(-1, keepdim=True))
            else:
                probs = sampler.probs(scores.unsqueeze(1)).squeeze(1)
                reported.append(probs)
                chosen.append(sample(probs, self._noise(sampler, counters, level)).unsqueeze(1))
            if level + 1 < num_levels:
                logits = self._fit(self.model.feed(chosen[-1], counts))
        if not chosen:
            return Draft.empty(len(budget), logits.device)
        tokens = torch.cat(chosen, 1)  # [B, N]
        if is_ragged:
            tokens, lengths = _pad_after(tokens, lengths)
        return Draft.chain(tokens, lengths, torch.stack(reported, 1) if reported else None)

    def _scores(self, logits: Tensor, chosen: list[Tensor], sampler: Sampler) -> Tensor:
        """Process the newest level's logits [B, V] in the context of the chain so far."""
        if sampler.is_plain:
            return logits
        partial = Draft.chain(torch.cat(chosen, 1)) if chosen else None
        nodes = torch.full((len(logits), 1), len(chosen), device=logits.device)
        return sampler.scores(logits.unsqueeze(1), partial, nodes).squeeze(1)

    def _noise(self, sampler: Sampler, counters: Tensor, level: int) -> Tensor:
        """Noise [B, V] that draws a level of the chain.

        Where the target draws by position, its own noise: two distributions p and q then choose
        the same token with a probability of at least (1 - TV) / (1 + TV).

        Source: Daliri, Musco and Suresh 2024, arXiv 2408.07978.
        """
        seeds, stream = sampler.seeds.to(counters.device), FIRST_STREAM + level
        if sampler.shared_stream is not None:
            counters, stream = counters + level, sampler.shared_stream
        return row_exponentials(seeds, counters, stream, self.vocab_size)

    def _grow_tree(
        self, logits: Tensor, num_levels: int, budget: Sequence[int], sampler: Sampler
    ) -> Draft:
        growth = DynamicGrowth(self.width, self.max_nodes, num_levels)
        newest = logits.unsqueeze(1)  # [B, nodes of the newest level, V]
        growth.add_level(child_scores(growth, newest, sampler))
        while not growth.is_done:
            newest = self._fit(self.model.grow(*growth.newest))
            growth.add_level(child_scores(growth, newest, sampler))
        return growth.draft(budget)


def _pad_after(tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Replace what lies behind `lengths` [B] in tokens [B, N] by -1; no length exceeds N after."""
    lengths = lengths.clamp(max=tokens.shape[1])
    real = torch.arange(tokens.shape[1], device=tokens.device) < lengths.unsqueeze(1)
    return tokens.masked_fill(~real, -1), lengths


def _with_adapter(model: HFTarget, adapter: str, *, is_quantized: bool) -> HFTarget:
    adapted = load_adapter(model.model, adapter)
    # Merged into a few bits, much of a small adapter would be rounded away.
    merged = adapted.get_base_model() if is_quantized else adapted.merge_and_unload()
    return HFTarget(merged.eval(), model.tokenizer)


def check_same_tokenizer(draft: Any, target: Any, path: str) -> None:
    """Refuse a drafter whose ids mean other text; a padded vocabulary is fine."""
    if draft is None or target is None:
        return
    draft_vocab, target_vocab = draft.get_vocab(), target.get_vocab()
    if draft_vocab == target_vocab:
        return
    differing = [
        token
        for token, index in draft_vocab.items()
        if target_vocab.get(token, index) != index or (token not in target_vocab)
    ]
    if differing:
        raise ValueError(
            f"drafter {path!r} has another tokenizer than the target: {len(differing)} of "
            f"{len(draft_vocab)} tokens differ, {differing[0]!r} for one; drafting needs a model "
            "with the target's own tokenizer"
        )
