"""The held-out queries of a folder that `specdec collect` wrote, as prompts."""

from pathlib import Path
from typing import Any

from specdec.bench.prompt import BenchPrompt

HELD_OUT = "held_out"


def read_collected(folder: Path) -> list[BenchPrompt]:
    """Read what no drafter was trained on; the order is the folder's, which hashes decided.

    Raises:
        ValueError: the folder is none of collected queries, or `datasets` is not installed.
    """
    try:
        from datasets import load_from_disk
    except ImportError as error:
        raise ValueError(
            f"prompts.source {str(folder)!r} is a folder, and folders need datasets; install it "
            "with: pip install 'specdec[collect]'"
        ) from error
    try:
        rows: Any = load_from_disk(str(folder))[HELD_OUT]
        return [_prompt(row) for row in rows]
    except (FileNotFoundError, KeyError, ValueError) as error:
        raise ValueError(
            f"prompts.source {str(folder)!r} holds no split {HELD_OUT!r} of collected queries "
            f"({error}); give a folder that specdec collect wrote, or a file"
        ) from error


def _prompt(row: dict[str, Any]) -> BenchPrompt:
    turns = tuple({"role": turn["role"], "content": turn["content"]} for turn in row["messages"])
    return BenchPrompt(row["id"], row["domain"] or "collected", turns, "" if turns else row["text"])
