"""A small model of transformers whose keys and values stand in pages, as the exllama engines do it.

A forward goes row by row: it gathers what the row's page table names, feeds the row's tokens behind
it, and writes the new keys and values back. Pages start out as NaN.
"""

import torch
from transformers import AutoModelForCausalLM, DynamicCache

DTYPE = torch.float16  # of all that comes out; float32 to compare bit by bit


class PagedModel:
    def load(self, path, num_tokens, page_size):
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.num_tokens, self.page_size = num_tokens, page_size
        config = self.model.config
        shape = (config.num_hidden_layers, 2, config.num_key_value_heads, num_tokens)
        self.store = torch.full((*shape, config.head_dim), torch.nan)
        self.model.model.norm.register_forward_pre_hook(self._keep_unnormed)

    def _keep_unnormed(self, module, args):
        self.unnormed = args[0]

    def forward(self, ids, pages, lengths, *, last_only):
        """Logits [B, 1 or n, V], the taps, and what goes into the final norm."""
        assert ids.dtype == torch.int64
        assert pages.dtype == lengths.dtype == torch.int32
        assert {ids.device.type, pages.device.type, lengths.device.type} == {"cpu"}
        assert ids.numel() <= 2048, "the engine's buffers overflow without a word"
        batch, width = ids.shape
        used = [
            pages[row, : -(-(int(lengths[row]) + width) // self.page_size)].tolist()
            for row in range(batch)
        ]
        assert len({page for row in used for page in row}) == sum(map(len, used)), "shared pages"
        logits, taps, unnormed = [], [], []
        for row in range(batch):
            end = int(lengths[row]) + width
            assert end <= len(used[row]) * self.page_size, "the page table is too short"
            assert end <= self.model.config.max_position_embeddings, "no such rotary position"
            slots = torch.tensor(used[row]).repeat_interleave(self.page_size) * self.page_size
            slots = (slots + torch.arange(len(slots)) % self.page_size)[:end]
            cache = DynamicCache()
            for layer, both in enumerate(self.store[:, :, None, :, slots[:-width]]):
                cache.update(both[0], both[1], layer)
            out = self.model(ids[row : row + 1], None, None, cache, output_hidden_states=True)
            for layer, each in enumerate(cache.layers):
                new = torch.stack([each.keys[0, :, -width:], each.values[0, :, -width:]])
                self.store[layer, :, :, slots[-width:]] = new
            logits.append(out.logits[:, -1:] if last_only else out.logits)
            taps.append(out.hidden_states)
            unnormed.append(self.unnormed)
        hidden = [torch.cat(each).to(DTYPE) for each in zip(*taps, strict=True)]
        return torch.cat(logits).to(DTYPE), hidden, torch.cat(unnormed).to(DTYPE)
