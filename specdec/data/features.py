"""Filling a feature store: the target reads every row once, and what it made of it is kept."""

import hashlib
import shutil
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from specdec.checkpoints.identity import TARGET, check_resumed, hash_of_ends, identify_target
from specdec.common.config import read_model, validated, write_model
from specdec.common.files import check_same_run, file_hash, replace_file
from specdec.common.provenance import MachineProvenance, machine
from specdec.data.answers import AnswerRow, check_answers_target, load_answers, read_rows
from specdec.data.config import FeatureOptions
from specdec.data.feature_store import (
    INDEX,
    FeatureIndex,
    FeatureLayout,
    Shard,
    TopLogits,
    logit_places,
    row_name,
)
from specdec.data.queries import SPLITS
from specdec.engine.interfaces import KEYS_VALUES
from specdec.registry import head_kinds, is_kind, strategy
from specdec.targets.hf import HFTarget, TargetEnds
from specdec.targets.taps import key_value_sizes, run_whole

_MIB = 2**20
_HEADER_BYTES = 4096  # more than the header of a file ever has


def resolve_taps(names: str, num_layers: int) -> tuple[int, ...]:
    taps: set[int] = set()
    for name in (part.strip() for part in names.split(",")):
        if is_kind(name) and (head := strategy(name, typed=True).head_class):
            taps.update(head.default_taps(num_layers))
        elif name.isascii() and name.isdigit() and int(name) <= num_layers:
            taps.add(int(name))
        elif name == "keys_values":
            taps.add(KEYS_VALUES)
        elif name != "none":
            known = f"{', '.join(head_kinds())}, pkg.module:Class, keys_values, none"
            numbers = f"a number from 0 (embeddings) to {num_layers}"
            raise ValueError(f"tap {name!r} does not exist; give {known} or {numbers}")
    return tuple(sorted(taps))


def _with_own_id(row: AnswerRow, seen: Counter[str]) -> AnswerRow:
    """Tell rows that share an id apart by a number behind it."""
    name = row.id
    while seen[name]:
        seen[row.id] += 1
        name = f"{row.id} ({seen[row.id]})"
    seen[name] += 1
    return replace(row, id=name)


class FeaturePlan:
    """Rows of a folder of answers, or of a JSONL file for training, shared out among files."""

    def __init__(self, path: Path, target: HFTarget | TargetEnds, options: FeatureOptions) -> None:
        room = target.max_context_len
        max_len = options.max_len or room
        if max_len > room:
            raise ValueError(f"max_len is {max_len} but the target's context is only {room}")
        num_layers = target.config.num_hidden_layers
        dtype = str(target.model.dtype).removeprefix("torch.")
        layout = {
            **options.model_dump(include={"dtype", "top_k"}),
            "taps": (taps := resolve_taps(options.taps, num_layers)),
            "hidden_size": target.config.hidden_size,
            "vocab_size": target.vocab_size,
            "num_layers": num_layers,
            "logits_dtype": dtype,
        }
        if KEYS_VALUES in taps:  # stores without them keep the layout that they always had
            layout["key_value_size"] = num_layers * key_value_sizes(target.config)[0]
        self.layout = validated(FeatureLayout, layout, noun="store")
        self.shards: dict[str, tuple[str, list[AnswerRow]]] = {}  # file -> split, rows
        where, identity, manifest = path.expanduser(), identify_target(target), None
        files = {SPLITS[0]: where}
        if where.is_dir():
            manifest = load_answers(where)
            check_answers_target(manifest, identity)
            files = {split: where / f"{split}.jsonl" for split in SPLITS}
        seen, splits, whole = Counter[str](), dict[str, dict[str, int]](), hashlib.sha256()
        for split, file in files.items():
            given = list(read_rows(file, target.vocab_size))
            cut = [row.cut(max_len) for row in given]
            rows = [_with_own_id(row, seen) for row in cut if row.answers]
            for piece in (split, *map(repr, rows)):
                whole.update(piece.encode())
            splits[split] = {
                "rows": len(rows),
                "tokens": sum(len(row.tokens) for row in rows),
                "cut": sum(len(row.tokens) > max_len for row in given),
                "dropped": len(given) - len(rows),
            }
            for number, shard in enumerate(self._share_out(rows, options.shard_mib * _MIB)):
                self.shards[f"{split}-{number:05d}.safetensors"] = split, shard
        self.num_tokens = sum(split["tokens"] for split in splits.values())
        if not self.num_tokens:
            raise ValueError(f"{str(path)!r} holds no row with an answer within {max_len} tokens")
        kept = options.model_dump(include={"batch_tokens", "shard_mib"})
        facts = {
            "layout": self.layout,
            "target": identity,
            "ends": hash_of_ends(target.model),
            "settings": {"max_len": max_len, "target_dtype": dtype, **kept},
            "source": {"rows": whole.hexdigest(), "answers": manifest},
            "splits": splits,
            "provenance": MachineProvenance(**machine(target)),
        }
        self.index = validated(FeatureIndex, facts)

    @property
    def num_bytes(self) -> int:
        """Size of the store, without the headers of its files and its index."""
        return sum(self.layout.row_bytes(row) for _, rows in self.shards.values() for row in rows)

    def _share_out(self, rows: Sequence[AnswerRow], shard_bytes: int) -> list[list[AnswerRow]]:
        """Put rows into files of at most so many bytes, unless a single row has more."""
        shards: list[list[AnswerRow]] = []
        room = 0
        for row in rows:
            size = self.layout.row_bytes(row)
            if size > room:
                shards.append([])
                room = shard_bytes
            shards[-1].append(row)
            room -= size
        return shards


