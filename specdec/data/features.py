"""Filling a feature store: the target reads every row once, and what it made of it is kept."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

from specdec.bench.provenance import machine
from specdec.checkpoints.identity import as_json, check_resumed, hash_of_ends
from specdec.data.answers import AnswerRow
from specdec.data.feature_forward import fill_shard
from specdec.data.feature_index import INDEX, FeatureIndex, Shard, SplitRecord, read_index
from specdec.data.feature_layout import Counts
from specdec.data.feature_plan import FeaturePlan, free_bytes
from specdec.data.feature_rows import SplitRows, fingerprint
from specdec.data.feature_shard import ShardContent
from specdec.data.feature_size import refuse_what_does_not_fit
from specdec.data.shard_file import file_hash
from specdec.files import disk_trouble, write_durably
from specdec.targets.hf import HFTarget

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
