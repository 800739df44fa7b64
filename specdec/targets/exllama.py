"""The shared half of the exllama targets: rows in pages of one cache, chains only."""

from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from specdec.common.distribution import install
from specdec.common.files import first_line
from specdec.engine.interfaces import Capabilities, Prompts, TargetOutput
from specdec.engine.metrics import ForwardClock
from specdec.targets import load
from specdec.targets.hf import PREFILL_CHUNK, TargetEnds
from specdec.verify import Draft, Verdict

PAGE = 256  # both engines', and flash attention's
MAX_FORWARD = 2048  # tokens, which their buffers are made for
MAX_PADDING = 64  # tokens behind a row's draft, where another row drafts more


class PagedTarget(TargetEnds):
    """A folder in an engine whose attention takes page tables: a row is its length and its pages.

    `cache_tokens` are those of all rows together, padding included. A subclass loads the engine's
    model and its cache, and runs it; `model` says what it is, and holds no weights.

    Raises:
        RuntimeError: the engine cannot be imported or run here.
    """

    engine_name: str
    capabilities = Capabilities(trees=False)
    dtype = torch.float16  # of hidden states, and of the ends that draft heads are built from

    def __init__(self, path: str, cache_mode: str = "FP16", cache_tokens: int = 2**15) -> None:
        self._engine = _import(self.engine_name)
        config = AutoConfig.from_pretrained(path)
        with load.LOADING, torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=self.dtype)
        model.is_quantized = hasattr(config, "quantization_config")
        with suppress(OSError):
            model.generation_config = GenerationConfig.from_pretrained(path)
        super().__init__(model, load.load_tokenizer(path, None, trust_remote_code=False))
        self.path = path
        self.cache_tokens = -(-cache_tokens // PAGE) * PAGE
        self.max_context_len = min(self.max_context_len, self.cache_tokens) - MAX_PADDING
        self.lengths: list[int] = []
        self._pages: list[list[int]] = []  # of every row
        self._free = list(range(self.cache_tokens // PAGE))
        self.device = torch.device(self._load(cache_mode))
        self.clock = ForwardClock(self.device)

    def _load(self, cache_mode: str) -> str | torch.device:
        """Load model and cache; returns the device of the logits."""
        raise NotImplementedError

    def _run(
        self, ids: Tensor, pages: Tensor, lengths: Tensor, taps: Sequence[int], is_prefill: bool
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Feed ids [B, n] behind `lengths` [B] into `pages` [B, P], all of them on the CPU.

        Returns logits [B, n, V or more], of the last token alone in a prefill, and the taps.
        """
        raise NotImplementedError

    @cached_property
    def ends(self) -> TargetEnds:
        """Embedding and projection of an unquantized folder, which draft heads are built from."""
        return load.load_ends(self.path, dtype=self.dtype, device=self.device)

    def prefill(
        self, prompts: Prompts, taps: Sequence[int] = (), *, join: bool = False
    ) -> TargetOutput:
        """Cache every prompt by itself, without padding; logits [B, 1, V]."""
        if not join:
            self._keep([])
        logits, hidden = [], []
        for prompt in prompts:
            row, parts = len(self.lengths), []
            self.lengths.append(0)
            self._pages.append([])
            for ids in torch.tensor([prompt]).split(PREFILL_CHUNK, 1):
                parts.append(self._forward(ids, [row], taps, is_prefill=True))
                self.lengths[row] += ids.shape[1]
            logits.append(parts[-1].logits)
            hidden.append({tap: torch.cat([p.hidden[tap][0] for p in parts]) for tap in taps})
        states = {tap: pad_sequence([row[tap] for row in hidden], True) for tap in taps}
        return TargetOutput(torch.cat(logits), states)

    def score(self, root: Tensor, draft: Draft, taps: Sequence[int] = ()) -> TargetOutput:
        """Run one forward over root [B] and nodes [B, N]; logits [B, N + 1, V]. Commits nothing."""
        if draft.num_nodes > MAX_PADDING:
            raise ValueError(f"the draft has {draft.num_nodes} nodes; at most {MAX_PADDING} fit")
        ids = torch.cat([root.unsqueeze(1), draft.tokens.clamp(min=0)], 1).cpu()
        return self._forward(ids, range(len(ids)), taps, is_prefill=False)

    def commit(self, verdict: Verdict, num_accepted: Sequence[int]) -> None:
        """Keep root and accepted chain: what lies behind a row's length is written over."""
        self.lengths = [n + new + 1 for n, new in zip(self.lengths, num_accepted, strict=True)]

    def reorder(self, rows: Tensor) -> None:
        self._keep(rows.tolist())

    def _keep(self, rows: list[int]) -> None:
        self._free += [p for i, row in enumerate(self._pages) if i not in rows for p in row]
        self._pages = [self._pages[row] for row in rows]
        self.lengths = [self.lengths[row] for row in rows]

    def _forward(
        self, ids: Tensor, rows: Sequence[int], taps: Sequence[int], *, is_prefill: bool
    ) -> TargetOutput:
        needed = [-(-(self.lengths[row] + ids.shape[1]) // PAGE) for row in rows]
        missing = [max(0, n - len(self._pages[row])) for n, row in zip(needed, rows, strict=True)]
        if ids.numel() > MAX_FORWARD or sum(missing) > len(self._free):
            raise MemoryError(
                f"{len(rows)} rows need more than a cache of {self.cache_tokens} tokens or "
                f"a forward of {MAX_FORWARD}; decode fewer together, or give more cache_tokens"
            )
        for row, count in zip(rows, missing, strict=True):
            self._pages[row] += [self._free.pop() for _ in range(count)]
        tables = [torch.tensor(self._pages[row], dtype=torch.int32) for row in rows]
        lengths = torch.tensor([self.lengths[row] for row in rows], dtype=torch.int32)
        with torch.inference_mode(), self.clock.forward():
            pages = pad_sequence(tables, batch_first=True)
            logits, hidden = self._run(ids, pages, lengths, taps, is_prefill)
        states = {tap: state.to(self.device, self.dtype) for tap, state in hidden.items()}
        return TargetOutput(logits[..., : self.vocab_size].to(self.device), states)


def _import(name: str) -> Any:
    """Import an engine, which compiles its kernels at first and changes torch's threads."""
    num_threads = torch.get_num_threads()
    try:
        return import_module(name)
    except Exception as error:  # an OSError without CUDA, and whatever a compiler raises
        raise RuntimeError(
            f"engine {name} cannot be imported: {first_line(error)}; it needs CUDA with nvcc, and "
            f"{install('exllama')}"
        ) from error
    finally:
        torch.set_num_threads(num_threads)
