"""The format of feature stores: what is kept of the target's view of its answers, and the index."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor

from specdec.checkpoints import TargetIdentity
from specdec.checkpoints.identity import TARGET, as_json
from specdec.common.config import Config, read_model
from specdec.common.provenance import MachineProvenance
from specdec.data.answers import AnswerRow, AnswersManifest
from specdec.registry import head_class, head_kinds

INDEX = "features.json"
DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}

Count = Annotated[int, Field(ge=0)]
LogitsDtype = Literal["float32", "bfloat16", "float16"]


def logit_places(row: AnswerRow) -> list[int]:
    """List the places whose next token is an answer's: the only ones that logits teach at."""
    return list(chain.from_iterable(range(max(s, 1) - 1, e - 1) for s, e in row.answers))


def row_name(row: AnswerRow) -> bytes:
    """Name a row by a line of JSON: id, domain and temperature."""
    return json.dumps([row.id, row.domain, row.temperature]).encode() + b"\n"


@dataclass(frozen=True)
class Counts:
    """Everything that the size of rows in a store depends on."""

    rows: int
    tokens: int
    spans: int
    places: int
    name_bytes: int

    @classmethod
    def of(cls, rows: Sequence[AnswerRow]) -> "Counts":
        """Count these rows."""
        return cls(
            rows=len(rows),
            tokens=sum(len(row.tokens) for row in rows),
            spans=sum(len(row.answers) for row in rows),
            places=sum(len(logit_places(row)) for row in rows),
            name_bytes=sum(len(row_name(row)) for row in rows),
        )


