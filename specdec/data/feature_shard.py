"""A shard in memory while it is filled."""

from collections.abc import Sequence

import torch
from safetensors.torch import save
from torch import Tensor

from specdec.data.answers import AnswerRow
from specdec.data.feature_layout import Counts, FeatureLayout, logit_places, row_name
from specdec.data.group_scales import to_int8
from specdec.data.top_logits import TopLogits


class ShardContent:
    """The tensors of a shard; rows are put into their places in any order.

    Args:
        layout: what is kept.
        rows: of the shard.
    """

    def __init__(self, layout: FeatureLayout, rows: Sequence[AnswerRow]) -> None:
        self.layout, self.rows, self.counts = layout, rows, Counts.of(rows)
        self.tensors = {
            name: torch.empty(shape, dtype=dtype)
            for name, (dtype, shape) in layout.tensors(self.counts).items()
        }
        self._first_token = _starts([len(row.tokens) for row in rows])
        self._first_place = _starts([len(logit_places(row)) for row in rows])
        spans = [span for row in rows for span in row.answers]
        self._fill("tokens", [token for row in rows for token in row.tokens])
        self._fill("row_lens", [len(row.tokens) for row in rows])
        self._fill("answer_counts", [len(row.answers) for row in rows])
        self._fill("answers", spans)
        self._fill("row_names", list(b"".join(row_name(row) for row in rows)))

    def _fill(self, name: str, values: Sequence[object]) -> None:
        self.tensors[name].copy_(torch.tensor(values).view(self.tensors[name].shape))

    def put_hidden(self, row: int, tap: int, states: Tensor) -> None:
        """Keep a tap [n, H] of the row with this number."""
        start = self._first_token[row]
        span = slice(start, start + len(states))
        stored = self.tensors[f"hidden.{tap}"]
        if self.layout.dtype == "int8":
            states, scales = to_int8(states, self.layout.group_size)
            self.tensors[f"scale.{tap}"][span].copy_(scales)
        stored[span].copy_(states)

    def put_logits(self, row: int, top: TopLogits) -> None:
        """Keep the logits of the row's `logit_places`."""
        start = self._first_place[row]
        span = slice(start, start + len(top.values))
        self.tensors["top_logits"][span].copy_(top.values)
        if top.ids is not None and top.rest is not None:
            self.tensors["top_ids"][span].copy_(top.ids)
            self.tensors["rest"][span].copy_(top.rest)

    def to_bytes(self) -> bytes:
        """As a safetensors file; the same content gives the same bytes."""
        return save(self.tensors)


def _starts(lengths: Sequence[int]) -> list[int]:
    """Where each of consecutive pieces starts."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return starts[:-1]