def free_bytes(out: Path) -> int:
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
    finished = {shard.file for shard in index.shards}
    missing = {name: each for name, each in plan.shards.items() if name not in finished}
    left = [row for _, rows in missing.values() for row in rows]
    needed = sum(map(plan.layout.row_bytes, left)) + len(missing) * _HEADER_BYTES
    if needed > (free := free_bytes(out)):
        raise ValueError(
            f"the store needs {needed:,} bytes but only {free:,} are free at {str(out)!r}; give "
            "another --out, or fewer --taps, --dtype bf16 or a smaller --top-k (see --dry-run)"
        )
    index.is_complete = not missing
    out.mkdir(parents=True, exist_ok=True)
    write_model(out / INDEX, index)
    before = done = plan.num_tokens - sum(len(row.tokens) for row in left)
    started, speed = time.monotonic(), 0.0

    def show(name: str, num_tokens: int) -> None:
        nonlocal done, speed
        done += num_tokens
        speed = (done - before) / max(time.monotonic() - started, 1e-9)
        progress(done, plan.num_tokens, f"{name}, {speed:.0f} tokens/s")

    for name, (split, rows) in missing.items():
        batch_tokens = index.settings.batch_tokens
        tensors = fill_shard(target, plan.layout, rows, batch_tokens, partial(show, name))
        replace_file(out / name, save(tensors))
        shard = Shard(
            file=name,
            rows=len(rows),
            tokens=len(tensors["tokens"]),
            answer_tokens=sum(len(logit_places(row)) for row in rows),
            bytes=(out / name).stat().st_size,
            sha256=file_hash(out / name),
        )
        shards = index.splits[split].shards
        shards.append(shard)
        shards.sort(key=lambda each: each.file)
        index.is_complete = len(index.shards) == len(plan.shards)
        write_model(out / INDEX, index)
    num_bytes = sum(shard.bytes for shard in index.shards)
    return {
        "bytes": num_bytes,
        "bytes_per_token": round(num_bytes / plan.num_tokens, 2),
        "tokens": plan.num_tokens,
        "answer_tokens": sum(shard.answer_tokens for shard in index.shards),
        "files": len(index.shards),
        "tokens_per_s": round(speed, 1),
        "splits": {n: split.model_dump(exclude={"shards"}) for n, split in index.splits.items()},
    }


