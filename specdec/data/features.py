"""Filling a feature store: the target reads every row once, and what it made of it is kept."""

import hashlib
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.checkpoints.head import TargetIdentity
from specdec.checkpoints.identity import as_json, check_resumed, hash_of_ends, identify_target
from specdec.common.files import disk_trouble, write_durably
from specdec.common.provenance import machine
from specdec.data.answers import AnswerRow, check_answers_target, load_answers, read_rows
from specdec.data.conversation import SPLITS
from specdec.data.feature_store import (
    DTYPES,
    INDEX,
    Counts,
    FeatureIndex,
    FeatureLayout,
    FeatureOptions,
    Shard,
    ShardContent,
    SplitRecord,
    TopLogits,
    file_hash,
    logit_places,
    read_index,
    resolve_taps,
)
from specdec.targets.hf import HFTarget
from specdec.targets.partial import TargetEnds


def fill_shard(content: ShardContent, target: HFTarget, batch_tokens: int) -> Iterator[int]:
    """Run the target over a shard's rows, in batches that do not depend on other shards.

    Args:
        content: to be filled.
        target: in eval mode.
        batch_tokens: padded tokens that the target reads at once.

    Yields:
        Tokens of each batch, without padding.

    Raises:
        FloatingPointError: hidden states or logits that are not finite.
        ValueError: a store without logits for a target whose logits need more than its projection.
    """
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
    """Numbers of rows of like length, at most `batch_tokens` with padding, longest first."""
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
    """Taps [B, L, H], and the top logits of each row's places unless the store has none.

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


@dataclass(frozen=True)
class SplitRows:
    """The rows of a split.

    Attributes:
        rows: in the order of their file, no longer than the store's `max_len`, with an answer.
        cut: how many of them were longer.
        dropped: rows whose answers all lie behind `max_len`.
    """

    rows: list[AnswerRow]
    cut: int
    dropped: int


def read_splits(
    path: Path, identity: TargetIdentity, vocab_size: int, max_len: int
) -> tuple[dict[str, SplitRows], dict[str, Any] | None]:
    """The rows of a folder of answers, or of a JSONL file, which is all for training.

    Rows that share an id are told apart by a number behind it.

    Args:
        path: of the folder or file.
        identity: of the target that is to read them.
        vocab_size: of this target.
        max_len: in tokens; longer rows are cut.

    Returns:
        The rows of every split, and the folder's manifest; None for a file.

    Raises:
        FileNotFoundError: no such folder or file, or a folder that is not finished.
        ValueError: another target wrote the answers, a line is no row, or there are no rows.
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
        splits[split] = SplitRows(
            [_named(row, seen) for row in kept],
            sum(len(row.tokens) > max_len for row in given),
            len(given) - len(kept),
        )
    if not any(split.rows for split in splits.values()):
        raise ValueError(f"{str(path)!r} holds no row with an answer within {max_len} tokens")
    return splits, manifest


def _named(row: AnswerRow, seen: Counter[str]) -> AnswerRow:
    """The row with an id of its own."""
    name = row.id
    while seen[name]:
        seen[row.id] += 1
        name = f"{row.id} ({seen[row.id]})"
    seen[name] += 1
    return replace(row, id=name)


def fingerprint(splits: dict[str, SplitRows]) -> str:
    """A hash of all rows."""
    whole = hashlib.sha256()
    for split, found in splits.items():
        whole.update(split.encode())
        for row in found.rows:
            whole.update(repr(row).encode())
    return whole.hexdigest()


def plan_shards(
    rows: Sequence[AnswerRow], layout: FeatureLayout, shard_bytes: int
) -> list[list[AnswerRow]]:
    """Rows in files of at most so many bytes, unless a single row has more."""
    shards: list[list[AnswerRow]] = []
    room = 0
    for row in rows:
        size = layout.num_bytes(Counts.of([row]))
        if size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(row)
        room -= size
    return shards


TOP_KS = (0, 16, 64, 256)
TAP_SETS = ("none", "eagle", "eagle3", "eagle3,eagle")


