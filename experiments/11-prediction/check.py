"""How a plan's predictions compare with what a bench then measured.

python experiments/11-prediction/check.py runs/plan RESULTS.json [RESULTS.json ...]

RESULTS are results.json or sweep.json of benches; arms are matched by type and options. Ends with
status 1 where a goal is missed: median error under 7 %, rank correlation above 0.9, choice within
3 % of the best.
"""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).parents[1]))  # of what all experiments share

from prediction import Pair, Row, chosen, covers, drafting, error, join, key_of, summary
from results import speed

from specdec.report.runs import renew

HEADER = ("configuration", "tau", "planned", "speed", "planned", "error", "inside", "draft", "pl.")


def arms_in(path: Path) -> list[Row]:
    """Measured arms of our loop; of a sweep, those of all its cells."""
    content = json.loads(path.read_text())
    renew(content)
    return drafting(arm for part in content.get("cells", [content]) for arm in part["arms"])


def main(plan: Path, results: Annotated[list[Path], typer.Argument()]) -> None:
    content = json.loads((plan / "plan.json" if plan.is_dir() else plan).read_text())
    renew(content)
    arms = [arm for path in results for arm in arms_in(path)]
    pairs = join(content["configurations"], arms)
    if len(pairs) < 2:
        raise typer.BadParameter(f"the plan holds {len(pairs)} of the {len(arms)} measured arms")
    print(("{:30}" + "{:>9}" * (len(HEADER) - 1)).format(*HEADER) + "   target   pl. | other pl.")
    for pair in pairs:
        print(line(pair))
    print(f"{len(pairs)} configurations; {len(arms) - len(pairs)} measured ones are not planned")
    if not judge(pairs, content["choice"]):
        raise typer.Exit(1)


def line(pair: Pair) -> str:
    row, arm = pair
    time_s = arm["time_s"]
    steps = sum(each["steps"] for each in arm["per_prompt"] if each)
    ms = {part: 1000 * time_s[part] / steps for part in time_s}
    ms["other"] = ms["wall"] - ms["draft"] - ms["target"]
    parts = (
        f"{ms[part]:8.2f} {row['step_ms'][part]:5.2f}" for part in ("draft", "target", "other")
    )
    return (
        f"{arm['name']:30.30}{arm['tau']:9.2f}{row['predicted_tau']:9.2f}{speed(arm):9.2f}"
        f"{row['predicted_speedup']:9.2f}{error(pair):+9.1%}{covers(pair)!s:>9} "
        + " | ".join(parts)
    )


def judge(pairs: list[Pair], choice: Row) -> bool:
    found = summary(pairs)
    planned, arm = chosen(pairs)
    was_measured = key_of(planned) == key_of(choice)
    whose = (
        "the choice" if was_measured else "not measured: the choice; the best planned one measured"
    )
    print(
        f"median error {found['median_error']:.1%}, "
        f"rank correlation {found['rank_correlation']:.3f}\n"
        f"{whose}, {arm['name']!r}, is {found['choice_behind_best']:.1%} behind the best measured"
    )
    return (
        found["median_error"] < 0.07
        and found["rank_correlation"] > 0.9
        and found["choice_behind_best"] < 0.03
    )


if __name__ == "__main__":
    typer.run(main)
