"""An ExLlamaV3 model, EXL3 or unquantized, as target."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.targets.exllama import PagedTarget


class ExLlamaV3Target(PagedTarget):
    """A model of exllamav3 1.6, on the GPUs that CUDA_VISIBLE_DEVICES names."""

    engine_name = "exllamav3"

    def _load(self, cache_mode: str) -> torch.device:
        engine = self._engine
        self._model: Any = engine.Model.from_config(engine.Config.from_directory(self.path))
        if self._model.get_recurrent_layers():
            raise ValueError(
                f"{self.path!r} has layers that cannot be rolled back after a rejection "
                "(recurrent); use a model with attention only"
            )
        is_full = cache_mode == "FP16"
        bits = {} if is_full else dict.fromkeys(("k_bits", "v_bits"), int(cache_mode[1:]))
        layer_type = engine.CacheLayer_fp16 if is_full else engine.CacheLayer_quant
        self._cache = engine.Cache(self._model, self.cache_tokens, layer_type, **bits)
        self._model.load()
        return self._model.output_device

    def _run(
        self, ids: Tensor, pages: Tensor, lengths: Tensor, taps: Sequence[int], is_prefill: bool
    ) -> tuple[Tensor, dict[int, Tensor]]:
        last, modules = self.config.num_hidden_layers, self._model.modules
        norm = modules[self._model.logit_layer_idx - 1]
        params: dict[str, Any] = {
            "attn_mode": "flash_attn",
            "cache": self._cache,
            "block_table": pages,
            "cache_seqlens": lengths,
            # Layer i puts out `hidden_states[i + 1]`, but the last is to be had behind the norm.
            "export_state_layers": {tap - 1 for tap in taps if 0 < tap < last},
            "export_state_norm_keys": {norm.key} if last in taps else set(),
            "last_tokens_only": int(is_prefill),
        }
        logits = self._model.forward(ids, params)
        exported = sorted(tap for tap in taps if tap > 0)  # in the order of the layers
        hidden = dict(zip(exported, params.get("export_states", ()), strict=True))
        if 0 in taps:
            hidden[0] = modules[0].forward(ids, {})
        return logits, hidden