@dataclass(frozen=True)
class Choice:
    """A way to store the same rows.

    Attributes:
        layout: what is kept.
        num_bytes: of the whole store, without the headers of its files.
        bytes_per_token: of all tokens, prompts included.
    """

    layout: FeatureLayout
    num_bytes: int
    bytes_per_token: float

    @classmethod
    def of(cls, layout: FeatureLayout, counts: Counts) -> "Choice":
        """This layout for rows with these counts."""
        size = layout.num_bytes(counts)
        return cls(layout, size, size / counts.tokens)

    @property
    def label(self) -> str:
        """As options of the command."""
        layout = self.layout
        taps = ",".join(map(str, layout.taps)) or "none"
        return f"--taps {taps} --dtype {layout.dtype} --top-k {layout.top_k}"


def choices(layout: FeatureLayout, counts: Counts) -> list[Choice]:
    """The given layout among others: tap sets by dtypes by numbers of logits, smallest first."""
    tap_sets = {resolve_taps(names, layout.num_layers) for names in TAP_SETS} | {layout.taps}
    top_ks = {top_k for top_k in (*TOP_KS, layout.top_k) if top_k <= layout.vocab_size}
    found = []
    for taps in tap_sets:
        for top_k in top_ks:
            if not top_k and layout.num_layers not in taps:
                continue  # there would be no way to get logits
            # Without taps their dtype makes no difference.
            dtypes = DTYPES if taps else {layout.dtype}
            changes = [replace(layout, taps=taps, top_k=top_k, dtype=dtype) for dtype in dtypes]
            found += [Choice.of(changed, counts) for changed in changes]
    return sorted(found, key=lambda choice: (choice.num_bytes, choice.label))


def cheaper(layout: FeatureLayout, counts: Counts, free: int) -> list[Choice]:
    """Of every set of these taps the largest choice that fits, or the smallest if none does.

    None of them keeps more logits than the given layout.
    """
    best: dict[tuple[int, ...], Choice] = {}
    chosen = Choice.of(layout, counts)
    for choice in choices(layout, counts):  # smallest first
        other = choice.layout
        is_part = set(other.taps) <= set(layout.taps) and other.top_k <= layout.top_k
        is_better = other.taps not in best or choice.num_bytes <= free
        if is_part and is_better and choice.num_bytes < chosen.num_bytes:
            best[other.taps] = choice
    return sorted(best.values(), key=lambda choice: -choice.num_bytes)


def refuse_what_does_not_fit(
    needed: int, free: int, where: str, layout: FeatureLayout, counts: Counts
) -> None:
    """Refuse a store that the disk cannot hold.

    Args:
        needed: bytes that are still to be written.
        free: bytes of the disk.
        where: the store's folder, for the message.
        layout: asked for.
        counts: of all rows.

    Raises:
        ValueError: it does not fit; says what would take less.
    """
    if needed <= free:
        return
    chosen = Choice.of(layout, counts)
    others = "; ".join(
        f"{each.label}: {each.bytes_per_token:,.1f} bytes per token, {each.num_bytes:,} bytes"
        f"{'' if each.num_bytes <= free else ', still too many'}"
        for each in cheaper(layout, counts, free)
    )
    raise ValueError(
        f"the store needs {needed:,} bytes ({chosen.bytes_per_token:,.1f} per token) but only "
        f"{free:,} are free at {where!r}; give another --out, or store less: "
        f"{others or 'fewer rows'}"
    )


_MIB = 2**20


