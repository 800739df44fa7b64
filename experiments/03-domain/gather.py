"""What the runs say of themselves, in one file to commit.

python experiments/03-domain/gather.py runs/domain/*/results.json
"""

import json
from pathlib import Path

import typer

KEYS = ("steps", "tokens", "answer_tokens", "seconds", "tokens_per_s", "parameters")
MEASURED = ("loss", "validation_loss", "offline_tau", "alpha", "parity", "provenance")


def main(results: list[Path]) -> None:
    found = {}
    for path in sorted(results):
        content = json.loads(path.read_text())
        if "parity" in content:
            found[path.parent.name] = {key: content[key] for key in (*KEYS, *MEASURED)}
    text = json.dumps(found, indent=1) + "\n"
    (Path(__file__).parent / "training.json").write_text(text)


if __name__ == "__main__":
    typer.run(main)
