"""Named sources of prompts, from a data folder or from the hub."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdec.bench.prompt import BenchPrompt, Message, shuffled
from specdec.bench.prompt_files import read_lines
from specdec.demo import demo_path
from specdec.hub import HUB, find_path

Rows = list[dict[str, Any]]
DATA_DIR_VARIABLE = "SPECDEC_DATA_DIR"


@dataclass(frozen=True)
class Source:
    """A source and where to find it.

    Attributes:
        file: its path in the data folder.
        parse: from records to prompts.
        hub: arguments of `datasets.load_dataset`; None where the hub has no loadable copy.
        published: where it comes from, if not from the hub.
    """

    file: str
    parse: Callable[[Rows], list[BenchPrompt]]
    hub: Mapping[str, str] | None = None
    published: str = ""


def _user(text: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": text},)


def _gsm8k(rows: Rows) -> list[BenchPrompt]:
    return [BenchPrompt(f"gsm8k-{i}", "gsm8k", _user(r["question"])) for i, r in enumerate(rows)]


def _dialogues(domain: str, rows: Rows) -> list[BenchPrompt]:
    """Each dialogue up to one of its user turns, chosen by a fixed seed."""
    prompts = []
    for row in rows:
        turns = [{"role": role, "content": text} for role, text in row["turns"]]
        ends = [i + 1 for i, turn in enumerate(turns[:-1]) if turn["role"] == "user"]
        if ends:
            end = random.Random(row["id"]).choice(ends)
            prompts.append(BenchPrompt(row["id"], domain, tuple(turns[:end])))
    return prompts


def _questions(source: str, rows: Rows) -> list[BenchPrompt]:
    """Questions of several turns, in the names of the original file or of the hub's copy."""
    prompts = []
    for row in rows:
        turns = row["turns"] if "turns" in row else row["prompt"]
        number = row["question_id"] if "question_id" in row else row["prompt_id"]
        first, later = _user(turns[0]), tuple(turns[1:])
        prompts.append(BenchPrompt(f"{source}-{number}", row["category"], first, follow_ups=later))
    return prompts


def _human_eval(rows: Rows) -> list[BenchPrompt]:
    return [BenchPrompt(row["task_id"], "human_eval", text=row["prompt"]) for row in rows]


_FILED: dict[str, Source] = {
    "gsm8k": Source(
        "gsm8k/test.jsonl", _gsm8k, {"path": "openai/gsm8k", "name": "main", "split": "test"}
    ),
    "sgd": Source(
        "sgd/dev.jsonl",
        lambda rows: _dialogues("sgd", rows),
        published="its hub copy is a loading script, which datasets does not run any more; the "
        'original is dstc8-schema-guided-dialogue, a line a dialogue: {"id", "turns": [[role, '
        "text], ...]}",
    ),
    "taskmaster4": Source(
        "taskmaster4/dialogs.jsonl",
        # The other nine tenths are what the demo models were trained on.
        lambda rows: _dialogues("taskmaster4", rows[::10]),
        published="it is not on the hub; the original is google-research-datasets/Taskmaster, "
        'TM-4, a line a dialogue: {"id", "turns": [[role, text], ...]}',
    ),
    "spec_bench": Source(
        "spec_bench/question.jsonl",
        lambda rows: _questions("spec_bench", rows),
        published="it is not on the hub; the original is data/spec_bench of hemingkx/Spec-Bench",
    ),
    "mt_bench": Source(
        "mt_bench/question.jsonl",
        lambda rows: _questions("mt_bench", rows),
        {"path": "HuggingFaceH4/mt_bench_prompts", "split": "train"},
    ),
    "human_eval": Source(
        "human_eval/HumanEval.jsonl.gz",
        _human_eval,
        {"path": "openai/openai_humaneval", "split": "test"},
    ),
}


def _demo(_: Path | None) -> list[BenchPrompt]:
    """The packaged prompts, domains in turn, so that any number of first ones is balanced."""
    position: dict[str, int] = {}
    keyed = []
    for row in read_lines(demo_path("prompts.jsonl")):
        prompt = BenchPrompt(row["id"], row["domain"], tuple(row["messages"]))
        position[prompt.domain] = position.get(prompt.domain, -1) + 1
        keyed.append((position[prompt.domain], prompt))
    return [prompt for _, prompt in sorted(keyed, key=lambda pair: pair[0])]


def _held_out(folder: Path | None) -> list[BenchPrompt]:
    """The three domains of the demo models in turn, none of it seen in training."""
    names = ("gsm8k", "sgd", "taskmaster4")
    domains = [shuffled(read_source(name, folder)) for name in names]
    return [prompt for group in zip(*domains, strict=False) for prompt in group]


# Sources that are balanced as they stand; the others are shuffled.
_MIXED = {"demo": _demo, "held_out": _held_out}
ORDERED = frozenset({"demo", "held_out", "spec_bench", "mt_bench", "human_eval"})
SOURCES = (*_MIXED, *_FILED)


def read_source(name: str, folder: Path | None) -> list[BenchPrompt]:
    """All prompts of a named source.

    Args:
        name: one of `SOURCES`.
        folder: the data folder; where the source's file is not in it, the hub is asked.

    Raises:
        FileNotFoundError: neither has it.
        ValueError: its records are not what they should be.
    """
    if name in _MIXED:
        return _MIXED[name](folder)
    source = _FILED[name]
    rows = _rows(name, source, folder)
    try:
        return source.parse(rows)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ValueError(
            f"{source.file} of prompts.source {name!r} does not have the original's records "
            f"({type(error).__name__}: {error}); restore the file"
        ) from error


def _rows(name: str, source: Source, folder: Path | None) -> Rows:
    if folder is not None and (folder / source.file).is_file():
        return list(read_lines(folder / source.file))
    require_data_dir(folder)
    missing = f"prompts.source {name!r}: {source.file} is not in {folder or 'any data folder'}"
    fix = f"set {DATA_DIR_VARIABLE} or prompts.data_dir to a folder that holds it"
    if source.hub is None:
        raise FileNotFoundError(f"{missing}, and {source.published}; {fix}")
    find_path(HUB + source.hub["path"], "")  # says so
    try:
        from datasets import load_dataset

        return [dict(row) for row in load_dataset(**source.hub)]
    except ImportError as error:
        raise FileNotFoundError(
            f"{missing}, and reading it from the hub needs the package datasets; {fix}, or: "
            "pip install 'specdec[train]'"
        ) from error
    except Exception as error:
        raise FileNotFoundError(
            f"{missing}, and {source.hub['path']} could not be read from the hub "
            f"({type(error).__name__}); {fix}"
        ) from error


def require_data_dir(folder: Path | None) -> None:
    """Refuse a data folder that is not there, rather than ask the hub in its place."""
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(
            f"the data folder {str(folder)!r} is not a folder; mend {DATA_DIR_VARIABLE}, or the "
            "option that names it, or give neither to ask the hub"
        )
