"""Reading a feature store: any row at any time, by as many processes as like to."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from specdec.checkpoints.folder import json_bytes
from specdec.checkpoints.head import TargetIdentity
from specdec.checkpoints.identity import differences, hash_of_ends, identify_target
from specdec.common.files import read_json
from specdec.data.answers import AnswerRow
from specdec.drafters.eagle3 import default_taps
from specdec.targets.partial import TargetEnds

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


TAP_CONVENTION = "index into Hugging Face hidden_states: 0 embeddings, L after the final norm"

_READ_BY: dict[str, Callable[[int], tuple[int, ...]]] = {
    "eagle3": default_taps,
    "eagle": lambda num_layers: (num_layers,),
    "medusa": lambda num_layers: (num_layers,),
    "none": lambda num_layers: (),
}
TAP_NAMES = tuple(_READ_BY)


def resolve_taps(names: str, num_layers: int) -> tuple[int, ...]:
    """Taps, ascending, of names and numbers.

    Args:
        names: separated by commas: "eagle3", "eagle" and "medusa" stand for the taps that a new
            head of the kind reads, "none" for no taps.
        num_layers: L of the target.

    Raises:
        ValueError: neither a name nor a tap of this target.
    """
    taps: set[int] = set()
    for name in (part.strip() for part in names.split(",")):
        if name in _READ_BY:
            taps.update(_READ_BY[name](num_layers))
        elif name.isascii() and name.isdigit() and int(name) <= num_layers:
            taps.add(int(name))
        else:
            raise ValueError(
                f"tap {name!r} does not exist; give {', '.join(TAP_NAMES)} or a number from 0 "
                f"(the embeddings) to {num_layers} (after the target's final norm)"
            )
    return tuple(sorted(taps))


INDEX, SCHEMA = "features.json", "specdec.features/1"


@dataclass(frozen=True)
class Shard:
    """A file of a store.

    Attributes:
        file: its name in the store's folder.
        rows: in it.
        tokens: in it.
        answer_tokens: of them, those that logits are for.
        bytes: of the file.
        sha256: of the file.
    """

    file: str
    rows: int
    tokens: int
    answer_tokens: int
    bytes: int
    sha256: str


@dataclass
class SplitRecord:
    """The rows of one split.

    Attributes:
        rows: that are stored, or will be.
        tokens: of these rows.
        cut: rows that were longer than the store's `max_len`.
        dropped: rows without an answer token within `max_len`.
        shards: finished, in the order of the rows.
    """

    rows: int
    tokens: int
    cut: int
    dropped: int
    shards: list[Shard] = field(default_factory=list)


@dataclass
class FeatureIndex:
    """The content of `features.json`.

    Attributes:
        layout: what is kept of every token.
        target: whose view it is.
        ends: hash of its embedding and vocabulary projection, see `hash_of_ends`.
        settings: that the layout does not tell: "max_len", "batch_tokens", "shard_bytes", "dtype"
            of the target.
        source: what the rows came from: "rows", a hash of them, and "answers", the manifest of
            `specdec regenerate` where there is one.
        splits: by name.
        is_complete: every row is stored.
        provenance: command, commit, versions, machine and time of the first run.
    """

    layout: FeatureLayout
    target: TargetIdentity
    ends: str | None
    settings: dict[str, Any]
    source: dict[str, Any]
    splits: dict[str, SplitRecord]
    is_complete: bool = False
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """As a JSON file."""
        whole = asdict(self)
        return json_bytes({"schema": SCHEMA, "tap_convention": TAP_CONVENTION, **whole})

    def identity(self) -> dict[str, Any]:
        """What a run must have in common with the one it goes on from."""
        whole = asdict(self)
        for name in ("name", "facts", "magnitudes"):  # a folder's, and what is compared by itself
            del whole["target"][name]
        same = {key: whole[key] for key in ("layout", "target", "ends", "settings")}
        return {**same, "rows": self.source["rows"]}


def read_index(folder: Path) -> FeatureIndex:
    """The index of a store, finished or not.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or of another version.
    """
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} is no feature store, it has no {INDEX}; make one with "
            "`specdec features`"
        )
    given = read_json(folder / INDEX)
    schema, convention = given.pop("schema", None), given.pop("tap_convention", None)
    if schema != SCHEMA or convention != TAP_CONVENTION:
        raise ValueError(
            f"{str(folder / INDEX)!r} is of the schema {schema!r} with the tap convention "
            f"{convention!r}, but only {SCHEMA!r} with {TAP_CONVENTION!r} can be read; extract "
            "the features again"
        )
    try:
        layout = given.pop("layout")
        splits = {
            name: SplitRecord(**{**split, "shards": [Shard(**each) for each in split["shards"]]})
            for name, split in given.pop("splits").items()
        }
        return FeatureIndex(
            layout=FeatureLayout(**{**layout, "taps": tuple(layout["taps"])}),
            target=TargetIdentity(**given.pop("target")),
            splits=splits,
            **given,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{str(folder / INDEX)!r} is damaged ({error}); copy it again, or extract the features "
            "again"
        ) from error


_LARGEST = 127


def to_int8(states: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Round states to codes.

    Args:
        states: [..., H] of a floating dtype, finite.
        group_size: neighbouring channels that share a scale; 0: all of them.

    Returns:
        Codes [..., H] int8 and scales [..., G] bfloat16; code times scale is off by at most half
        a scale.
    """
    size = states.shape[-1]
    groups = _grouped(states.float(), group_size)
    scales = (groups.abs().amax(-1) / _LARGEST).bfloat16()
    # Codes are made with the scale as it is stored; where that is 0, so are the codes.
    steps = torch.where(scales == 0, torch.ones_like(scales), scales).float().unsqueeze(-1)
    codes = (groups / steps).round().clamp(-_LARGEST, _LARGEST).to(torch.int8)
    return codes.flatten(-2)[..., :size], scales


