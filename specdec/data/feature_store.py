"""Feature stores: their index and files, and reading any row at any time, in many processes."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor

from specdec.checkpoints import TargetIdentity
from specdec.checkpoints.identity import TARGET, as_json, differences, hash_of_ends, identify_target
from specdec.common.config import Config, Count, read_model
from specdec.common.files import file_hash
from specdec.common.provenance import MachineProvenance
from specdec.data.answers import AnswerRow, AnswersManifest
from specdec.engine.interfaces import KEYS_VALUES

INDEX = "features.json"


def logit_places(row: AnswerRow) -> list[int]:
    """List the places whose next token is an answer's: the only ones that logits teach at."""
    return list(chain.from_iterable(range(max(s, 1) - 1, e - 1) for s, e in row.answers))


def row_name(row: AnswerRow) -> bytes:
    return json.dumps([row.id, row.domain, row.temperature]).encode() + b"\n"


class FeatureLayout(Config):
    """The part of a target's view of a text that is kept."""

    taps: tuple[Annotated[int, Field(ge=KEYS_VALUES)], ...] = Field(
        description="indices into hidden_states, ascending; -1 the keys and values of all layers"
    )
    hidden_size: int = Field(ge=1)
    key_value_size: int | None = Field(default=None, ge=1, description="of tap -1")
    vocab_size: int = Field(ge=1)
    num_layers: int = Field(ge=1)
    dtype: Literal["bf16", "float32"] = Field(default="bf16", description="of the taps")
    top_k: Count = Field(default=64, description="logits kept for each place; V keeps all, 0 none")
    logits_dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    @model_validator(mode="after")
    def _check_logits(self) -> "FeatureLayout":
        if self.top_k > self.vocab_size:
            rule = f"must be within 0 and the target's vocabulary of {self.vocab_size}"
            raise ValueError(f"top_k is {self.top_k} but {rule}")
        if not self.top_k and self.num_layers not in self.taps:
            raise ValueError(
                f"top_k is 0, and without logits they are computed from tap {self.num_layers}, not "
                f"one of {list(self.taps)}; add it to --taps, or keep logits with --top-k 64"
            )
        return self

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        ids = torch.int16 if self.vocab_size <= 2**15 else torch.int32
        found = {"tokens": ids, "row_names": torch.uint8}
        found |= dict.fromkeys(("row_lens", "answer_counts", "answers"), torch.int32)
        taps = torch.bfloat16 if self.dtype == "bf16" else torch.float32
        found |= {f"hidden.{tap}": taps for tap in self.taps}
        if self.top_k:
            found["top_logits"] = getattr(torch, self.logits_dtype)
            if self.top_k < self.vocab_size:
                found |= {"top_ids": ids, "rest": torch.float32}
        return found

    def width(self, tap: int) -> int:
        """Size of what is kept of a token."""
        return self.hidden_size if tap != KEYS_VALUES else self.key_value_size or 0

    def num_bytes(self, num_tokens: int, num_places: int) -> int:
        sizes = {name: dtype.itemsize for name, dtype in self.dtypes.items()}
        token = sizes["tokens"] + sum(sizes[f"hidden.{t}"] * self.width(t) for t in self.taps)
        logit = sizes.get("top_logits", 0) + sizes.get("top_ids", 0)
        return num_tokens * token + num_places * (self.top_k * logit + sizes.get("rest", 0))

    def row_bytes(self, row: AnswerRow) -> int:
        """Size of a row, its name, spans and counts included."""
        counts = 4 * (2 + 2 * len(row.answers))
        size = self.num_bytes(len(row.tokens), len(logit_places(row)))
        return size + counts + len(row_name(row))


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
        copies = (None if part is None else part.to(device) for part in (self.ids, self.rest))
        return TopLogits(self.values.to(device), *copies)

    def dense(self, vocab_size: int, dtype: torch.dtype) -> Tensor:
        """Make logits [N, V]: the kept ones exact, the others all alike, with their exact sum.

        Among the other tokens the target's order is lost.
        """
        if self.ids is None or self.rest is None:
            return self.values.to(dtype)
        each = self.rest - math.log(vocab_size - self.values.shape[-1])
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

    @property
    def shards(self) -> list[Shard]:
        return [shard for split in self.splits.values() for shard in split.shards]

    def identity(self) -> dict[str, Any]:
        same = self.model_dump(include={"layout", "ends", "settings"})
        return {**same, "rows": self.source.rows, TARGET: as_json(self.target)}


@dataclass(frozen=True, eq=False)
class StoredRow:
    """The stored features of n tokens of a row, P of which have logits."""

    tokens: Tensor  # [n] int64
    hidden: dict[int, Tensor]  # tap -> [n, H], bfloat16 or float32
    places: Tensor  # [P] int64: their next token is an answer's
    logits: TopLogits | None  # of these places; None in a store without


# A row, its file, and where its tokens and its places start there.
_Entry = tuple[AnswerRow, Any, int, int]


