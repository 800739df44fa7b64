"""Rows of random tokens, and feature stores of what a tiny target makes of them."""

import json
import resource
from contextlib import contextmanager

import torch
from tiny_training import write_rows

from specdec.common.provenance import code
from specdec.data.answers import AnswersManifest
from specdec.data.config import FeatureOptions
from specdec.data.feature_store import FeatureStore
from specdec.data.features import FeaturePlan, extract_features


def random_rows(num_rows=9, longest=40, vocab_size=97, seed=0):
    """Rows of unlike lengths: one answer at the start, two in the middle, one up to the end."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(num_rows):
        length = longest - 3 * (number % 5)
        tokens = torch.randint(vocab_size, (length,), generator=generator).tolist()
        spans = [[[0, 6]], [[3, 9], [9, 14]], [[length // 2, length]]][number % 3]
        facts = {"domain": "ab"[number % 2], "temperature": number % 2 or None}
        rows.append({"id": f"row {number}", **facts, "tokens": tokens, "answers": spans})
    return rows


def manifest(train=0, held_out=0, **changes):
    """The content of an `answers.json` for so many rows."""
    numbers = {"train": train, "held_out": held_out}
    counts = {name: {"queries": n, "rows": n, "failed": 0} for name, n in numbers.items()}
    zeros = ("answers", "unanswered_turns", "retokenized_answers", "answer_tokens", "tokens")
    session = {"tokens": 0, "seconds": 0.0, "tokens_per_s": None, "tau": None, "batch_size": 1}
    content = {
        "schema": "specdec-answers-1",
        "target": {"name": "tiny", "hidden_size": None},
        **dict.fromkeys(zeros, 0),
        **{key: {} for key in ("identity", "settings", "finish_reasons", "temperatures")},
        **{"counts": counts, "session": session, "endpoint": None, "provenance": code()},
        **changes,
    }
    AnswersManifest.model_validate_json(json.dumps(content))
    return content


def write_folder(folder, train, held_out=()):
    """A folder as `specdec regenerate` leaves it."""
    folder.mkdir(parents=True)
    for name, rows in (("train", train), ("held_out", held_out)):
        write_rows(folder / f"{name}.jsonl", rows)
    (folder / "answers.json").write_text(json.dumps(manifest(len(train), len(held_out))))
    return folder


def feature_plan(path, target, **options):
    given = {"taps": "0,1,2", "top_k": 8, "shard_mib": 1, **options}
    return FeaturePlan(path, target, FeatureOptions(**given))


def extract(path, target, out, progress=lambda *shown: None, **options):
    return extract_features(feature_plan(path, target, **options), target, out, progress)


def make_store(folder, target, rows=None, held_out=(), **options):
    """A finished store in `folder/store` of rows in `folder/answers`."""
    path = folder / "answers"
    if not path.exists():
        write_folder(path, random_rows() if rows is None else rows, held_out)
    extract(path, target, folder / "store", **options)
    return FeatureStore.open(folder / "store")


def contents(folder):
    """Name -> bytes of every file."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@contextmanager
def room_for(num_bytes):
    """A disk on which no file has more bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
