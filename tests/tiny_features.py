"""Rows of random tokens, and feature stores of what a tiny target makes of them."""

import torch

from specdec.data.answers import write_answers
from specdec.data.feature_store import FeatureOptions, FeatureStore
from specdec.data.features import FeatureExtraction, FeaturePlan


def random_rows(num_rows=9, longest=40, vocab_size=97, seed=0):
    """Rows of unlike lengths: one answer at the start, two in the middle, one up to the end."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(num_rows):
        length = longest - 3 * (number % 5)
        tokens = torch.randint(vocab_size, (length,), generator=generator).tolist()
        spans = [[[0, 6]], [[3, 9], [9, 14]], [[length // 2, length]]][number % 3]
        rows.append(
            {
                "id": f"row {number}",
                "domain": "ab"[number % 2],
                "temperature": number % 2 or None,
                "tokens": tokens,
                "answers": spans,
            }
        )
    return rows


def write_folder(folder, train, held_out=()):
    """A folder as `specdec regenerate` leaves it."""
    folder.mkdir(parents=True)
    counts = {"train": {"rows": len(train)}, "held_out": {"rows": len(held_out)}}
    manifest = {"schema": "specdec-answers-1", "target": {"name": "tiny"}, "counts": counts}
    write_answers(folder, {"train": train, "held_out": held_out}, [], manifest)
    return folder


def extraction(path, target, **options):
    plan = FeaturePlan(
        path, target, FeatureOptions(**{"taps": "0,1,2", "top_k": 8, "shard_mib": 1, **options})
    )
    return FeatureExtraction(plan, target)


def make_store(folder, target, rows=None, held_out=(), **options):
    """A finished store in `folder/store` of rows in `folder/answers`."""
    path = folder / "answers"
    if not path.exists():
        write_folder(path, random_rows() if rows is None else rows, held_out)
    extraction(path, target, **options).run(folder / "store")
    return FeatureStore.open(folder / "store")


def contents(folder):
    """Name -> bytes of every file."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
