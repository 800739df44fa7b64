"""What the three trainings say of themselves, in one file to commit.

python experiments/07-draft-size/gather.py runs/size experiments/07-draft-size/training.json
"""

import json
from pathlib import Path

import typer

NAMES = {"draft-1": "1 layer", "draft-4": "4 layers", "draft-8": "8 layers"}
KEYS = ("parameters", "steps", "tokens", "seconds", "loss", "validation_loss", "parity")


def main(runs: Path, out: Path) -> None:
    found = {}
    for folder, name in NAMES.items():
        results = json.loads((runs / folder / "results.json").read_text())
        found[name] = {key: results[key] for key in (*KEYS, "provenance")}
    out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
