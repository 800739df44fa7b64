"""Building what an arm's `draft_length` says."""

from pathlib import Path
from typing import Any

from specdec.bench.config import ArmConfig
from specdec.draft_length import DraftLength, OnlineController, Schedule
from specdec.files import parse_json
from specdec.interfaces import Drafter
from specdec.targets.hf import HFTarget


def load_draft_length(arm: ArmConfig, drafter: Drafter, target: HFTarget) -> DraftLength | None:
    """What `generate` takes as `draft_length`, built afresh; None for no limit.

    Args:
        arm: with its `draft_length`.
        drafter: of the arm.
        target: what it drafts for.

    Raises:
        FileNotFoundError: the plan is not there.
        ValueError: it holds no controller, or that of another drafter or target.
    """
    option = arm.draft_length
    if option is None:
        return None
    if "plan" not in option:
        return Schedule(option)
    path = Path(option["plan"]).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"draft_length.plan is {str(path)!r} but must be a plan.json that specdec plan wrote"
        )
    try:
        plan = parse_json(path.read_text(encoding="utf-8-sig"))
        step_s = _step_s(plan)
        planned = {**plan.get("target", {})}
        planned["type"] = plan["configurations"][0]["type"] if "configurations" in plan else None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"draft_length.plan {str(path)!r} holds no controller.step_s; give a plan.json that "
            "specdec plan wrote"
        ) from error
    _check_made_for(planned, path, arm, target)
    return OnlineController(step_s, trees=drafter.makes_trees)


def _check_made_for(planned: dict[str, Any], path: Path, arm: ArmConfig, target: HFTarget) -> None:
    """Refuse what another drafter or target costs; a plan written by hand may leave both out."""
    sizes = {"vocab_size": target.vocab_size, "num_layers": target.config.num_hidden_layers}
    sizes["hidden_size"] = target.config.hidden_size
    pairs = [("a drafter of type", planned["type"] or arm.type, arm.type)]
    pairs += [(f"a target of {key}", planned.get(key, size), size) for key, size in sizes.items()]
    for what, made_for, given in pairs:
        if made_for != given:
            raise ValueError(
                f"draft_length.plan {str(path)!r} of {arm.name!r} was made for {what} {made_for}, "
                f"not {given}: a step costs something else there; plan this one, or give a "
                "schedule as in {1: 6, 8: 0}"
            )


def _step_s(plan: dict[str, Any]) -> dict[int, dict[int, float]]:
    """Seconds of a step by batch size and nodes, which JSON keeps under text keys."""
    return {
        int(size): {int(nodes): float(seconds) for nodes, seconds in row.items()}
        for size, row in plan["controller"]["step_s"].items()
    }
