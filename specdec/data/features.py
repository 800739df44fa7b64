"""Filling a feature store: the target reads every row once, and what it made of it is kept."""

import hashlib
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save
from torch import Tensor

from specdec.checkpoints import TargetIdentity
from specdec.checkpoints.identity import TARGET, check_resumed, hash_of_ends, identify_target
from specdec.common.config import write_model
from specdec.common.files import check_same_run, replace_file
from specdec.common.provenance import MachineProvenance, machine
from specdec.data.answers import (
    AnswerRow,
    AnswersManifest,
    check_answers_target,
    load_answers,
    read_rows,
)
from specdec.data.config import FeatureOptions
from specdec.data.feature_format import (
    INDEX,
    Counts,
    FeatureIndex,
    FeatureLayout,
    LogitsDtype,
    Shard,
    SplitRecord,
    StoreSettings,
    StoreSource,
    TopLogits,
    logit_places,
    read_index,
    resolve_taps,
    row_name,
)
from specdec.data.feature_store import file_hash
from specdec.data.queries import SPLITS
from specdec.targets.hf import HFTarget
from specdec.targets.partial import TargetEnds

_MIB = 2**20
# A header names a handful of tensors; this is more than it ever has.
_HEADER_BYTES = 4096


@dataclass(frozen=True)
class SplitRows:
    """The rows of a split."""

    rows: list[AnswerRow]
    cut: int
    dropped: int


def read_splits(
    path: Path, identity: TargetIdentity, vocab_size: int, max_len: int
) -> tuple[dict[str, SplitRows], AnswersManifest | None]:
    """Read the rows of a folder of answers, or of a JSONL file, which is all for training.

    Rows that share an id are told apart by a number behind it.
    """
    where, manifest = path.expanduser(), None
    files = {SPLITS[0]: where}
    if where.is_dir():
        answers = load_answers(where)
        manifest = answers.manifest
        check_answers_target(manifest, identity)
        files = {split: answers.path(split) for split in SPLITS}
    seen: Counter[str] = Counter()
    splits = {}
    for split, file in files.items():
        given = list(read_rows(file, vocab_size))
        kept = [row for row in (each.cut(max_len) for each in given) if row.answers]
        num_cut = sum(len(row.tokens) > max_len for row in given)
        rows = [_with_own_id(row, seen) for row in kept]
        splits[split] = SplitRows(rows, num_cut, len(given) - len(kept))
    if not any(split.rows for split in splits.values()):
        raise ValueError(f"{str(path)!r} holds no row with an answer within {max_len} tokens")
    return splits, manifest


def _with_own_id(row: AnswerRow, seen: Counter[str]) -> AnswerRow:
    name = row.id
    while seen[name]:
        seen[row.id] += 1
        name = f"{row.id} ({seen[row.id]})"
    seen[name] += 1
    return replace(row, id=name)


class FeaturePlan:
    """The rows, what is kept of them, and how they are shared out among files."""

    def __init__(self, path: Path, target: HFTarget | TargetEnds, options: FeatureOptions) -> None:
        max_len = options.max_len or target.max_context_len
        if max_len > target.max_context_len:
            raise ValueError(
                f"max_len is {max_len} but the target's context is only {target.max_context_len}"
            )
        num_layers = target.config.num_hidden_layers
        dtype = str(target.model.dtype).removeprefix("torch.")
        self.layout = FeatureLayout(
            taps=resolve_taps(options.taps, num_layers),
            hidden_size=target.config.hidden_size,
            vocab_size=target.vocab_size,
            num_layers=num_layers,
            dtype=options.dtype,
            top_k=options.top_k,
            logits_dtype=cast(LogitsDtype, dtype),
        )
        identity = identify_target(target)
        splits, manifest = read_splits(path, identity, target.vocab_size, max_len)
        self.shards = {
            f"{split}-{number:05d}.safetensors": (split, rows)
            for split, found in splits.items()
            for number, rows in enumerate(self._share_out(found.rows, options.shard_mib * _MIB))
        }
        self.total = Counts.of([row for found in splits.values() for row in found.rows])
        self.index = FeatureIndex(
            layout=self.layout,
            target=identity,
            ends=hash_of_ends(target.model),
            settings=StoreSettings(
                max_len=max_len,
                batch_tokens=options.batch_tokens,
                shard_mib=options.shard_mib,
                target_dtype=dtype,
            ),
            source=StoreSource(rows=_fingerprint(splits), answers=manifest),
            splits={split: _record(found) for split, found in splits.items()},
            provenance=MachineProvenance(**machine(target)),
        )

    @property
    def num_bytes(self) -> int:
        """Size of the store, without the headers of its files and its index."""
        return self.layout.num_bytes(self.total)

    def _share_out(self, rows: Sequence[AnswerRow], shard_bytes: int) -> list[list[AnswerRow]]:
        """Put rows into files of at most so many bytes, unless a single row has more."""
        shards: list[list[AnswerRow]] = []
        room = 0
        for row in rows:
            size = self.layout.num_bytes(Counts.of([row]))
            if size > room:
                shards.append([])
                room = shard_bytes
            shards[-1].append(row)
            room -= size
        return shards


