"""The configuration of a bench, chosen by a plan."""

from dataclasses import replace
from pathlib import Path

from specdec.bench.config import ArmConfig, BenchConfig
from specdec.planning.measure import Progress
from specdec.planning.plan import run_plan


def choose(
    config: BenchConfig,
    folder: Path,
    progress: Progress = lambda done, total, text: None,
    *,
    quick: bool = False,
) -> BenchConfig:
    """Let a plan choose the arm; where no drafter pays, there is none, and plain decoding is left.

    Args:
        config: its arms say which drafters there are.
        folder: of the plan; its measured points are kept and used again.
        progress: as in `run_plan`.
        quick: as in `run_plan`.

    Raises:
        ValueError: as in `run_plan`.
        OSError: as in `run_plan`.
    """
    plan = run_plan(config, folder, progress, quick=quick)
    chosen = plan["choice"]
    arms = [ArmConfig(chosen["name"], chosen["type"], dict(chosen["options"]))]
    return replace(config, arms=[] if chosen["type"] == "plain" else arms)
