"""Attention of targets: 4D masks for chains and trees, and grouped queries without key copies."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from specdec.engine.kv_cache import SlotCache

NAME = "specdec_sdpa"


def grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' "sdpa" does, with query heads sharing keys instead of copies.

    transformers copies the keys for every query head as soon as there is a mask, because CUDA's
    kernels would fall back to a slow path; a CPU does not. Everything else is passed on.
    """
    has_bias = kwargs.get("position_bias") is not None
    if attention_mask is None or query.device.type != "cpu" or has_bias:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
    is_grouped = query.shape[1] != key.shape[1]
    attended = scaled_dot_product_attention(
        query, key, value, attention_mask, dropout, scale=scaling, enable_gqa=is_grouped
    )
    return attended.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def use_grouped_attention(model: Any) -> None:
    """Switch a model that runs on "sdpa"; one that needs another implementation keeps it."""
    if getattr(model.config, "_attn_implementation", None) == "sdpa":
        model.set_attn_implementation(NAME)


class Masks:
    """Builds the attention mask of a forward over new tokens behind cached ones.

    The text config says which layers slide and how far they look. Masks are boolean, as "sdpa"
    takes them; "eager" attention adds its mask to the scores, and needs it in a floating `dtype`.
    """

    def __init__(self, config: Any, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self._device, self._dtype = device, dtype
        # Tokens that a sliding layer sees, the new one included; 0: no layer slides.
        self.window = int(getattr(config, "sliding_window", None) or 0)
        layer_types = getattr(config, "layer_types", None)
        # Families with layer_types take one mask a type, the others one mask for all layers.
        self._layer_types = set(layer_types) if layer_types else None
        if self._layer_types and not self._layer_types <= {"full_attention", "sliding_attention"}:
            # Recurrent layers take a mask for padding, of which there is none.
            self._layer_types |= {"full_attention", "linear_attention"}
        if self._layer_types and "sliding_attention" not in self._layer_types:
            self.window = 0
        self._causal = torch.ones(0, 0, dtype=torch.bool, device=device)
        self.may_be_none = True  # compiled code takes a mask in any case

    def chain(self, cache: SlotCache, num_new: int) -> Any:
        """Mask `num_new` tokens a row, each behind the one before; None where all is seen."""
        end = max(cache.lengths) + num_new
        # At the edge itself nothing is out of sight yet, but transformers would make its own mask.
        is_windowed = 0 < self.window <= end
        if cache.is_uniform and not is_windowed:
            if num_new == 1 and self.may_be_none:
                return None
            shared = self._tril(end)[end - num_new : end, :end]
            return self._by_layer(shared.expand(len(cache.lengths), 1, -1, -1))
        slots = torch.arange(end, device=self._device)
        queries = cache.device_lengths.unsqueeze(1) + torch.arange(num_new, device=self._device)
        ahead = queries.unsqueeze(2) - slots  # [B, n, K] how far the key lies back
        full = (ahead >= 0).unsqueeze(1)
        return self._by_layer(full, (ahead < self.window).unsqueeze(1) if is_windowed else None)

    def tree(self, cache: SlotCache, own: Tensor, depths: Tensor) -> Any:
        """Mask the last n of S uncommitted tokens, which lie behind the committed ones.

        `own` [B, n, S] says which uncommitted tokens each new one sees, itself included; `depths`
        [B, S] how far behind the first uncommitted position each one stands.
        """
        batch, num_new, num_open = own.shape
        start = max(cache.lengths)
        end = start + num_open
        if cache.is_uniform and not 0 < self.window < end:
            return self._by_layer(pad(own, (start, 0), value=True).unsqueeze(1))
        slots = torch.arange(end, device=self._device)
        offset = slots - cache.device_lengths.unsqueeze(1)  # [B, K] < 0 in the prefix
        inside = offset.clamp(0, num_open - 1)
        seen = own.gather(2, inside.unsqueeze(1).expand(batch, num_new, end))
        full = (seen & (offset < num_open).unsqueeze(1)) | (offset < 0).unsqueeze(1)
        if not 0 < self.window < end:
            return self._by_layer(full.unsqueeze(1))
        # Relative to the first uncommitted position: prefix slots lie at `offset`.
        position = torch.where(offset < 0, offset, depths.gather(1, inside))
        queries = depths[:, num_open - num_new :]
        near = queries.unsqueeze(2) - position.unsqueeze(1) < self.window
        return self._by_layer(full.unsqueeze(1), near.unsqueeze(1))

    def _by_layer(self, full: Tensor, near: Tensor | None = None) -> Any:
        """Return the mask, or one for each type of layer; sliding layers see only what is near."""
        sliding = full if near is None else full & near
        if self._layer_types is None:
            return self._additive(sliding)
        masks = {"full_attention": full, "sliding_attention": sliding}
        shown = {name: self._additive(masks[name]) for name in masks if name in self._layer_types}
        return shown | dict.fromkeys(self._layer_types - {*masks})

    def _additive(self, mask: Tensor) -> Tensor:
        if self._dtype is None:
            return mask
        hidden = torch.finfo(self._dtype).min  # and not -inf, which softmax may turn into NaN
        return torch.zeros_like(mask, dtype=self._dtype).masked_fill_(~mask, hidden)

    def _tril(self, size: int) -> Tensor:
        """Return a causal mask of at least this size, built once and sliced."""
        if self._causal.shape[0] < size:
            size = max(2 * self._causal.shape[0], size, 256)
            self._causal = torch.ones(size, size, dtype=torch.bool, device=self._device).tril()
        return self._causal
