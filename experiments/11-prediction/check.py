"""How a plan's predictions compare with what a bench then measured.

python experiments/11-prediction/check.py runs/plan RESULTS.json [RESULTS.json ...]

RESULTS are results.json or sweep.json of benches; arms are matched by type and options. Ends with
status 1 where a goal is missed: median error under 7 %, rank correlation above 0.9, choice within
3 % of the best.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).parents[1]))  # of what all experiments share

from prediction import chosen, covers, join, summary

from specdec.planning.results import Configuration
from specdec.report.plan import Match
from specdec.report.runs import read_file

HEADER = ("configuration", "tau", "planned", "speed", "planned", "error", "inside", "draft", "pl.")


def main(plan: Path, results: Annotated[list[Path], typer.Argument()]) -> None:
    content = read_file(plan / "plan.json" if plan.is_dir() else plan)[1]
    measured = [read_file(path)[1] for path in results]
    parts = [part for each in measured for part in getattr(each, "cells", [each])]
    arms = [arm for part in parts for arm in part.arms if arm.name not in ("plain", "hf_generate")]
    pairs = join(content, arms)
    if len(pairs) < 2:
        raise typer.BadParameter(f"the plan holds {len(pairs)} of the {len(arms)} measured arms")
    print(("{:30}" + "{:>9}" * (len(HEADER) - 1)).format(*HEADER) + "   target   pl. | other pl.")
    for pair in pairs:
        print(line(pair))
    print(f"{len(pairs)} configurations; {len(arms) - len(pairs)} measured ones are not planned")
    if not judge(pairs, content.choice):
        raise typer.Exit(1)


def line(pair: Match) -> str:
    planned, arm = pair.planned, pair.arm
    steps = sum(each.steps for each in arm.per_prompt if each)
    ms = {part: 1000 * seconds / steps for part, seconds in arm.time_s if seconds is not None}
    ms["other"] = ms["wall"] - ms["draft"] - ms["target"]
    parts = (
        f"{ms[part]:8.2f} {getattr(planned.step_ms, part):5.2f}"
        for part in ("draft", "target", "other")
    )
    return (
        f"{arm.name:30.30}{arm.tau:9.2f}{planned.predicted_tau:9.2f}{arm.speedup_vs_plain:9.2f}"
        f"{planned.predicted_speedup:9.2f}{pair.error:+9.1%}{covers(pair)!s:>9} "
        + " | ".join(parts)
    )


def judge(pairs: list[Match], choice: Configuration) -> bool:
    found = summary(pairs)
    best = chosen(pairs)
    was_measured = best.planned.name == choice.name
    whose = (
        "the choice" if was_measured else "not measured: the choice; the best planned one measured"
    )
    print(
        f"median error {found['median_error']:.1%}, "
        f"rank correlation {found['rank_correlation']:.3f}\n"
        f"{whose}, {best.arm.name!r}, is {found['choice_behind_best']:.1%} behind the best measured"
    )
    return (
        found["median_error"] < 0.07
        and found["rank_correlation"] > 0.9
        and found["choice_behind_best"] < 0.03
    )


if __name__ == "__main__":
    typer.run(main)
