"""The part of exllamav2 0.3.2 that an adapter sees, as strict as the real one or stricter."""

from types import SimpleNamespace

import paged_model
import torch
from torch.nn.functional import pad

torch.set_num_threads(1)


class ExLlamaV2Config:
    def __init__(self, model_dir=None):
        self.model_dir, self.max_input_len, self.max_output_len = model_dir, 2048, None


class ExLlamaV2Cache:
    def __init__(
        self,
        model,
        batch_size=1,
        max_seq_len=-1,
        copy_from=None,
        lazy=False,
        num_key_value_heads=None,
        fixed_device=None,
    ):
        assert lazy
        assert batch_size == 1, "pages are for one row of all tokens"
        self.max_seq_len, self.current_seq_len = max_seq_len, 0


class ExLlamaV2Cache_Q8(ExLlamaV2Cache):
    pass


class PagedParams:
    def __init__(
        self,
        batch_size,
        block_index,
        cache_seqlens,
        max_cache_seqlen,
        page_size,
        q_len=0,
        alt_rope_embed=None,
        rope_offsets=None,
    ):
        assert q_len > 0
        assert max_cache_seqlen == cache_seqlens.max()
        assert len(block_index) == len(cache_seqlens) == batch_size
        self.block_index, self.cache_seqlens = block_index, cache_seqlens
        self.page_size, self.q_len = page_size, q_len


attn = SimpleNamespace(
    has_flash_attn_with_paged=True, ExLlamaV2Attention=SimpleNamespace(PagedParams=PagedParams)
)


class ExLlamaV2:
    def __init__(self, config, lazy_load=False, archparams=None):
        self.config = config

    def load_autosplit(
        self,
        cache,
        reserve_vram=None,
        last_id_only=False,
        callback=None,
        callback_gen=None,
        progress=False,
    ):
        self.paged = paged_model.PagedModel()
        self.cache, self.page_size = cache, None
        self.paged.load(self.config.model_dir, cache.max_seq_len, None)
        model = self.paged.model
        block = [SimpleNamespace(name="Attention"), SimpleNamespace(name="MLP")]
        norm = SimpleNamespace(name="RMSNorm", forward=lambda x: model.model.norm(x.float()))
        self.padding = -model.config.vocab_size % 32
        self.modules = [
            SimpleNamespace(name="Embedding"),
            *block * model.config.num_hidden_layers,
            norm,
            SimpleNamespace(name="Linear", padding=self.padding, device=lambda: "cpu"),
        ]
        self.head_layer_idx = len(self.modules) - 1

    def forward_chunk(
        self,
        input_ids,
        cache=None,
        input_mask=None,
        preprocess_only=False,
        last_id_only=False,
        loras=None,
        return_last_state=False,
        position_offsets=None,
        abort_event=None,
        attn_params=None,
        extract_state_indices=None,
        **kwargs,
    ):
        assert cache is self.cache
        assert isinstance(attn_params, PagedParams)
        assert attn_params.q_len == input_ids.shape[1]
        assert cache.current_seq_len == 0, "it only grows"
        cache.current_seq_len += input_ids.shape[1]
        self.paged.page_size = attn_params.page_size
        logits, taps, unnormed = self.paged.forward(
            input_ids, attn_params.block_index, attn_params.cache_seqlens, last_only=last_id_only
        )
        states = {1 + 2 * layer: tap for layer, tap in enumerate(taps[:-1])}
        states[self.head_layer_idx - 1] = unnormed
        states = {index: states[index] for index in extract_state_indices or ()}
        padded = pad(logits, (0, self.padding), value=-65504.0)
        return {"logits": padded} | ({"states": states} if states else {})