class FeaturePlan:
    """The rows, what is kept of them, and how they are shared out among files.

    Args:
        path: folder of answers, or a JSONL file.
        target: whole, or only its ends, whose size the store has all the same.
        options: see `FeatureOptions`.

    Attributes:
        layout: what is kept.
        splits: the rows by split.
        shards: the rows of every file, by split.
        total: counts of all rows.
        identity: of the target.
        manifest: of the folder of answers; None for a file.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: options that cannot work, rows that are none, or answers of another target.
    """

    def __init__(self, path: Path, target: HFTarget | TargetEnds, options: FeatureOptions) -> None:
        max_len = options.max_len or target.max_context_len
        if max_len > target.max_context_len:
            raise ValueError(
                f"max_len is {max_len} but the target's context is only {target.max_context_len}"
            )
        num_layers = target.config.num_hidden_layers
        target_dtype = str(target.model.dtype).removeprefix("torch.")
        self.batch_tokens = options.batch_tokens
        self.layout = FeatureLayout(
            taps=resolve_taps(options.taps, num_layers),
            hidden_size=target.config.hidden_size,
            vocab_size=target.vocab_size,
            num_layers=num_layers,
            dtype=options.dtype,
            group_size=options.group_size,
            top_k=options.top_k,
            logits_dtype=target_dtype,
        )
        self.identity = identify_target(target)
        self.splits, self.manifest = read_splits(path, self.identity, target.vocab_size, max_len)
        self.shards = {
            split: plan_shards(found.rows, self.layout, options.shard_mib * _MIB)
            for split, found in self.splits.items()
        }
        self.total = Counts.of([row for found in self.splits.values() for row in found.rows])
        self.settings = {
            "max_len": max_len,
            "batch_tokens": options.batch_tokens,
            "shard_mib": options.shard_mib,
            "target_dtype": target_dtype,
        }

    def chosen(self, out: Path) -> dict[str, Any]:
        """What the store takes, without the headers of its files and its index.

        Args:
            out: a folder, for the disk that it is on, or will be.
        """
        return _as_json([Choice.of(self.layout, self.total)], out)[0]

    def choices(self, out: Path) -> list[dict[str, Any]]:
        """What it would take with other taps, dtypes and numbers of logits; see `chosen`."""
        return _as_json(choices(self.layout, self.total), out)


def free_bytes(out: Path) -> int:
    """Of the disk that a folder is on, or will be."""
    there = next(each for each in (out, *out.absolute().parents) if each.exists())
    return shutil.disk_usage(there).free


def _as_json(found: Sequence[Choice], out: Path) -> list[dict[str, Any]]:
    free = free_bytes(out.expanduser())
    return [
        {
            "taps": list(each.layout.taps),
            "dtype": each.layout.dtype,
            "top_k": each.layout.top_k,
            "bytes_per_token": round(each.bytes_per_token, 2),
            "bytes": each.num_bytes,
            "fits": each.num_bytes <= free,
        }
        for each in found
    ]


# A header names a handful of tensors; this is more than it ever has.
_HEADER_BYTES = 4096

# Split, name and rows of a file.
File = tuple[str, str, list[AnswerRow]]