class FeatureLayout(Config):
    """The part of a target's view of a text that is kept."""

    # Stores of an older version say how int8 taps, which are gone, were grouped.
    model_config = ConfigDict(extra="ignore")

    taps: tuple[Count, ...] = Field(description="indices into hidden_states, ascending")
    hidden_size: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    num_layers: int = Field(ge=1)
    dtype: Literal["bf16", "float32"] = Field(default="bf16", description="of the taps")
    top_k: Count = Field(default=64, description="logits kept for each place; V keeps all, 0 none")
    logits_dtype: LogitsDtype = "float32"

    @model_validator(mode="after")
    def _check_logits(self) -> "FeatureLayout":
        if self.top_k > self.vocab_size:
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
        return self

    def tensors(self, counts: Counts) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Give dtype and shape of every tensor of a file with so many rows, tokens and places."""
        count = torch.int32
        ids = torch.int16 if self.vocab_size <= 2**15 else torch.int32
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "tokens": (ids, (counts.tokens,)),
            "row_lens": (count, (counts.rows,)),
            "answer_counts": (count, (counts.rows,)),
            "answers": (count, (counts.spans, 2)),
            "row_names": (torch.uint8, (counts.name_bytes,)),
        }
        for tap in self.taps:
            found[f"hidden.{tap}"] = (DTYPES[self.dtype], (counts.tokens, self.hidden_size))
        if self.top_k:
            dtype = getattr(torch, self.logits_dtype)
            found["top_logits"] = (dtype, (counts.places, self.top_k))
            if self.top_k < self.vocab_size:
                found["top_ids"] = (ids, (counts.places, self.top_k))
                found["rest"] = (torch.float32, (counts.places,))
        return found

    def num_bytes(self, counts: Counts) -> int:
        """Sum up the bytes of all tensors, without the headers of their files."""
        return sum(prod(shape) * dtype.itemsize for dtype, shape in self.tensors(counts).values())


def resolve_taps(names: str, num_layers: int) -> tuple[int, ...]:
    """Find the taps behind names and numbers."""
    taps: set[int] = set()
    kinds = head_kinds()
    for name in (part.strip() for part in names.split(",")):
        if name in kinds:
            taps.update(head_class(name).default_taps(num_layers))
        elif name == "none":
            continue
        elif name.isascii() and name.isdigit() and int(name) <= num_layers:
            taps.add(int(name))
        else:
            raise ValueError(
                f"tap {name!r} does not exist; give {', '.join(kinds)}, none or a number from 0 "
                f"(the embeddings) to {num_layers} (after the target's final norm)"
            )
    return tuple(sorted(taps))


@dataclass(frozen=True, eq=False)
class TopLogits:
    """Logits of N places.

    With Z = sum(exp(values)) + exp(rest), exp(values) / Z are the exact probabilities of the kept
    tokens and exp(rest) / Z is that of all others together.
    """

    values: Tensor
    ids: Tensor | None
    rest: Tensor | None

    @classmethod
    def of(cls, logits: Tensor, top_k: int) -> "TopLogits":
        """Keep the largest of logits [N, V]."""
        if top_k == logits.shape[-1]:
            return cls(logits, None, None)
        ids = logits.topk(top_k, -1).indices
        # Of equal logits topk takes any, argmax the first; training compares argmaxes.
        best = logits.argmax(-1)
        is_missing = (ids != best.unsqueeze(-1)).all(-1)
        ids[is_missing, 0] = best[is_missing]
        # Not Z minus the kept ones: where the rest is small, that difference would be noise.
        rest = logits.float().scatter(-1, ids, -math.inf).logsumexp(-1)
        return cls(logits.gather(-1, ids), ids, rest)

    def to(self, device: torch.device) -> "TopLogits":
        """Copy to another device."""
        ids = None if self.ids is None else self.ids.to(device)
        rest = None if self.rest is None else self.rest.to(device)
        return TopLogits(self.values.to(device), ids, rest)

    def dense(self, vocab_size: int, dtype: torch.dtype) -> Tensor:
        """Make logits [N, V]: the kept ones exact, the others all alike, with their exact sum.

        Probabilities of kept tokens, the argmax, and any divergence's share of the kept tokens are
        thereby exact (up to `dtype`); among the other tokens the target's order is lost.
        """
        if self.ids is None or self.rest is None:
            return self.values.to(dtype)
        top_k = self.values.shape[-1]
        each = self.rest - math.log(vocab_size - top_k)
        # No other logit was larger than the least kept one; rounding shall not make it so.
        each = torch.minimum(each, self.values.float().amin(-1)).to(dtype)
        whole = each.unsqueeze(-1).repeat(1, vocab_size)
        return whole.scatter_(-1, self.ids, self.values.to(dtype))


class Shard(Config):
    """A finished file of a store."""

    file: str
    rows: Count
    tokens: Count
    answer_tokens: Count = Field(description="tokens that logits are stored for")
    bytes: Count
    sha256: str


class SplitRecord(Config):
    """The rows of one split."""

    rows: Count = Field(description="that are stored, or will be")
    tokens: Count
    cut: Count = Field(description="rows that were longer than max_len")
    dropped: Count = Field(description="rows without an answer token within max_len")
    shards: list[Shard] = Field(default_factory=list, description="finished, in order of the rows")


class StoreSettings(Config):
    """Settings that the layout does not tell; see `FeatureOptions`."""

    max_len: int = Field(ge=1)
    batch_tokens: int = Field(ge=1)
    shard_mib: int = Field(ge=1)
    target_dtype: str


class StoreSource(Config):
    """Where the rows came from: a hash of them, and the manifest of their answers, if any."""

    rows: str
    answers: AnswersManifest | None


class FeatureIndex(Config):
    """The content of `features.json`."""

    schema_: Literal["specdec.features/1"] = Field(default="specdec.features/1", alias="schema")
    tap_convention: Literal[
        "index into Hugging Face hidden_states: 0 embeddings, L after the final norm"
    ] = "index into Hugging Face hidden_states: 0 embeddings, L after the final norm"
    layout: FeatureLayout
    target: TargetIdentity
    ends: str | None = Field(description="hash of the embedding and vocabulary projection")
    settings: StoreSettings
    source: StoreSource
    splits: dict[str, SplitRecord]
    is_complete: bool = Field(default=False, description="every row is stored")
    provenance: MachineProvenance

    def identity(self) -> dict[str, Any]:
        """Collect what must be the same for a run to resume."""
        same = self.model_dump(include={"layout", "ends", "settings"})
        return {**same, "rows": self.source.rows, TARGET: as_json(self.target)}


def read_index(folder: Path) -> FeatureIndex:
    """Read the index of a store, finished or not."""
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} is no feature store, it has no {INDEX}; make one with "
            "`specdec features`"
        )
    return read_model(FeatureIndex, folder / INDEX)