def from_int8(codes: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """States [..., H] float32 of codes [..., H] and scales [..., G]."""
    groups = _grouped(codes.float(), group_size) * scales.float().unsqueeze(-1)
    return groups.flatten(-2)[..., : codes.shape[-1]]


def _grouped(states: Tensor, group_size: int) -> Tensor:
    """[..., H] to [..., G, group_size], the last group filled up with zeros."""
    width = group_size or states.shape[-1]
    padded = torch.nn.functional.pad(states, (0, -states.shape[-1] % width))
    return padded.unflatten(-1, (-1, width))


@dataclass(frozen=True, eq=False)
class TopLogits:
    """Logits of N places.

    With Z = sum(exp(values)) + exp(rest), exp(values) / Z are the exact probabilities of the kept
    tokens and exp(rest) / Z is that of all others together.

    Attributes:
        values: [N, K] as the target gave them; the argmax is among them.
        ids: [N, K] int64; None where all V are kept, in the order of the vocabulary.
        rest: [N] float32, log-sum-exp of the logits that are not kept; None where all are.
    """

    values: Tensor
    ids: Tensor | None
    rest: Tensor | None

    @classmethod
    def of(cls, logits: Tensor, top_k: int) -> "TopLogits":
        """Of logits [N, V]."""
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
        """On another device."""
        ids = None if self.ids is None else self.ids.to(device)
        rest = None if self.rest is None else self.rest.to(device)
        return TopLogits(self.values.to(device), ids, rest)

    def dense(self, vocab_size: int, dtype: torch.dtype) -> Tensor:
        """Logits [N, V]: the kept ones exact, the others all alike, with their exact sum.

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


_HASHED_AT_ONCE = 2**24


@dataclass(frozen=True, eq=False)
class Entry:
    """A row, and where it starts in its file."""

    row: AnswerRow
    file: "ShardFile"
    first_token: int
    first_place: int


class ShardFile:
    """The tensors of a shard, which are read from the disk where they are asked for.

    Args:
        path: of the file.
        shard: what the index says of it.
        layout: of the store.

    Raises:
        ValueError: it is damaged.
    """

    def __init__(self, path: Path, shard: Shard, layout: FeatureLayout) -> None:
        self._layout = layout
        try:
            self._file: Any = safe_open(str(path), "pt")
            names = self._file.keys()
            shapes = {name: self._file.get_slice(name).get_shape() for name in names}
        except (SafetensorError, OSError) as error:
            raise _damaged(path, str(error)) from error
        spans, name_bytes = (shapes.get(name, [0])[0] for name in ("answers", "row_names"))
        counts = Counts(shard.rows, shard.tokens, spans, shard.answer_tokens, name_bytes)
        wanted = {name: list(shape) for name, (_, shape) in layout.tensors(counts).items()}
        if shapes != wanted:
            raise _damaged(path, "it does not hold the tensors that the index promises")

    def entries(self) -> Iterator[Entry]:
        """All rows, in order."""
        read = self._file.get_tensor
        names = read("row_names").numpy().tobytes().splitlines()
        lens, num_answers = read("row_lens").tolist(), read("answer_counts").tolist()
        spans = [cast(tuple[int, int], tuple(span)) for span in read("answers").tolist()]
        tokens = read("tokens").tolist()
        token = span = place = 0
        for name, length, count in zip(names, lens, num_answers, strict=True):
            row = AnswerRow(
                tuple(tokens[token : token + length]),
                tuple(spans[span : span + count]),
                *json.loads(name),
            )
            yield Entry(row, self, token, place)
            token, span, place = token + length, span + count, place + len(logit_places(row))

    def hidden(self, tap: int, tokens: slice) -> Tensor:
        """A tap [n, H] of some tokens: bfloat16, or float32 where it was stored so or in int8."""
        stored: Tensor = self._file.get_slice(f"hidden.{tap}")[tokens]
        if self._layout.dtype != "int8":
            return stored
        scales = self._file.get_slice(f"scale.{tap}")[tokens]
        return from_int8(stored, scales, self._layout.group_size)

    def logits(self, places: slice) -> TopLogits | None:
        """The logits of some places; None in a store without."""
        if not self._layout.top_k:
            return None
        values = self._file.get_slice("top_logits")[places]
        if self._layout.top_k == self._layout.vocab_size:
            return TopLogits(values, None, None)
        ids = self._file.get_slice("top_ids")[places].long()
        return TopLogits(values, ids, self._file.get_slice("rest")[places])


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content."""
    whole = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASHED_AT_ONCE):
            whole.update(chunk)
    return whole.hexdigest()