def _fingerprint(splits: dict[str, SplitRows]) -> str:
    whole = hashlib.sha256()
    for split, found in splits.items():
        whole.update(split.encode())
        for row in found.rows:
            whole.update(repr(row).encode())
    return whole.hexdigest()


def _record(found: SplitRows) -> SplitRecord:
    tokens = sum(len(row.tokens) for row in found.rows)
    return SplitRecord(rows=len(found.rows), tokens=tokens, cut=found.cut, dropped=found.dropped)


def free_bytes(out: Path) -> int:
    """Find the free bytes of the disk that a folder is on, or will be."""
    there = next(each for each in (out, *out.absolute().parents) if each.exists())
    return shutil.disk_usage(there).free


def extract_features(
    plan: FeaturePlan,
    target: HFTarget,
    out: Path,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> dict[str, Any]:
    """Fill a store, or resume a killed run of the same command."""
    out = out.expanduser()
    index = _resumed(out, plan.index)
    finished = {shard.file for split in index.splits.values() for shard in split.shards}
    missing = {name: each for name, each in plan.shards.items() if name not in finished}
    _check_room(plan, [rows for _, rows in missing.values()], out)
    index.is_complete = not missing
    out.mkdir(parents=True, exist_ok=True)
    write_model(out / INDEX, index)
    total = plan.total.tokens
    before = done = total - sum(len(row.tokens) for _, rows in missing.values() for row in rows)
    started = time.monotonic()
    speed = 0.0
    for name, (split, rows) in missing.items():
        content = ShardContent(plan.layout, rows)
        for num_tokens in fill_shard(content, target, index.settings.batch_tokens):
            done += num_tokens
            speed = (done - before) / max(time.monotonic() - started, 1e-9)
            progress(done, total, f"{name}, {speed:.0f} tokens/s")
        replace_file(out / name, content.to_bytes())
        shards = index.splits[split].shards
        shards.append(_shard(out / name, content.counts))
        shards.sort(key=lambda each: each.file)
        write_model(out / INDEX, index)
    index.is_complete = True
    write_model(out / INDEX, index)
    return _summary(index, plan.total, speed)


def _resumed(out: Path, ours: FeatureIndex) -> FeatureIndex:
    """Take up the index that an earlier run left, but for files that are gone; or begin one."""
    new = ours.model_copy(deep=True)
    if not (out / INDEX).exists():
        return new
    index = read_index(out)
    if not any(split.shards for split in index.splits.values()):
        return new  # nothing is kept of a run that finished no file: its folder serves any other
    checks = {TARGET: partial(check_resumed, out)}
    check_same_run(out, index.identity(), ours.identity(), checks)
    for split in index.splits.values():
        split.shards = [shard for shard in split.shards if _is_whole(out / shard.file, shard)]
    return index


def _is_whole(path: Path, shard: Shard) -> bool:
    return path.is_file() and path.stat().st_size == shard.bytes


def _check_room(plan: FeaturePlan, missing: Sequence[Sequence[AnswerRow]], out: Path) -> None:
    """Refuse a store that the disk cannot hold."""
    sizes = (plan.layout.num_bytes(Counts.of(rows)) + _HEADER_BYTES for rows in missing)
    needed, free = sum(sizes), free_bytes(out)
    if needed > free:
        per_token = plan.num_bytes / plan.total.tokens
        raise ValueError(
            f"the store needs {needed:,} bytes ({per_token:,.1f} per token) but only {free:,} are "
            f"free at {str(out)!r}; give another --out, or store less: fewer --taps, --dtype bf16, "
            "a smaller --top-k or fewer rows (--dry-run tells the size)"
        )


def _shard(path: Path, counts: Counts) -> Shard:
    return Shard(
        file=path.name,
        rows=counts.rows,
        tokens=counts.tokens,
        answer_tokens=counts.places,
        bytes=path.stat().st_size,
        sha256=file_hash(path),
    )


def _summary(index: FeatureIndex, counts: Counts, speed: float) -> dict[str, Any]:
    shards = [shard for split in index.splits.values() for shard in split.shards]
    num_bytes = sum(shard.bytes for shard in shards)
    return {
        "bytes": num_bytes,
        "bytes_per_token": round(num_bytes / counts.tokens, 2),
        "tokens": counts.tokens,
        "answer_tokens": counts.places,
        "files": len(shards),
        "tokens_per_s": round(speed, 1),
        "splits": {
            name: split.model_dump(exclude={"shards"}) for name, split in index.splits.items()
        },
    }


class ShardContent:
    """The tensors of a file; rows are put into their places in any order."""

    def __init__(self, layout: FeatureLayout, rows: Sequence[AnswerRow]) -> None:
        self.layout, self.rows, self.counts = layout, rows, Counts.of(rows)
        self.tensors = {
            name: torch.empty(shape, dtype=dtype)
            for name, (dtype, shape) in layout.tensors(self.counts).items()
        }
        self._first_token = [0, *accumulate(len(row.tokens) for row in rows)]
        self._first_place = [0, *accumulate(len(logit_places(row)) for row in rows)]
        self._fill("tokens", [token for row in rows for token in row.tokens])
        self._fill("row_lens", [len(row.tokens) for row in rows])
        self._fill("answer_counts", [len(row.answers) for row in rows])
        self._fill("answers", [span for row in rows for span in row.answers])
        self._fill("row_names", list(b"".join(row_name(row) for row in rows)))

    def _fill(self, name: str, values: Sequence[object]) -> None:
        self.tensors[name].copy_(torch.tensor(values).view(self.tensors[name].shape))

    def put_hidden(self, row: int, tap: int, states: Tensor) -> None:
        """Keep a tap [n, H] of the row with this number."""
        start = self._first_token[row]
        self.tensors[f"hidden.{tap}"][start : start + len(states)].copy_(states)

    def put_logits(self, row: int, top: TopLogits) -> None:
        """Keep the logits of the row's `logit_places`."""
        start = self._first_place[row]
        span = slice(start, start + len(top.values))
        self.tensors["top_logits"][span].copy_(top.values)
        if top.ids is not None and top.rest is not None:
            self.tensors["top_ids"][span].copy_(top.ids)
            self.tensors["rest"][span].copy_(top.rest)

    def to_bytes(self) -> bytes:
        """Make a safetensors file; the same content gives the same bytes."""
        return save(self.tensors)


def fill_shard(content: ShardContent, target: HFTarget, batch_tokens: int) -> Iterator[int]:
    """Run the target over a file's rows, in batches that do not depend on other files."""
    layout = content.layout
    for numbers in _batches([len(row.tokens) for row in content.rows], batch_tokens):
        rows = [content.rows[number] for number in numbers]
        hidden, logits = _read(target, layout, rows)
        for line, number in enumerate(numbers):
            for tap, states in hidden.items():
                content.put_hidden(number, tap, states[line, : len(rows[line].tokens)])
            if layout.top_k:
                content.put_logits(number, logits[line])
        yield sum(len(row.tokens) for row in rows)


def _batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group rows of like length, at most `batch_tokens` with padding, longest first."""
    batches: list[list[int]] = []
    longest = 0
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        if not batches or longest * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
            longest = lengths[number]
        batches[-1].append(number)
    return batches


@torch.no_grad()
def _read(
    target: HFTarget, layout: FeatureLayout, rows: Sequence[AnswerRow]
) -> tuple[dict[int, Tensor], list[TopLogits]]:
    """Make taps [B, L, H], and the top logits of each row's places unless the store has none.

    No attention mask is needed: padding is at the end, where causal attention never looks back
    from.
    """
    places = [logit_places(row) for row in rows]
    columns = sorted(set().union(*places)) if layout.top_k else []
    tokens = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row.tokens) for row in rows], batch_first=True
    )
    out = target.model(
        input_ids=tokens.to(target.device),
        output_hidden_states=bool(layout.taps),
        use_cache=False,
        # One column tells whether logits that are not stored can be had from the last tap.
        logits_to_keep=torch.tensor(columns or [0], device=target.device),
    )
    hidden = {tap: out.hidden_states[tap] for tap in layout.taps}
    _check_finite(hidden, out.logits, rows)
    if not layout.top_k:
        _check_projection(target, hidden[layout.num_layers][:, :1], out.logits)
        return hidden, []
    column_of = {place: column for column, place in enumerate(columns)}
    wanted = [torch.tensor([column_of[p] for p in each], dtype=torch.long) for each in places]
    return hidden, [
        TopLogits.of(out.logits[line, each.to(target.device)], layout.top_k)
        for line, each in enumerate(wanted)
    ]


def _check_projection(target: HFTarget, states: Tensor, logits: Tensor) -> None:
    """Refuse to leave logits out where the projection alone does not make them."""
    again = target.model.get_output_embeddings()(states).float()
    if not torch.allclose(again, logits.float(), rtol=0.02, atol=0.02 * float(again.abs().max())):
        raise ValueError(
            f"{type(target.model).__name__} does more to its logits than its vocabulary "
            "projection, so that they cannot be computed from its last hidden state; keep logits "
            "with --top-k 64"
        )


def _check_finite(hidden: dict[int, Tensor], logits: Tensor, rows: Sequence[AnswerRow]) -> None:
    named = {f"hidden_states[{tap}]": states for tap, states in hidden.items()}
    for name, values in {**named, "logits": logits}.items():
        is_finite = values.isfinite().flatten(1).all(-1)
        if not is_finite.all():
            row = rows[int(is_finite.logical_not().nonzero()[0])]
            raise FloatingPointError(
                f"{name} of row {row.id!r} are not finite; load the target with --target-dtype "
                "bfloat16 or float32"
            )