class FeatureStore:
    """A folder that `specdec features` wrote; its files are mapped, not read."""

    def __init__(self, folder: Path, index: FeatureIndex) -> None:
        self.folder, self.index, self.layout = folder, index, index.layout
        self._entries: dict[str, dict[str, _Entry]] = {}  # by split, then by id

    @classmethod
    def open(cls, folder: Path | str) -> "FeatureStore":
        """Open a finished store, whose files are all there and of the right size."""
        where = Path(folder).expanduser()
        if not (where / INDEX).is_file():
            fix = f"it has no {INDEX}; make one with `specdec features`"
            raise FileNotFoundError(f"{str(where)!r} is no feature store, {fix}")
        store = cls(where, read_model(FeatureIndex, where / INDEX))
        if not store.index.is_complete:
            raise ValueError(f"{str(where)!r} is not finished; give the same command again")
        for shard in store.index.shards:
            path = where / shard.file
            if not path.is_file():
                fix = "copy it again, or give the command that made the store again"
                raise FileNotFoundError(f"{str(path)!r} is missing; {fix}")
            if (size := path.stat().st_size) != shard.bytes:
                raise _damaged(path, f"it has {size:,} bytes, not {shard.bytes:,}")
        return store

    def verify(self) -> None:
        for shard in self.index.shards:
            if file_hash(self.folder / shard.file) != shard.sha256:
                raise _damaged(self.folder / shard.file, "its content is not what was written")

    def check_target(self, target: Any) -> None:
        """Refuse a target, or the ends of one, other than the one whose features these are."""
        known, identity, name = self.index.target, identify_target(target), repr(str(self.folder))
        facts = [*differences(known, identity)]
        ends = self.index.ends, hash_of_ends(target.model)
        if None not in ends and ends[0] != ends[1]:
            facts = [("embedding or projection", *ends)]
        for fact, ours, theirs in facts:
            raise ValueError(
                f"{name} holds the features of another target: its {fact} is {str(ours)[:12]}, not "
                f"{str(theirs)[:12]}; train for {known.name or 'that'}, or extract them again"
            )

    def check_taps(self, taps: Sequence[int]) -> None:
        for tap in taps:
            if tap not in self.layout.taps:
                names = ("keys_values" if each == KEYS_VALUES else str(each) for each in taps)
                raise ValueError(
                    f"{str(self.folder)!r} holds the taps {list(self.layout.taps)} but not {tap}; "
                    f"extract them with --taps {','.join(names)}, or train without a store"
                )

    def rows(self, split: str) -> list[AnswerRow]:
        """Read the rows of a split, in the order of their file; no two of a store share an id."""
        return [row for row, *_ in self._read(split).values()]

    def get(
        self, row_id: str, taps: Sequence[int] | None = None, max_len: int | None = None
    ) -> StoredRow:
        """Read what is stored of a row, or of its first `max_len` tokens."""
        wanted = self.layout.taps if taps is None else tuple(taps)
        self.check_taps(wanted)
        entries = (self._read(split).get(row_id) for split in self.index.splits)
        entry = next((entry for entry in entries if entry), None)
        if entry is None:
            raise KeyError(f"{str(self.folder)!r} has no row {row_id!r}")
        row, file, first_token, first_place = entry
        row, read = row if max_len is None else row.cut(max_len), file.get_slice
        places = logit_places(row)
        tokens = slice(first_token, first_token + len(row.tokens))
        span = slice(first_place, first_place + len(places))
        logits = ids = rest = None
        if "rest" in self.layout.dtypes:
            ids, rest = read("top_ids")[span].long(), read("rest")[span]
        if self.layout.top_k:
            logits = TopLogits(read("top_logits")[span], ids, rest)
        hidden = {tap: read(f"hidden.{tap}")[tokens] for tap in wanted}
        where = torch.tensor(places, dtype=torch.long)
        return StoredRow(torch.tensor(row.tokens), hidden, where, logits)

    def _read(self, split: str) -> dict[str, _Entry]:
        if split not in self.index.splits:
            known = ", ".join(self.index.splits)
            raise ValueError(f"{str(self.folder)!r} has no split {split!r}, only {known}")
        if split not in self._entries:
            shards = self.index.splits[split].shards
            entries = chain.from_iterable(map(self._entries_of, shards))
            self._entries[split] = {entry[0].id: entry for entry in entries}
        return self._entries[split]

    def _entries_of(self, shard: Shard) -> Iterator[_Entry]:
        path = self.folder / shard.file
        try:
            file: Any = safe_open(str(path), "pt")  # mapped: tensors are read where asked for
        except (SafetensorError, OSError) as error:
            raise _damaged(path, str(error)) from error
        if set(file.keys()) != self.layout.dtypes.keys():
            raise _damaged(path, "it does not hold the tensors that the index promises")
        names = file.get_tensor("row_names").numpy().tobytes().splitlines()
        lens = file.get_tensor("row_lens").tolist()
        num_answers = file.get_tensor("answer_counts").tolist()
        spans = [cast(tuple[int, int], tuple(s)) for s in file.get_tensor("answers").tolist()]
        tokens = file.get_tensor("tokens").tolist()
        token = span = place = 0
        for name, length, count in zip(names, lens, num_answers, strict=True):
            given = tuple(tokens[token : token + length]), tuple(spans[span : span + count])
            row = AnswerRow(*given, *json.loads(name))
            yield row, file, token, place
            token, span, place = token + length, span + count, place + len(logit_places(row))


def _damaged(path: Path, reason: str) -> ValueError:
    fix = "copy it again, or remove it and give the command that made the store again"
    return ValueError(f"{str(path)!r} is damaged ({reason}); {fix}")