def check_size(path: Path, shard: Shard) -> None:
    """Refuse a file that is missing or was cut off.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it has another size.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{str(path)!r} is missing; copy it again, or give the command that made the store "
            "again: finished files are kept"
        )
    if path.stat().st_size != shard.bytes:
        raise _damaged(path, f"it has {path.stat().st_size:,} bytes, not {shard.bytes:,}")


def check_content(path: Path, shard: Shard) -> None:
    """Read a file whole and compare its hash.

    Raises:
        ValueError: it is damaged.
    """
    if file_hash(path) != shard.sha256:
        raise _damaged(path, "its content is not what was written")


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"{str(path)!r} is damaged ({reason}); copy it again, or remove it and give the command "
        "that made the store again: the other files are kept"
    )


@dataclass(frozen=True, eq=False)
class StoredRow:
    """What is stored of n tokens of a row.

    Attributes:
        tokens: [n] int64.
        hidden: tap -> [n, H], bfloat16 or float32.
        places: [P] int64, the places that logits are for: the next token is an answer's.
        logits: of these places; None in a store without.
    """

    tokens: Tensor
    hidden: dict[int, Tensor]
    places: Tensor
    logits: TopLogits | None


class FeatureStore:
    """A folder that `specdec features` wrote.

    Files are mapped, not read: opening takes no memory to speak of beyond the rows' tokens. Open a
    store in every process that reads it.

    Attributes:
        folder: of the store.
        index: see `FeatureIndex`.
    """

    def __init__(self, folder: Path, index: FeatureIndex) -> None:
        self.folder, self.index, self.layout = folder, index, index.layout
        self._files: dict[str, ShardFile] = {}
        self._entries: dict[str, Entry] = {}
        self._splits: dict[str, list[AnswerRow]] = {}

    @classmethod
    def open(cls, folder: Path | str) -> "FeatureStore":
        """A finished store, whose files are all there and of the right size.

        Raises:
            FileNotFoundError: no store, or one of its files is missing.
            ValueError: it is not finished, or a file is damaged.
        """
        where = Path(folder).expanduser()
        index = read_index(where)
        if not index.is_complete:
            raise ValueError(
                f"{str(where)!r} is not finished; give the command that began it again, it goes on"
            )
        for split in index.splits.values():
            for shard in split.shards:
                check_size(where / shard.file, shard)
        return cls(where, index)

    def verify(self) -> None:
        """Read every file whole and compare its hash.

        Raises:
            ValueError: a file is damaged.
        """
        for split in self.index.splits.values():
            for shard in split.shards:
                check_content(self.folder / shard.file, shard)

    def check_target(self, identity: TargetIdentity) -> None:
        """Refuse another target than the one whose features these are.

        Raises:
            ValueError: the first fact that differs.
        """
        known, where = self.index.target, repr(str(self.folder))
        for fact, ours, theirs in differences(known, identity, where, "specdec features"):
            raise _other_target(self.folder, known, fact, ours, theirs)

    def check_ends(self, ends: TargetEnds) -> None:
        """Refuse the ends of another target than the one whose features these are.

        Raises:
            ValueError: the first fact that differs.
        """
        ours, theirs = self.index.ends, hash_of_ends(ends.model)
        if None not in (ours, theirs) and ours != theirs:
            fact = "embedding or projection"
            raise _other_target(self.folder, self.index.target, fact, ours, theirs)
        self.check_target(identify_target(ends))

    def check_taps(self, taps: Sequence[int]) -> None:
        """Refuse taps that are not stored.

        Raises:
            ValueError: one that is not.
        """
        for tap in taps:
            if tap not in self.layout.taps:
                raise ValueError(
                    f"{str(self.folder)!r} holds the taps {list(self.layout.taps)} but not {tap}; "
                    f"extract the features again with --taps {','.join(map(str, taps))}, or train "
                    "beside the target"
                )

    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(self.index.splits)

    def rows(self, split: str) -> list[AnswerRow]:
        """The rows of a split, in the order of their file; no two of a store share an id.

        Raises:
            ValueError: no such split.
        """
        if split not in self.index.splits:
            raise ValueError(
                f"{str(self.folder)!r} has no split {split!r}, only {', '.join(self.splits())}"
            )
        if split not in self._splits:
            entries = [
                entry
                for shard in self.index.splits[split].shards
                for entry in self._file(shard).entries()
            ]
            self._entries.update((entry.row.id, entry) for entry in entries)
            self._splits[split] = [entry.row for entry in entries]
        return self._splits[split]

    def get(
        self, row_id: str, taps: Sequence[int] | None = None, max_len: int | None = None
    ) -> StoredRow:
        """What is stored of a row.

        Args:
            row_id: see `rows`.
            taps: to read; None for all.
            max_len: tokens, for a row that was cut.

        Raises:
            KeyError: no such row.
            ValueError: a tap that is not stored, or a damaged file.
        """
        wanted = self.layout.taps if taps is None else tuple(taps)
        self.check_taps(wanted)
        entry = self._entry(row_id)
        row = entry.row if max_len is None else entry.row.cut(max_len)
        places = logit_places(row)
        first_token, first_place = entry.first_token, entry.first_place
        tokens = slice(first_token, first_token + len(row.tokens))
        return StoredRow(
            torch.tensor(row.tokens),
            {tap: entry.file.hidden(tap, tokens) for tap in wanted},
            torch.tensor(places, dtype=torch.long),
            entry.file.logits(slice(first_place, first_place + len(places))),
        )

    def _entry(self, row_id: str) -> Entry:
        if row_id not in self._entries:
            for split in self.splits():
                self.rows(split)
        if row_id not in self._entries:
            raise KeyError(f"{str(self.folder)!r} has no row {row_id!r}")
        return self._entries[row_id]

    def _file(self, shard: Shard) -> ShardFile:
        if shard.file not in self._files:
            self._files[shard.file] = ShardFile(self.folder / shard.file, shard, self.layout)
        return self._files[shard.file]


def _other_target(
    folder: Path, known: TargetIdentity, fact: str, ours: object, theirs: object
) -> ValueError:
    return ValueError(
        f"{str(folder)!r} holds the features of another target: its {fact} is "
        f"{str(ours)[:12]}, not {str(theirs)[:12]} (it was made with {known.name or 'a target'}); "
        "train for that target, or extract the features of this one"
    )


@dataclass(frozen=True)
class FeatureOptions:
    """What to keep, and how to go about it.

    Attributes:
        taps: see `resolve_taps`.
        dtype: of the taps: "bf16", "int8" or "float32".
        group_size: channels that share a scale in int8; 0: all of a token.
        top_k: logits kept where the next token is an answer's; 0: none, they are then computed
            from the last tap.
        max_len: rows are cut to so many tokens; None: the target's context.
        batch_tokens: padded tokens that the target reads at once.
        shard_mib: MiB of a file; this much is held in memory, and lost to a kill.
    """

    taps: str = "eagle3,eagle"
    dtype: str = "bf16"
    group_size: int = GROUP_SIZE
    top_k: int = 64
    max_len: int | None = None
    batch_tokens: int = 4096
    shard_mib: int = 512

    def __post_init__(self) -> None:
        for name in ("max_len", "batch_tokens", "shard_mib"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value} but must be at least 1")


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
