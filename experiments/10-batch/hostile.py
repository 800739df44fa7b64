"""Prompts of random tokens, to be continued as they are: what follows cannot be foreseen either.

python experiments/10-batch/hostile.py --out experiments/10-batch/hostile.txt
"""

import random
from pathlib import Path
from typing import Annotated

import typer

from specdec import load_target

NUM_PROMPTS, NUM_TOKENS = 32, 48


def main(out: Annotated[Path, typer.Option(help="text file to write")], seed: int = 0) -> None:
    tokenizer = load_target("demo", device="cpu").tokenizer
    special = set(tokenizer.all_special_ids)
    ordinary = [token for token in range(len(tokenizer)) if token not in special]
    draw = random.Random(seed)
    with out.open("w") as file:
        for _ in range(NUM_PROMPTS):
            text = tokenizer.decode(draw.choices(ordinary, k=NUM_TOKENS))
            # A part of a character decodes to U+FFFD; a prompt is one line.
            file.write(" ".join(text.replace("\ufffd", "").split()) + "\n")


if __name__ == "__main__":
    typer.run(main)
