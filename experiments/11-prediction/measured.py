"""The planned configurations with the plan's choice and its runners-up: what is measured.

python experiments/11-prediction/measured.py runs/experiments/11-plan/plan.json CONFIG.yaml
"""

import json
from pathlib import Path

import typer
import yaml

PLANNED = Path(__file__).parent / "configurations.yaml"


def main(plan: Path, out: Path) -> None:
    content = json.loads(plan.read_text())
    best = [content["choice"], *content["runners_up"]]
    config = yaml.safe_load(PLANNED.read_text())
    config["arms"] += [
        {key: each[key] for key in ("name", "type", "options")}
        for each in best
        if not each["is_given"] and each["type"] != "plain"
    ]
    out.write_text(yaml.safe_dump(config, sort_keys=False))


if __name__ == "__main__":
    typer.run(main)
