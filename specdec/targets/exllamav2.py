"""An ExLlamaV2 model, EXL2 or unquantized, as target."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from specdec.targets.exllama import MAX_FORWARD, PAGE, PagedTarget


class ExLlamaV2Target(PagedTarget):
    """A model of exllamav2 0.3, on the GPUs that CUDA_VISIBLE_DEVICES names."""

    engine_name = "exllamav2"

    def _load(self, cache_mode: str) -> str:
        if not self._engine.attn.has_flash_attn_with_paged:
            raise RuntimeError("exllamav2 has no paged attention: pip install 'flash-attn>=2.5.7'")
        config = self._engine.ExLlamaV2Config(self.path)
        config.max_input_len = MAX_FORWARD
        self._model: Any = self._engine.ExLlamaV2(config)
        # `ExLlamaV2Cache_8bit` knows no page tables; Q8 is another class.
        suffix = "" if cache_mode == "FP16" else f"_{cache_mode}"
        cache_class = getattr(self._engine, f"ExLlamaV2Cache{suffix}")
        self._cache = cache_class(self._model, max_seq_len=self.cache_tokens, lazy=True)
        self._model.load_autosplit(self._cache)
        # The input of block n is `hidden_states[n]`; that of the final norm is the last, unnormed.
        starts, modules = ("Attention", "ParallelDecoder"), enumerate(self._model.modules)
        self._taps = [index for index, module in modules if module.name in starts]
        self._taps.append(self._model.head_layer_idx - 1)
        return self._model.modules[-1].device()

    def _run(
        self, ids: Tensor, pages: Tensor, lengths: Tensor, taps: Sequence[int], is_prefill: bool
    ) -> tuple[Tensor, dict[int, Tensor]]:
        params = self._engine.attn.ExLlamaV2Attention.PagedParams(
            batch_size=len(ids),
            block_index=pages,
            cache_seqlens=lengths,
            max_cache_seqlen=int(lengths.max()),
            page_size=PAGE,
            q_len=ids.shape[1],
        )
        self._cache.current_seq_len = 0  # the engine counts on, though pages leave it no meaning
        out = self._model.forward_chunk(
            ids,
            cache=self._cache,
            last_id_only=is_prefill,
            attn_params=params,
            extract_state_indices=[self._taps[tap] for tap in taps],
        )
        hidden = {tap: out["states"][self._taps[tap]] for tap in taps}
        if (last := len(self._taps) - 1) in hidden:
            hidden[last] = self._model.modules[self._taps[last]].forward(hidden[last])
        return out["logits"], hidden
