"""The plan's choice and schedule as overrides of follow.yaml, a line each.

python experiments/10-batch/planned.py runs/experiments/10-plan/plan.json
"""

import json
from pathlib import Path

import typer

NUM_ARMS, SCHEDULED = 3, 1


def main(plan: Path) -> None:
    content = json.loads(plan.read_text())
    choice = content["choice"]
    if choice["type"] == "plain":
        raise typer.BadParameter(f"{plan} found no draft that pays at batch 1; measure again")
    for arm in range(NUM_ARMS):
        print(f"arms.{arm}.options={json.dumps(choice['options'])}")
    lengths = ", ".join(f"{size}: {nodes}" for size, nodes in content["schedule"].items())
    print(f"arms.{SCHEDULED}.draft_length={{{lengths}}}")


if __name__ == "__main__":
    typer.run(main)
