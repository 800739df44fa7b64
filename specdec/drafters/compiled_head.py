"""The head of a `FeatureDrafter` in compiled pieces: to feed pairs, to grow a level of a tree."""

from collections.abc import Callable, Sequence
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

Names = list[str | None]


def _by_layer(states: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [*zip(states[::2], states[1::2], strict=True)]


class CompiledHead:
    """Pieces for any number of rows, pairs, nodes and slots.

    Args:
        head: a `FeatureHead` in eval mode.
        window: committed entries that it looks back at; None for all.
        mode: "inductor" or "graphs".
    """

    def __init__(self, head: Any, window: int | None, mode: str) -> None:
        self._head, self._window, self.mode = head, window, mode
        self._device = next(head.parameters()).device
        self._known_places, self._known_width = self._integers(0, 2), 0
        self._num_states = 2 * head.num_layers
        self._feed = self._compile_feed()
        if head.is_recursive:
            self._level = self._compile_level()

    def feed(
        self,
        tokens: Tensor,
        features: Tensor,
        positions: Tensor,
        mask: Tensor,
        wanted: Tensor,
        cache: SlotCache,
    ) -> tuple[Tensor, Tensor]:
        """Feed pairs to the slots that the cache was opened for.

        Args:
            tokens: [B, n].
            features: [B, n, F].
            positions: [B, n].
            mask: [B, 1, n, K].
            wanted: [B, w] places of the pairs whose outputs are wanted.
            cache: the head's.

        Returns:
            outputs [B, w, F] and logits [B, w, D].
        """
        slots = cache.new_slots
        if self.mode == "graphs":  # few shapes, or else few of them would be met again
            more = bucket(tokens.shape[1]) - tokens.shape[1]
            slots = cache.widen(tokens.shape[1] + more)
            tokens, positions = pad(tokens, (0, more)), pad(positions, (0, more))
            features = pad(features, (0, 0, 0, more))
            mask = pad(mask, (0, seen_slots(cache) - mask.shape[3], 0, more))
            mask[:, :, mask.shape[2] - more :, 0] = True  # a softmax over nothing is NaN
        states = chain(*(cache.states or []))
        outputs, logits = self._feed(tokens, features, positions, mask, slots, wanted, *states)
        return outputs, logits

    def grow(
        self, outputs: Tensor, logits: Tensor, cache: SlotCache, width: int, num_levels: int
    ) -> list[Candidates]:
        """Grow EAGLE-2's tree behind what is cached; the candidates of each level.

        Args:
            outputs: [B, 1, F] of the root.
            logits: [B, 1, D] of the root.
            cache: the head's.
            width: children taken of each node, and nodes expanded a level; 1 makes a chain.
            num_levels: levels of the tree.
        """
        batch, levels = len(outputs), []
        children = torch.empty(width, dtype=torch.bool, device=self._device)
        above = torch.zeros(batch, 1, device=self._device)
        places = torch.full((batch, 1), -1, device=self._device)
        if num_levels > 1:
            num_seen = cache.open(width * (num_levels - 1))
            num_seen = seen_slots(cache) if self.mode == "graphs" else num_seen
            slots = torch.arange(num_seen, device=self._device)
            states = [*chain(*(cache.states or []))]
            lengths = cache.device_lengths
            seen = torch.ones(batch, 1, 1, dtype=torch.bool, device=self._device)
        for place in self._places(width, num_levels - 1):
            node = (logits, above, places, outputs, seen)
            *found, places, above, seen, outputs, logits = self._level(
                *node, lengths, place, children, slots, *states
            )
            levels.append(Candidates(*found))
        levels.append(best_children(logits, above, places, width, self._head.token_map))
        return levels

    def _places(self, width: int, num_levels: int) -> Tensor:
        """Depth of each level, and the number of candidates before it: [levels, 2] int64."""
        if self._known_places.shape[0] < num_levels or self._known_width != width:
            firsts = [0, *(width + level * width**2 for level in range(max(num_levels, 8)))]
            places = torch.tensor([*enumerate(firsts)], device=self._device)
            self._known_places, self._known_width = places, width
        return self._known_places[:num_levels]

    def _compile_level(self) -> Callable[..., list[Tensor]]:
        def run(
            logits: Tensor,  # [B, m, D] of the beam
            above: Tensor,  # [B, m] its log-probabilities
            places: Tensor,  # [B, m] among all candidates
            outputs: Tensor,  # [B, m, F]
            seen: Tensor,  # [B, m, S] of the last committed entry and all nodes expanded
            lengths: Tensor,  # [B] committed entries
            place: Tensor,  # [2] depth of the beam below, and the candidates before this level
            children: Tensor,  # [k], for its size
            slots: Tensor,  # [K] 0, 1, ...
            *states: Tensor,
        ) -> list[Tensor]:
            width, num_open = children.shape[0], seen.shape[2]
            found = best_children(logits, above, places, width, self._head.token_map)
            tokens, totals, parents = found
            best = totals.topk(width, 1)
            origin = (best.indices // width).unsqueeze(2)  # [B, k, 1] in the beam before
            itself = torch.eye(width, dtype=torch.bool, device=seen.device)
            seen = torch.cat(
                [
                    seen.gather(1, origin.expand(-1, -1, num_open)),
                    itself.expand(totals.shape[0], -1, -1),
                ],
                2,
            )
            features = outputs.gather(1, origin.expand(-1, -1, outputs.shape[2]))
            new = torch.arange(width, device=seen.device)
            # Column 0 of `seen` stands for the last committed entry.
            own = lengths.unsqueeze(1) + (num_open - 1) + new
            column = slots - lengths.unsqueeze(1) + 1  # [B, K], below 1 for what is committed
            is_open = (column > 0) & (column < seen.shape[2])
            index = column.clamp(0, seen.shape[2] - 1).unsqueeze(1).expand(-1, width, -1)
            mask = seen.gather(2, index) & is_open.unsqueeze(1)
            committed = column <= 0
            if self._window is not None:
                committed = committed & (column > -self._window)
            outputs = self._head(
                tokens.gather(1, best.indices),
                self._head.carry(features),
                (lengths.unsqueeze(1) + place[0]).expand(-1, width),
                (mask | committed.unsqueeze(1)).unsqueeze(1),
                StepCache(_by_layer(states), own, slots.shape[0]),
            )
            logits = self._head.logits(outputs)
            below = best.indices + place[1]
            return [tokens, totals, parents, below, best.values, seen, outputs, logits]

        beam: Names = [ROWS, "beam"]
        outputs, logits = self._examples(2, 3)
        given = [
            (logits, [*beam, None]),
            (self._zeros(2, 3), beam),
            (self._integers(2, 3), beam),
            (outputs, [*beam, None]),
            (self._integers(2, 3, 5).bool(), [*beam, "open"]),
            (self._integers(2), [ROWS]),
            (self._integers(2), [None]),
            (self._integers(4).bool(), [CHILDREN]),
            (torch.arange(23, device=self._device), [SEEN]),
            *self._states(2),
        ]
        inputs, sizes = zip(*given, strict=True)
        name = f"level with a window of {self._window}"
        return compile_head(
            self._head, self.mode, name, run, inputs, sizes, num_held=self._num_states
        )

    def _compile_feed(self) -> Callable[..., list[Tensor]]:
        def run(
            tokens: Tensor,
            features: Tensor,
            positions: Tensor,
            mask: Tensor,
            slots: Tensor,
            wanted: Tensor,
            *states: Tensor,
        ) -> list[Tensor]:
            cache = StepCache(_by_layer(states), slots, mask.shape[-1])
            outputs = self._head(tokens, features, positions, mask, cache)
            outputs = outputs.gather(1, wanted.unsqueeze(2).expand(-1, -1, outputs.shape[2]))
            return [outputs, self._head.logits(outputs)]

        new: Names = [ROWS, WIDTH]
        given = [
            (self._integers(2, 3), new),
            (self._examples(2, 3)[0], [*new, None]),
            (self._integers(2, 3), new),
            (self._integers(2, 1, 3, 7).bool(), [ROWS, None, WIDTH, SEEN]),
            (self._integers(2, 3), new),
            (self._integers(2, 2), [ROWS, "wanted"]),
            *self._states(2),
        ]
        inputs, sizes = zip(*given, strict=True)
        return compile_head(
            self._head, self.mode, "feed", run, inputs, sizes, num_held=self._num_states
        )

    # --- Examples ---

    def _integers(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.long, device=self._device)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self._device)

    def _examples(self, rows: int, width: int) -> tuple[Tensor, Tensor]:
        """Outputs [rows, width, F] and their logits."""
        weight = next(self._head.parameters())
        outputs = weight.new_zeros(rows, width, self._head.config.hidden_size)
        with torch.no_grad():
            return outputs, self._head.logits(outputs)

    def _states(self, rows: int) -> list[tuple[Tensor, Names]]:
        """Keys and values of each layer."""
        config, weight = self._head.config, next(self._head.parameters())
        shape = rows, config.num_key_value_heads, 31, config.head_dim
        return [
            (weight.new_zeros(shape), [ROWS, None, CAPACITY, None]) for _ in range(self._num_states)
        ]