class FeatureExtraction:
    """A store in the making; nothing is written yet.

    Args:
        plan: for this target.
        target: in eval mode.
    """

    def __init__(self, plan: FeaturePlan, target: HFTarget) -> None:
        self.plan, self.target = plan, target
        self._index = FeatureIndex(
            layout=plan.layout,
            target=plan.identity,
            ends=hash_of_ends(target.model),
            settings=plan.settings,
            source={"rows": fingerprint(plan.splits), "answers": plan.manifest},
            splits={split: _record(found) for split, found in plan.splits.items()},
            provenance=machine(target),
        )

    def run(
        self, out: Path, callback: Callable[[int, int, str], None] = lambda done, total, text: None
    ) -> dict[str, Any]:
        """Fill the store, or go on where a killed run of the same command stopped.

        Args:
            out: folder of the store.
            callback: given tokens done, tokens in all, and a text.

        Returns:
            A summary: bytes, tokens, rows, and this run's tokens per second.

        Raises:
            ValueError: the disk cannot hold it, or the folder holds another store.
            FloatingPointError: hidden states or logits that are not finite.
            OSError: the disk is full after all, or cannot be written; finished files are kept.
        """
        out = out.expanduser()
        index = self._resumed(out)
        files = self._unfinished(out, index)
        layout, counts = self.plan.layout, self.plan.total
        needed = sum(layout.num_bytes(Counts.of(rows)) + _HEADER_BYTES for _, _, rows in files)
        refuse_what_does_not_fit(needed, free_bytes(out), str(out), layout, counts)
        left = sum(len(row.tokens) for _, _, rows in files for row in rows)
        started = time.monotonic()
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_durably(out / INDEX, index.to_bytes())
            self._write_files(out, index, files, _Progress(callback, counts.tokens, left))
            index.is_complete = True
            write_durably(out / INDEX, index.to_bytes())
        except OSError as error:
            raise disk_trouble(out, error) from error
        return _summary(index, counts, left / max(time.monotonic() - started, 1e-9))

    def _write_files(
        self, out: Path, index: FeatureIndex, files: Sequence[File], progress: "_Progress"
    ) -> None:
        for split, name, rows in files:
            content = ShardContent(self.plan.layout, rows)
            for num_tokens in fill_shard(content, self.target, self.plan.batch_tokens):
                progress.add(num_tokens, name)
            write_durably(out / name, content.to_bytes())
            shards = index.splits[split].shards
            shards.append(_shard(out / name, content.counts))
            shards.sort(key=lambda each: each.file)
            write_durably(out / INDEX, index.to_bytes())

    def _resumed(self, out: Path) -> FeatureIndex:
        """The index that an earlier run left, or a new one."""
        if not (out / INDEX).exists():
            return deepcopy(self._index)
        index = read_index(out)
        if not any(split.shards for split in index.splits.values()):
            # Nothing is kept of a run that finished no file: its folder serves any other.
            return deepcopy(self._index)
        ours, theirs = self._index.identity(), index.identity()
        for key in ours:
            if ours[key] != theirs[key]:
                fact = _first_difference(key, ours[key], theirs[key])
                raise ValueError(
                    f"{str(out)!r} holds another store ({fact}); choose another --out folder or "
                    "remove this one"
                )
        check_resumed(out, as_json(index.target), as_json(self._index.target))
        return index

    def _unfinished(self, out: Path, index: FeatureIndex) -> list[File]:
        """The files that are still to be written; of the others the index says so."""
        missing = []
        for split, plan in self.plan.shards.items():
            record = index.splits[split]
            record.shards = [shard for shard in record.shards if _is_whole(out, shard)]
            finished = {shard.file for shard in record.shards}
            named = (
                (f"{split}-{number:05d}.safetensors", rows) for number, rows in enumerate(plan)
            )
            missing += [(split, name, rows) for name, rows in named if name not in finished]
        index.is_complete = not missing
        return missing


class _Progress:
    """Tells a callback how far a run is and how fast it is."""

    def __init__(self, callback: Callable[[int, int, str], None], total: int, left: int) -> None:
        self._callback, self._total, self._before = callback, total, total - left
        self._done, self._started = self._before, time.monotonic()

    def add(self, num_tokens: int, name: str) -> None:
        """So many tokens more, of a file."""
        self._done += num_tokens
        speed = (self._done - self._before) / max(time.monotonic() - self._started, 1e-9)
        self._callback(self._done, self._total, f"{name}, {speed:.0f} tokens/s")


def _shard(path: Path, counts: Counts) -> Shard:
    return Shard(
        file=path.name,
        rows=counts.rows,
        tokens=counts.tokens,
        answer_tokens=counts.places,
        bytes=path.stat().st_size,
        sha256=file_hash(path),
    )


def _record(found: SplitRows) -> SplitRecord:
    tokens = sum(len(row.tokens) for row in found.rows)
    return SplitRecord(rows=len(found.rows), tokens=tokens, cut=found.cut, dropped=found.dropped)


def _is_whole(out: Path, shard: Shard) -> bool:
    with suppress(FileNotFoundError):
        return (out / shard.file).stat().st_size == shard.bytes
    return False


def _first_difference(key: str, ours: Any, theirs: Any) -> str:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        name = next(each for each in ours if ours[each] != theirs.get(each))
        return _first_difference(f"{key}.{name}", ours[name], theirs.get(name))
    return f"{key} is {str(theirs)[:40]}, not {str(ours)[:40]}"


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
            name: {key: value for key, value in asdict(split).items() if key != "shards"}
            for name, split in index.splits.items()
        },
    }
