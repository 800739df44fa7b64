"""A finished file of a feature store: mapped, and checked against what the index says of it."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor

from specdec.data.answers import AnswerRow
from specdec.data.feature_index import Shard
from specdec.data.feature_layout import Counts, FeatureLayout, logit_places
from specdec.data.group_scales import from_int8
from specdec.data.top_logits import TopLogits

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
