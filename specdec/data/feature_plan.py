"""What a feature store will hold, and its size, before the target has read anything."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specdec.checkpoints.identity import identify_target
from specdec.data.feature_layout import Counts, FeatureLayout
from specdec.data.feature_options import FeatureOptions
from specdec.data.feature_rows import plan_shards, read_splits
from specdec.data.feature_size import Choice, choices
from specdec.data.tap_names import resolve_taps
from specdec.targets.ends import TargetEnds
from specdec.targets.hf import HFTarget

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
