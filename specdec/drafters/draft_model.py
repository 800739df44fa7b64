"""A small causal LM as drafter: sampled or greedy chains, best-first trees, LoRA adapters."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import pad

from specdec.common.arguments import require_counts
from specdec.common.compile import as_target
from specdec.common.distribution import install
from specdec.common.files import read_json
from specdec.common.hub import find_checkpoint
from specdec.demo import unpacked
from specdec.drafters.base import (
    CachePasser,
    DraftShape,
    FixedShape,
    ShapeOptions,
    Tokens,
    in_parts,
    padded,
    set_apart,
)
from specdec.drafters.tree_growth import DynamicGrowth
from specdec.drafters.vocabulary import Bridge, Context, Vocabulary
from specdec.engine.interfaces import Prompts, Target, TargetOutput
from specdec.engine.quantize import mode_of
from specdec.sampling.randomness import row_exponentials
from specdec.sampling.sampler import Sampler, sample
from specdec.targets.hf import HFTarget
from specdec.targets.load import LOADING, load_target
from specdec.targets.taps import read_text
from specdec.verify import Draft, Verdict
from specdec.verify.tree import from_choices

# Level i of a chain draws from stream 16 + i of its row's randomness.
FIRST_STREAM = 16
# What piled up while nothing was drafted is fed in parts, which bounds the cache of ragged rows.
CATCH_UP = 64
_BASE_FILE = "base.json"


class DraftModel(CachePasser):
    """Drafts with a language model that has the target's tokenizer or, with a bridge, another.

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
        bridge: to the target's vocabulary, for a model with another tokenizer.

    Source: Leviathan et al. 2022, arXiv 2211.17192; trees: EAGLE-2, arXiv 2406.16858; other
    tokenizers: Timor et al. 2025, arXiv 2502.05202.
    """

    kind, title, trained_as = "draft_model", "Draft model", "language_model"
    engine_methods: ClassVar[Mapping[str, str]] = {
        **{"vllm": "draft_model", "sglang": "STANDALONE", "tensorrt-llm": "Draft_Target"},
        **{"llama.cpp": "draft-simple", "transformers": "assistant_model"},
        **{"tabbyapi": "model", "exllamav2": "draft_model"},
    }
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
        bridge: Bridge | None = None,
    ) -> None:
        require_counts(num_draft_tokens=num_draft_tokens, width=width, max_nodes=max_nodes)
        if not 0 <= confidence_threshold < 1:
            raise ValueError(
                f"confidence_threshold is {confidence_threshold} but must be in [0, 1); 0 is off"
            )
        self.model, self.vocab_size = model, vocab_size
        self.num_draft_tokens, self.width = num_draft_tokens, width
        self.makes_trees = width > 1
        # The cache keeps the accepted part of a chain: what is judged must be this very chain.
        self.caches_draft = not self.makes_trees
        whole = num_draft_tokens * width
        self.max_nodes = max_nodes if max_nodes is not None and width > 1 else whole
        self.confidence_threshold = confidence_threshold
        self.clock = model.clock
        self._holders = [model]
        self._num_fed = max(CATCH_UP, whole)
        self._committed: list[list[int]] = []  # in the model's own tokens
        self.bridge = bridge
        self._retokenizes = bridge is not None and bridge.mode == "retokenize"
        if bridge:  # a text has other places there: it is no `Forced`, and is replayed
            self.forced = None  # type: ignore[assignment,method-assign]
        self._contexts: list[Context] = []  # with a bridge, whose tokens are the committed ones
        self._drafted: list[list[int]] = []  # own tokens of a draft that was retokenized

    @classmethod
    def load(
        cls,
        target: Target,
        path: str,
        adapter: str | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        quantization: str | None = None,
        compile: bool | str | None = None,
        cache: str | None = None,
        num_draft_tokens: int = 5,
        width: int = 1,
        max_nodes: int | None = None,
        confidence_threshold: float = 0.0,
        vocabulary: Literal["same", "auto", "intersect", "retokenize"] = "same",
    ) -> "DraftModel":
        """Load the model for a target.

        Args:
            target: the model it drafts for.
            path: folder or hub id of the model; "demo" for the embedded one.
            adapter: folder or hub id of a LoRA adapter; merged, unless the model is quantized.
            dtype: "float32", "bfloat16", "float16" or "auto"; None: float32 on a CPU, the
                checkpoint's own elsewhere.
            device: device of the model; None for the target's.
            quantization: "8bit" or "4bit" through bitsandbytes; None for none.
            compile: True (Inductor), "graphs", "auto" or False; None for the target's own mode.
            cache: "fp8", "int8", "int6" or "int4" for quantized keys and values, as in
                `load_target`, and then eager by default. None: the model's dtype.
            vocabulary: "same" refuses a model with another tokenizer than the target's. With
                "intersect" such a model says only what both vocabularies hold; with "retokenize" it
                drafts chosen chains in its own, whose text the target's tokenizer reads. "auto"
                intersects where half of the target's vocabulary is shared, and for trees.
        """
        if vocabulary not in (known := ("same", "auto", "intersect", "retokenize")):
            raise ValueError(f"vocabulary is {vocabulary!r} but must be one of {', '.join(known)}")
        is_eager = compile is None and mode_of(cache) is not None
        compile = False if is_eager else as_target(compile, target)
        model = load_target(
            unpacked("demo/draft" if path == "demo" else path),
            dtype=dtype,
            device=target.device if device is None else device,
            quantization=quantization,
            compile=adapter is None and compile,
            cache=cache,
        )
        for name, weight in model.model.named_parameters():
            if weight.is_floating_point() and not weight.isfinite().all():
                raise ValueError(
                    f"draft model {path!r}: {name} holds NaN or infinite values; download it again"
                )
        if adapter is not None:
            adapted = load_adapter(model.model, adapter)
            # Merged into a few bits, much of a small adapter would be rounded away.
            merged = adapted.get_base_model() if quantization else adapted.merge_and_unload()
            model = HFTarget(merged.eval(), model.tokenizer, compile, cache)
        if model.is_hybrid:
            raise ValueError(
                f"draft model {path!r} has recurrent layers, which cannot forget what was "
                "rejected; use one with attention only"
            )
        bridge, tokenizers = None, (model.tokenizer, target.tokenizer)
        if vocabulary == "same":
            way_out = ", or vocabulary='auto'"
            check_same_tokenizer(*tokenizers, path, way_out)
        elif None in tokenizers:
            raise ValueError(
                f"vocabulary is {vocabulary!r} but the target or drafter {path!r} has no "
                "tokenizer; use vocabulary='same' where their ids mean the same"
            )
        elif vocabulary != "auto" or _differing(*tokenizers):
            own = Vocabulary(model.tokenizer, model.vocab_size, f"drafter {path!r}")
            its = Vocabulary(target.tokenizer, target.vocab_size, "the target")
            bridge = Bridge(own, its, vocabulary, width > 1, model.device)
        shape = num_draft_tokens, width, max_nodes, confidence_threshold
        return cls(model, target.vocab_size, *shape, bridge)

    def begin(
        self, prompts: Prompts, output: TargetOutput, sampler: Sampler, *, join: bool = False
    ) -> None:
        """Keep the prompts, which are cached when a draft is asked for."""
        self._drafted = []
        if self.bridge:
            contexts = [self.bridge.context(prompt) for prompt in prompts]
            self._contexts = [*self._contexts, *contexts] if join else contexts
            committed = [context.tokens for context in contexts]
        else:
            committed = [self._known(prompt) for prompt in prompts]
        self._committed = [*self._committed, *committed] if join else committed
        self.model.prefill([[] for _ in prompts], join=join)

    def catch_up(self) -> None:
        self._cache_new_rows()

    def propose(self, root: Tensor, budget: Sequence[int], sampler: Sampler) -> Draft:
        """Draft a chain or a tree, each level one forward of the model."""
        room = [self.model.max_context_len - len(row) for row in self._committed]
        budget = [min(b, r) if r > 0 else 0 for b, r in zip(budget, room, strict=True)]
        num_levels = min(self.num_draft_tokens, max(budget))
        if num_levels <= 0:
            return Draft.empty(root.shape[0], root.device)
        logits = self._catch_up()
        if self.makes_trees:
            growth = DynamicGrowth(self.width, self.max_nodes, num_levels, sampler)
            growth.add_level(logits.unsqueeze(1))
            for _ in range(1, num_levels):
                tokens, *places = growth.newest
                growth.add_level(self._fit(self.model.grow(self._own(tokens), *places)))
            draft = growth.draft(budget)
        else:
            draft = self._chain(logits, num_levels, budget, sampler)
        if self.bridge and self._retokenizes:
            rows = draft.tokens.tolist()
            self._drafted = [[token for token in row if token >= 0] for row in rows]
            said = [
                self.bridge.retokenized(row)[:limit]
                for row, limit in zip(self._drafted, budget, strict=True)
            ]
            tokens = torch.tensor(padded(said, -1), dtype=torch.long, device=root.device)
            lengths = torch.tensor([len(row) for row in said], device=root.device)
            return Draft.chain(tokens, lengths)
        if draft.tokens.device == root.device:
            return draft
        return draft.map_rows(lambda tensor: tensor.to(root.device))

    def observe(self, verdict: Verdict, committed: Tokens, hidden: dict[int, Tensor]) -> None:
        """Roll the cache back to what was accepted."""
        if self.bridge:
            self._align(committed)
            return
        lengths = []
        for row, new, cached in zip(self._committed, committed, self.model.lengths, strict=True):
            lengths.append(min(cached, len(row) + len(new) - 1))
            row.extend(self._known(new))
        self.model.rollback(lengths)

    def _align(self, committed: Tokens) -> None:
        """Read the committed text, and roll the cache back to where it says something else."""
        assert self.bridge is not None
        lengths = []
        for row, (new, cached) in enumerate(zip(committed, self.model.lengths, strict=True)):
            context = self._contexts[row]
            # All of them but the last are the accepted part of the draft.
            fed = self._drafted[row] if self._drafted else self.bridge.fed(new[:-1])
            same = context.add(self.bridge.text(new), len(new), fed)
            lengths.append(min(cached, same, len(context.tokens) - 1))
        self._drafted = []
        self.model.rollback(lengths)

    def reorder(self, rows: Tensor) -> None:
        rows = rows.to(self.model.device)
        if self.bridge:
            self._contexts = [self._contexts[row] for row in rows.tolist()]
            self._drafted = [self._drafted[row] for row in rows.tolist() if self._drafted]
        self._committed = [self._committed[row] for row in rows.tolist()]
        self.model.reorder(rows)

    @property
    def draft_shape(self) -> DraftShape:
        depth, threshold = min(self.num_draft_tokens, self.max_nodes), self.confidence_threshold
        return DraftShape(depth, self.width, self.max_nodes, self.makes_trees, threshold)

    @property
    def fixed_shape(self) -> FixedShape | None:
        """A chain; a tree chooses its nodes, and another tokenizer has other levels."""
        if self.makes_trees or self.bridge:
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

    def _catch_up(self) -> Tensor:
        """Feed what is committed but not cached, the root last; logits [B, V] after the root."""
        self._cache_new_rows()
        limit, lengths = self.model.max_context_len, self.model.lengths
        pending = [row[n:limit] for row, n in zip(self._committed, lengths, strict=True)]
        tokens = torch.tensor(padded(pending, 0), device=self.model.device)
        logits: Tensor | None = None
        for columns, left in in_parts([len(row) for row in pending], CATCH_UP):
            newest = self.model.feed(tokens[:, columns], left)
            if logits is not None:
                has_more = torch.tensor(left, device=self.model.device) > 0
                newest = torch.where(has_more.unsqueeze(1), newest, logits)
            logits = newest
        assert logits is not None
        return self._fit(logits)

    def _cache_new_rows(self) -> None:
        """Cache all but the root of rows that have not drafted yet, without padding the others."""
        model, limit = self.model, self.model.max_context_len
        texts = {
            row: text[:-1][:limit]
            for row, text in enumerate(self._committed)
            if len(text) > 1 and not model.lengths[row]
        }
        if texts:
            others, order = set_apart([*texts], len(self._committed))
            if len(others):
                model.reorder(others)
            else:  # no cache is copied
                model.reserve(len(texts), model.cache.capacity, join=False)
            model.prefill([*texts.values()], join=bool(len(others)))
            model.reorder(order)

    def _known(self, tokens: Sequence[int]) -> list[int]:
        """Tokens behind a smaller vocabulary read as its last one: any will do, none is right."""
        return [min(token, self.model.vocab_size - 1) for token in tokens]

    def _fit(self, logits: Tensor) -> Tensor:
        """Crop, pad or scatter the last dimension to the vocabulary that the draft is in."""
        if self.bridge:
            if self._retokenizes:
                return logits
            fitted = logits.new_full((*logits.shape[:-1], self.vocab_size), float("-inf"))
            fitted[..., self.bridge.target_ids] = logits[..., self.bridge.draft_ids]
            return fitted
        missing = self.vocab_size - logits.shape[-1]
        if missing <= 0:
            return logits[..., : self.vocab_size] if missing else logits
        return pad(logits, (0, missing), value=float("-inf"))

    def _own(self, tokens: Tensor) -> Tensor:
        """Drafted tokens as the model reads them."""
        if self.bridge is None or self._retokenizes:
            return tokens
        return self.bridge.to_draft[tokens]

    def _chain(
        self, logits: Tensor, num_levels: int, budget: Sequence[int], sampler: Sampler
    ) -> Draft:
        # A row whose context is full drafts nothing and must not grow with its neighbors.
        counts = [int(limit > 0) for limit in budget]
        chosen: list[Tensor] = []  # [B, 1] of each level
        reported: list[Tensor] = []
        lengths = torch.tensor([min(n, num_levels) for n in budget], device=logits.device)
        is_greedy = sampler.is_greedy or self._retokenizes
        if not is_greedy:  # the numbers of the target's committed tokens, which never fall
            held = [context.num_committed for context in self._contexts]
            held = held or [len(row) for row in self._committed]
            counters = torch.tensor(held, device=logits.device)
        survival: Tensor | float = 1.0
        is_ragged = bool(self.confidence_threshold) or min(budget) < num_levels
        for level in range(num_levels):
            scores = self._scores(logits, chosen, sampler)  # [B, V]
            if self.confidence_threshold:
                survival = scores.float().softmax(-1).amax(-1) * survival
                ended = survival < self.confidence_threshold
                lengths = torch.where(ended, lengths.clamp(max=level), lengths)
                # Only where it costs no synchronization does an ended batch save its forwards.
                if logits.device.type == "cpu" and bool((lengths <= level).all()):
                    break
            if is_greedy:
                chosen.append(scores.argmax(-1, keepdim=True))
            else:
                probs = sampler.probs(scores.unsqueeze(1)).squeeze(1)
                reported.append(probs)
                chosen.append(sample(probs, self._noise(sampler, counters, level)).unsqueeze(1))
            if level + 1 < num_levels:
                logits = self._fit(self.model.feed(self._own(chosen[-1]), counts))
        if not chosen:
            return Draft.empty(len(budget), logits.device)
        tokens = torch.cat(chosen, 1)  # [B, N]
        if is_ragged:
            lengths = lengths.clamp(max=tokens.shape[1])
            real = torch.arange(tokens.shape[1], device=tokens.device) < lengths.unsqueeze(1)
            tokens = tokens.masked_fill(~real, -1)
        return Draft.chain(tokens, lengths, torch.stack(reported, 1) if reported else None)

    def _scores(self, logits: Tensor, chosen: list[Tensor], sampler: Sampler) -> Tensor:
        """Process the newest level's logits [B, V] in the context of the chain so far."""
        if sampler.is_plain or self._retokenizes:  # which are the target's settings, and ids
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