def _resumed(out: Path, ours: FeatureIndex) -> FeatureIndex:
    """Take up the index that an earlier run left, but for files that are gone; or begin one."""
    index = read_model(FeatureIndex, out / INDEX) if (out / INDEX).exists() else None
    if index is None or not index.shards:
        # Nothing is kept of a run that finished no file: its folder serves any other.
        return ours.model_copy(deep=True)
    checks = {TARGET: partial(check_resumed, out)}
    check_same_run(out, index.identity(), ours.identity(), checks)
    sizes = {path.name: path.stat().st_size for path in out.iterdir()}
    for split in index.splits.values():
        split.shards = [each for each in split.shards if sizes.get(each.file) == each.bytes]
    return index


def fill_shard(
    target: HFTarget,
    layout: FeatureLayout,
    rows: Sequence[AnswerRow],
    batch_tokens: int,
    show: Callable[[int], None],
) -> dict[str, Tensor]:
    """Make the tensors of a file, in batches that do not depend on other files."""
    dtypes, kept = layout.dtypes, [dict[str, Tensor]()] * len(rows)
    for numbers in _batches([len(row.tokens) for row in rows], batch_tokens):
        batch = [rows[number] for number in numbers]
        for number, found in zip(numbers, _read(target, layout, batch), strict=True):
            # A copy: a view would keep the whole batch.
            kept[number] = {
                name: values.to("cpu", dtypes[name], copy=True) for name, values in found.items()
            }
        show(sum(len(row.tokens) for row in batch))
    plain: dict[str, Sequence[Any]] = {
        "tokens": [token for row in rows for token in row.tokens],
        "row_lens": [len(row.tokens) for row in rows],
        "answer_counts": [len(row.answers) for row in rows],
        "answers": [span for row in rows for span in row.answers],
        "row_names": list(b"".join(map(row_name, rows))),
    }
    return {
        name: torch.tensor(plain[name], dtype=dtype)
        if name in plain
        else torch.cat([found.pop(name) for found in kept])
        for name, dtype in dtypes.items()
    }


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
) -> list[dict[str, Tensor]]:
    """Run the target over rows; of each its taps [n, H] and the top logits of its places."""
    places = [logit_places(row) for row in rows]
    columns = sorted(set().union(*places)) if layout.top_k else []
    # Padding is at the end, where causal attention never looks back from: no mask is needed.
    tokens = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row.tokens) for row in rows], batch_first=True
    )
    out, states = run_whole(
        target,
        layout.taps,
        input_ids=tokens.to(target.device),
        # One column tells whether logits that are not stored can be had from the last tap.
        logits_to_keep=torch.tensor(columns or [0], device=target.device),
    )
    hidden = {f"hidden.{tap}": states[tap] for tap in layout.taps}
    _check_finite({**hidden, "logits": out.logits}, rows)
    if not layout.top_k:
        _check_projection(target, hidden[f"hidden.{layout.num_layers}"][:, :1], out.logits)
    found = []
    for line, row in enumerate(rows):
        found.append({name: states[line, : len(row.tokens)] for name, states in hidden.items()})
        if layout.top_k:
            wanted = [bisect_left(columns, place) for place in places[line]]
            top = TopLogits.of(out.logits[line, wanted], layout.top_k)
            named = {"top_logits": top.values, "top_ids": top.ids, "rest": top.rest}
            found[-1] |= {name: each for name, each in named.items() if each is not None}
    return found


def _check_projection(target: HFTarget, states: Tensor, logits: Tensor) -> None:
    """Refuse to leave logits out where the projection alone does not make them."""
    again = target.model.get_output_embeddings()(states).float()
    if not torch.allclose(again, logits.float(), rtol=0.02, atol=0.02 * float(again.abs().max())):
        raise ValueError(
            f"{type(target.model).__name__} does more to its logits than its vocabulary "
            "projection, which could not make them again; keep logits with --top-k 64"
        )


def _check_finite(found: dict[str, Tensor], rows: Sequence[AnswerRow]) -> None:
    for name, values in found.items():
        is_finite = values.isfinite().flatten(1).all(-1)
        if not is_finite.all():
            row = rows[int(is_finite.logical_not().nonzero()[0])]
            fix = "load the target with --target-dtype bfloat16 or float32"
            raise FloatingPointError(f"{name} of row {row.id!r} are not finite; {fix}")
