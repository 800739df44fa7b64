"""The prompts of a bench: a named source or a file, in an order that its seed decides."""

import os
from pathlib import Path
from typing import Any

from specdec.bench.collected import read_collected
from specdec.bench.prompt import BenchPrompt, Message, shuffled
from specdec.bench.prompt_files import read_file
from specdec.bench.sources import DATA_DIR_VARIABLE, ORDERED, SOURCES, read_source


def load_prompts(
    source: str, num: int, data_dir: str | None = None, seed: int = 0
) -> list[BenchPrompt]:
    """Take `num` prompts of a source; the same ones for the same seed.

    Args:
        source: a name in `SOURCES`; a JSONL, ShareGPT JSON or text file (a prompt a line); or a
            folder that `specdec collect` wrote, whose held-out queries are taken.
        num: prompts to take, at most; seed 0 keeps the order of "demo", "held_out", files and
            folders.
        data_dir: folder of the named sources; default: the variable SPECDEC_DATA_DIR, then the
            hub where the source is there.

    Raises:
        ValueError: an unknown source, a record that cannot be read, or nothing to decode.
        FileNotFoundError: the source's data is nowhere.
    """
    if source in SOURCES:
        folder = data_dir or os.environ.get(DATA_DIR_VARIABLE)
        prompts = read_source(source, Path(folder).expanduser() if folder else None)
    elif Path(source).is_file():
        prompts = read_file(Path(source))
    elif Path(source).is_dir():
        prompts = read_collected(Path(source))
    else:
        raise ValueError(
            f"prompts.source is {source!r} but must be a file, a folder that specdec collect "
            f"wrote, or one of {', '.join(SOURCES)}"
        )
    if not prompts:
        raise ValueError(f"prompts.source {source!r} holds no prompts; give a file with at least 1")
    for prompt in prompts:
        if prompt.is_empty:
            raise ValueError(
                f"prompts.source {source!r}: prompt {prompt.id!r} is empty but needs some text to "
                "continue from; fill it in or remove it"
            )
    if seed or (source in SOURCES and source not in ORDERED):
        prompts = shuffled(prompts, seed)
    return prompts[:num]


def render(prompt: BenchPrompt, tokenizer: Any) -> list[Message] | str:
    """What `generate` takes: messages where the tokenizer has a chat template, else text."""
    if not prompt.messages:
        return prompt.text
    if tokenizer is not None and getattr(tokenizer, "chat_template", None):
        return list(prompt.messages)
    return "\n".join(message["content"] for message in prompt.messages)
