"""How long rows wait between their steps, from the records of a bench's cells.

python experiments/10-batch/waiting.py runs/experiments/10-hostile experiments/10-batch/waiting.json

A row's decoding is its own steps, which all rows of a batch share, and what lies between them: the
prefills of the prompts that join. Milliseconds, means over all rows of all repeats, but the median
for what one row waits in all.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import typer

ARMS = ("plain", "controller")


def rows_of(cell: Path) -> Iterator[tuple[str, float, float, int]]:
    """Arm, seconds of decoding, seconds in steps, and tokens behind the first, of every row."""
    for line in (cell / "records.jsonl").read_text().splitlines():
        call = json.loads(line)
        for row in call.get("rows", ()):
            in_steps = sum(step["wall_s"] for step in row["records"])
            yield call["arm"], row["decode_s"], in_steps, len(row["tokens"]) - 1


def summary(rows: list[tuple[str, float, float, int]]) -> dict[str, float]:
    decoding, stepping, tokens = (sum(row[place] for row in rows) for place in (1, 2, 3))
    return {
        "in_steps_ms_per_token": 1000 * stepping / tokens,
        "waiting_ms_per_token": 1000 * (decoding - stepping) / tokens,
        "waiting_ms_median": 1000 * median(row[1] - row[2] for row in rows),
    }


def main(sweep: Path, out: Path) -> None:
    content = json.loads((sweep / "sweep.json").read_text())
    found = {}
    for cell in content["cells"]:
        rows = list(rows_of(sweep / cell["folder"]))
        size = str(cell["settings"]["batch_size"])
        found[size] = {name: summary([row for row in rows if row[0] == name]) for name in ARMS}
    commit = content["provenance"]["git_commit"]
    out.write_text(json.dumps({"git_commit": commit, "batch": found}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