def _differing(draft: Any, target: Any) -> list[str]:
    known = target.get_vocab()
    return [token for token, index in draft.get_vocab().items() if known.get(token) != index]


def check_same_tokenizer(draft: Any, target: Any, path: str, way_out: str = "") -> None:
    """Refuse a drafter whose ids mean other text; a padded vocabulary is fine."""
    if draft is None or target is None:
        return
    if differing := _differing(draft, target):
        raise ValueError(
            f"drafter {path!r} has another tokenizer than the target: {len(differing)} of "
            f"{len(draft.get_vocab())} tokens differ, {differing[0]!r} for one; drafting needs a "
            f"model with the target's own tokenizer{way_out}"
        )


def base_mark(model: Any) -> str:
    """Hash of the signs of the input embedding, which no quantization touches."""
    weight = model.get_input_embeddings().weight.detach()
    stride = max(1, weight.numel() // 2**20)
    signs = weight.reshape(-1)[::stride].signbit().cpu()
    return hashlib.sha256(signs.numpy().tobytes()).hexdigest()


def save_adapter(model: Any, folder: Path, weights: dict[str, Tensor], mark: str) -> None:
    """Write a peft model's adapter, of these weights, in peft's own layout with its base's mark."""
    model.save_pretrained(folder, state_dict=weights)
    (folder / _BASE_FILE).write_text(json.dumps({"embedding": mark}, indent=1) + "\n")


def merged_adapter(model: Any, base: Any, weights: dict[str, Tensor]) -> Any:
    """A plain model that says what a peft model does; its base, not quantized, is changed."""
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    plain = get_peft_model(base, model.peft_config["default"])
    set_peft_model_state_dict(plain, get_peft_model_state_dict(model, state_dict=weights))
    return plain.merge_and_unload()


def load_adapter(model: Any, adapter: str) -> Any:
    """Put the adapter of a folder or hub id on a causal LM, and on no other than its base."""
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise ValueError(
            f"adapter needs the package peft; install it with: {install('train')}"
        ) from error
    folder = Path(find_checkpoint(adapter, "a folder with an adapter"))
    if folder.is_dir():
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"adapter {str(folder)!r} has no {name}; other formats than peft's are not read"
                )
        mark = folder / _BASE_FILE
        if mark.is_file() and read_json(mark).get("embedding") != base_mark(model):
            raise ValueError(
                f"adapter {str(folder)!r} was trained on another base than this model: their "
                "embeddings differ; load it with the path of its own base"
            )
    try:
        with LOADING:
            adapted = PeftModel.from_pretrained(model, str(folder))
    except (RuntimeError, ValueError) as error:
        text = str(error).splitlines()[0]
        raise ValueError(
            f"adapter {adapter!r} does not fit its base ({text}); it was trained on another model"
        ) from error
    if folder.is_dir():
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            # peft leaves out what it does not find; a part of an adapter is a wrong drafter.
            odd = sorted({*file.keys()} ^ {*get_peft_model_state_dict(adapted)})
        if odd:
            raise ValueError(
                f"adapter {str(folder)!r} does not fit its base: {len(odd)} tensors differ, "
                f"{odd[0]} for one; it was trained on another model"
            )
    return adapted
