"""How a plan's predictions compare with what a bench then measured.

python experiments/11-prediction/check.py runs/plan RESULTS.json [RESULTS.json ...]

RESULTS are results.json or sweep.json of benches; arms are matched by type and options. Ends with
status 1 where a goal is missed: median error under 7 %, rank correlation above 0.9, choice within
3 % of the best.
"""

import json
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from scipy.stats import spearmanr

Row = dict[str, Any]
HEADER = ("configuration", "tau", "planned", "speed", "planned", "error", "inside", "draft", "pl.")


def arms_of(path: Path) -> list[Row]:
    """Measured arms of our loop; of a sweep, those of all its cells."""
    content = json.loads(path.read_text())
    found = [arm for part in content.get("cells", [content]) for arm in part["arms"]]
    ours = [arm for arm in found if arm["name"] not in ("plain", "hf_generate")]
    return [arm for arm in ours if arm["speedup_vs_plain"]]


def key_of(row: Row) -> str:
    return json.dumps([row["type"], row["options"]], sort_keys=True)


def main(plan: Path, results: Annotated[list[Path], typer.Argument()]) -> None:
    content = json.loads((plan / "plan.json" if plan.is_dir() else plan).read_text())
    planned = {key_of(row): row for row in content["configurations"]}
    arms = [arm for path in results for arm in arms_of(path)]
    pairs = [(planned[key_of(arm)], arm) for arm in arms if key_of(arm) in planned]
    if len(pairs) < 2:
        raise typer.BadParameter(f"the plan holds {len(pairs)} of the {len(arms)} measured arms")
    print(("{:30}" + "{:>9}" * (len(HEADER) - 1)).format(*HEADER) + "   target   pl. | other pl.")
    for row, arm in sorted(pairs, key=lambda pair: -pair[1]["speedup_vs_plain"]):
        print(line(row, arm))
    print(f"{len(pairs)} configurations; {len(arms) - len(pairs)} measured ones are not planned")
    if not judge(pairs, content["choice"]):
        raise typer.Exit(1)


def line(row: Row, arm: Row) -> str:
    planned, measured = row["predicted_speedup"], arm["speedup_vs_plain"]
    low, high = row["predicted_speedup_ci"] or (planned, planned)
    time_s = arm["time_s"]
    steps = sum(each["steps"] for each in arm["per_prompt"] if each)
    ms = {part: 1000 * time_s[part] / steps for part in time_s}
    ms["other"] = ms["wall"] - ms["draft"] - ms["target"]
    parts = (
        f"{ms[part]:8.2f} {row['step_ms'][part]:5.2f}" for part in ("draft", "target", "other")
    )
    return (
        f"{arm['name']:30.30}{arm['tau']:9.2f}{row['predicted_tau']:9.2f}{measured:9.2f}"
        f"{planned:9.2f}{planned / measured - 1:+9.1%}{low <= measured <= high!s:>9} "
        + " | ".join(parts)
    )


def judge(pairs: list[tuple[Row, Row]], choice: Row) -> bool:
    predicted = [row["predicted_speedup"] for row, _ in pairs]
    measured = [arm["speedup_vs_plain"] for _, arm in pairs]
    error = median(abs(p / m - 1) for p, m in zip(predicted, measured, strict=True))
    rank = float(spearmanr(predicted, measured).statistic)
    chosen = next((arm for row, arm in pairs if key_of(row) == key_of(choice)), None)
    whose = "the choice" if chosen else "not measured: the choice; the best planned one measured"
    chosen = chosen or max(pairs, key=lambda pair: pair[0]["predicted_speedup"])[1]
    regret = 1 - chosen["speedup_vs_plain"] / max(measured)
    print(f"median error {error:.1%}, rank correlation {rank:.3f}")
    print(f"{whose}, {chosen['name']!r}, is {regret:.1%} behind the best measured")
    return error < 0.07 and rank > 0.9 and regret < 0.03


if __name__ == "__main__":
    typer.run(main)
