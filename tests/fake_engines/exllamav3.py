"""The part of exllamav3 1.6.5 that an adapter sees, as strict as the real one or stricter."""

from types import SimpleNamespace

import paged_model
import torch
from torch.nn.functional import pad

PAGE_SIZE = 256
IS_RECURRENT = False


class Config:
    @staticmethod
    def from_directory(directory, **kwargs):
        return SimpleNamespace(directory=directory)


class CacheLayer_fp16:
    pass


class CacheLayer_quant:
    pass


class Cache:
    def __init__(
        self,
        model,
        max_num_tokens,
        layer_type=None,
        max_batch_size=16,
        max_history=0,
        recurrent_dtype=torch.half,
        **kwargs,
    ):
        assert max_num_tokens % PAGE_SIZE == 0
        assert set(kwargs) == ({"k_bits", "v_bits"} if layer_type is CacheLayer_quant else set())
        assert not hasattr(model, "output_device"), "a cache must be there when the model is loaded"
        self.max_num_tokens, model.cache = max_num_tokens, self


class Model:
    def __init__(self, config):
        self.config = config

    @staticmethod
    def from_config(config, component="text", **kwargs):
        return Model(config)

    def get_recurrent_layers(self):
        return ["mamba"] if IS_RECURRENT else []

    def load(self, device=None, **kwargs):
        self.paged, self.output_device = paged_model.PagedModel(), torch.device("cpu")
        self.paged.load(self.config.directory, self.cache.max_num_tokens, PAGE_SIZE)
        embed = self.paged.model.get_input_embeddings()
        embedding = SimpleNamespace(forward=lambda x, params: embed(x).to(paged_model.DTYPE))
        blocks = [SimpleNamespace()] * self.paged.model.config.num_hidden_layers
        head = SimpleNamespace(key="lm_head")
        self.modules = [embedding, *blocks, SimpleNamespace(key="model.norm"), head]
        self.logit_layer_idx = len(self.modules) - 1

    def forward(self, input_ids, params=None):
        assert params["attn_mode"] == "flash_attn"
        assert params["cache"] is self.cache
        logits, taps, _ = self.paged.forward(
            input_ids,
            params["block_table"],
            params["cache_seqlens"],
            last_only=params.get("last_tokens_only") == 1,
        )
        layers, norms = params.get("export_state_layers"), params.get("export_state_norm_keys")
        assert not layers or max(layers) + 2 < len(taps), "the last layer's output is not normed"
        exported = [tap for layer, tap in enumerate(taps[1:]) if layer in layers]
        exported += [taps[-1]] if "model.norm" in norms else []
        if exported:
            params["export_states"] = exported
        return pad(logits, (0, 31), value=100.0)  # to be cropped before anything is drawn
