"""A block head in compiled pieces: features are fed, a block is run and its tree grown in one."""

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from specdec.common.compile import CAPACITY, CHILDREN, ROWS, SEEN, WIDTH, bucket
from specdec.drafters.heads import compile_head
from specdec.drafters.tree_growth import Candidates, best_children
from specdec.engine.kv_cache import SlotCache
from specdec.targets.compiled import StepCache, seen_slots


class CompiledBlocks:
    """Pieces for any number of rows, features, slots and children of a node.

    Args:
        head: a `DFlashHead` in eval mode.
        window: features that a block looks back at; None for all.
        mode: "inductor" or "graphs".
    """

    def __init__(self, head: Any, window: int | None, mode: str) -> None:
        self._head, self._window, self.mode = head, window, mode
        self._device = next(head.parameters()).device
        self._pieces: dict[bool, Callable[..., list[Tensor]]] = {}

    def step(
        self, taps: list[Tensor], counts: list[int], root: Tensor, cache: SlotCache, width: int
    ) -> tuple[Tensor, Tensor, list[Candidates]]:
        """Cache features, and run the block of a root.

        Args:
            taps: [B, n, H] each, of which the first `counts[b]` are kept.
            counts: of each row.
            root: [B].
            cache: the head's, which has been written to before.
            width: children taken of each node, and nodes expanded a level; 0 grows nothing.

        Returns:
            outputs [B, K, H], logits [B, K, V] without a Markov head's part, and the candidates of
            each level.
        """
        if self.mode == "graphs":  # few shapes, or else few of them would be met again
            more = bucket(taps[0].shape[1]) - taps[0].shape[1]
            taps = [pad(tap, (0, 0, 0, more)) for tap in taps]
        cache.open(taps[0].shape[1] + self._head.options.block_size)
        num_seen = seen_slots(cache) if self.mode == "graphs" else cache.end
        facts = [
            cache.device_lengths,
            torch.tensor(counts, device=self._device),
            root,
            torch.empty(max(width, 1), dtype=torch.bool, device=self._device),
            torch.arange(num_seen, device=self._device),
        ]
        if (is_grown := width > 0) not in self._pieces:
            self._pieces[is_grown] = self._compiled(is_grown)
        states = chain(*(cache.states or []))
        outputs, logits, *found = self._pieces[is_grown](*taps, *facts, *states)
        cache.extend(counts)
        levels = [Candidates(*found[at : at + 3]) for at in range(0, len(found), 3)]
        return outputs, logits, levels

    def _compiled(self, is_grown: bool) -> Callable[..., list[Tensor]]:
        head, num_taps, size = self._head, len(self._head.taps), self._head.options.block_size

        def run(*given: Tensor) -> list[Tensor]:
            taps, facts, held = given[:num_taps], given[num_taps:][:5], given[num_taps + 5 :]
            start, counts, root, children, slots = facts
            states = [*zip(held[::2], held[1::2], strict=True)]
            new = start.unsqueeze(1) + torch.arange(taps[0].shape[1], device=root.device)
            features = head.fuse(dict(zip(head.taps, taps, strict=True)))
            head.remember(features, new, StepCache(states, new, slots.shape[0]))
            steps = torch.arange(size, device=root.device)
            lengths = (start + counts).unsqueeze(1)
            own = lengths + steps
            column = slots - lengths  # [B, K], below 0 for what is committed
            committed = column < 0
            if self._window is not None:
                committed = committed & (column >= -self._window)
            last = steps if head.options.causal else torch.full_like(steps, size - 1)
            inside = column.unsqueeze(1)
            mask = committed.unsqueeze(1) | ((inside >= 0) & (inside <= last.unsqueeze(1)))
            cache = StepCache(states, own, slots.shape[0])
            outputs = head(head.block(root), own, mask.unsqueeze(1), cache)[:, head.first :]
            logits = head.logits(outputs)
            grown = self._grown(root, outputs, logits, children) if is_grown else []
            return [outputs, logits, *grown]

        parameter, config = next(head.parameters()), head.config
        tap = parameter.new_zeros(2, 3, head.fc.in_features // num_taps)
        shape = 2, config.num_key_value_heads, 31, config.head_dim
        rows, slots = (torch.arange(size, device=self._device) for size in (2, 23))
        inputs = [*[tap] * num_taps, rows, rows, rows, slots[:4].bool(), slots]
        sizes: list[list[str | None]] = [[ROWS, WIDTH, None]] * num_taps + [[ROWS]] * 3
        sizes += [[CHILDREN if is_grown else None], [SEEN]]
        num_held = 2 * head.num_layers
        inputs += [parameter.new_zeros(shape) for _ in range(num_held)]
        sizes += [[ROWS, None, CAPACITY, None]] * num_held
        name = f"block, grown {is_grown}, with a window of {self._window}"
        return compile_head(head, self.mode, name, run, inputs, sizes, num_held)

    def _grown(self, root: Tensor, outputs: Tensor, logits: Tensor, children: Tensor) -> Any:
        """EAGLE-2's tree from the slots of a block: tokens, scores and parents of each level."""
        head, width = self._head, children.shape[0]
        above = torch.zeros(root.shape[0], 1, device=root.device)
        places = torch.full((root.shape[0], 1), -1, device=root.device)
        previous, first, found = root.unsqueeze(1), 0, []
        for level in range(head.max_depth):
            scores = logits[:, level : level + 1]
            if head.options.markov:
                scores = scores + head.transition(outputs[:, level : level + 1], previous)
            tokens, totals, parents = best_children(scores, above, places, width, head.token_map)
            found += [tokens, totals, parents]
            above, best = totals.topk(width, 1)
            previous, places = tokens.gather(1, best), best + first
            first = first + tokens.shape[1]
        return found
