"""What a feature store holds for every token, and how many bytes that takes."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from math import prod

import torch

from specdec.data.answers import AnswerRow

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
# The width that shares a scale in int8: a few channels of a residual stream are a hundred times
# larger than the rest, and would leave their token's other channels no codes.
GROUP_SIZE = 128

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Counts:
    """How much there is of what a store's size depends on. Counts of disjoint rows add up."""

    rows: int = 0
    tokens: int = 0
    spans: int = 0
    places: int = 0
    name_bytes: int = 0

    @classmethod
    def of(cls, rows: Iterable[AnswerRow]) -> "Counts":
        """Of these rows."""
        counts = [
            (len(row.tokens), len(row.answers), len(logit_places(row)), len(row_name(row)))
            for row in rows
        ]
        return cls(len(counts), *(sum(column) for column in zip(*counts, strict=True)))

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.rows + other.rows,
            self.tokens + other.tokens,
            self.spans + other.spans,
            self.places + other.places,
            self.name_bytes + other.name_bytes,
        )


def logit_places(row: AnswerRow) -> list[int]:
    """Places whose next token is an answer's: the only ones where logits are learned from."""
    return list(chain.from_iterable(range(max(s, 1) - 1, e - 1) for s, e in row.answers))


def row_name(row: AnswerRow) -> bytes:
    """What a row is called, as a line of JSON: id, domain and temperature."""
    return json.dumps([row.id, row.domain, row.temperature]).encode() + b"\n"


@dataclass(frozen=True)
class FeatureLayout:
    """What is kept of a target's view of a text.

    Attributes:
        taps: HF `hidden_states` indices, ascending.
        hidden_size: H of the target.
        vocab_size: V of the target.
        num_layers: L of the target.
        dtype: of the taps, one of `DTYPES`.
        group_size: channels that share a scale in int8; 0: all of a token.
        top_k: logits kept for each place; V keeps all of them, 0 none.
        logits_dtype: as the target gave them, a name in torch.
    """

    taps: tuple[int, ...]
    hidden_size: int
    vocab_size: int
    num_layers: int
    dtype: str = "bf16"
    group_size: int = GROUP_SIZE
    top_k: int = 64
    logits_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r} but must be one of {', '.join(DTYPES)}")
        if self.group_size < 0:
            raise ValueError(f"group_size is {self.group_size} but must be 0 or more channels")
        if not 0 <= self.top_k <= self.vocab_size:
            raise ValueError(
                f"top_k is {self.top_k} but must be within 0 and the target's vocabulary of "
                f"{self.vocab_size}"
            )
        if not self.top_k and self.num_layers not in self.taps:
            raise ValueError(
                f"top_k is 0, and without logits they are computed from tap {self.num_layers}, "
                f"the state after the target's final norm, which is not among the taps "
                f"{list(self.taps)}; add it to --taps, or keep logits with --top-k 64"
            )

    @property
    def id_dtype(self) -> torch.dtype:
        """Of token ids."""
        return torch.int16 if self.vocab_size <= 2**15 else torch.int32

    @property
    def num_groups(self) -> int:
        """Scales of a token and tap in int8."""
        return -(-self.hidden_size // (self.group_size or self.hidden_size))

    def tensors(self, counts: Counts) -> dict[str, tuple[torch.dtype, Shape]]:
        """Dtype and shape of every tensor of a shard with so many rows, tokens and places."""
        count = torch.int32
        found: dict[str, tuple[torch.dtype, Shape]] = {
            "tokens": (self.id_dtype, (counts.tokens,)),
            "row_lens": (count, (counts.rows,)),
            "answer_counts": (count, (counts.rows,)),
            "answers": (count, (counts.spans, 2)),
            "row_names": (torch.uint8, (counts.name_bytes,)),
        }
        for tap in self.taps:
            found[f"hidden.{tap}"] = (DTYPES[self.dtype], (counts.tokens, self.hidden_size))
            if self.dtype == "int8":
                found[f"scale.{tap}"] = (torch.bfloat16, (counts.tokens, self.num_groups))
        if self.top_k:
            dtype = getattr(torch, self.logits_dtype)
            found["top_logits"] = (dtype, (counts.places, self.top_k))
            if self.top_k < self.vocab_size:
                found["top_ids"] = (self.id_dtype, (counts.places, self.top_k))
                found["rest"] = (torch.float32, (counts.places,))
        return found

    def num_bytes(self, counts: Counts) -> int:
        """Bytes of all tensors, without the headers of their files."""
        return sum(prod(shape) * dtype.itemsize for dtype, shape in self.tensors(counts).values())
