"""Results files of older versions, turned into today's."""

from collections.abc import Sequence
from typing import Any

from specdec.common.stats import Work, Works, total_speed

# Their headline was a mean over prompts of ratios.
_MEANS = ("specdec-bench-1", "specdec-bench-2", "specdec-sweep-1", "specdec-suite-1")


def renew(data: dict[str, Any], domains: Sequence[str] = ()) -> None:
    """Turn the speedups of older results into ratios of total times, as far as their records tell.

    With figures by prompt it is what a bench writes today. Without them, of rows that were decoded
    one at a time, the ratio is known and its interval is not. The former headline stands as
    `mean_speedup_vs_plain`.

    Args:
        data: the content of a results file, changed in place; today's files stay as they are.
        domains: domains of the prompts, where the file does not hold them.
    """
    if data.get("schema") not in _MEANS:
        return
    config = (data.get("provenance") or {}).get("config") or {}
    one_row = config.get("batch_size", 1) == 1 and data.get("suite") != "concurrent"
    names = [prompt["domain"] for prompt in data.get("prompts") or ()] or list(domains)
    given = {arm["name"]: arm for arm in config.get("arms") or ()}
    for part in data.get("cells") or data.get("groups") or [data]:
        alone = one_row and "cells" not in data  # a sweep does not say of which rows it is
        arms = part["arms"]
        _renew_speeds(arms, alone, config.get("repeats") or _repeats(arms), names)
        if "groups" not in data:
            for arm in arms:
                known = given.get(arm["name"], {"type": arm["name"]})
                for key in ("type", "options", "draft_length"):
                    if key in known:
                        arm.setdefault(key, known[key])


def _repeats(arms: list[dict[str, Any]]) -> int:
    """Repeats of a sweep's cell: tokens of all of them over those of the first."""
    arm = next((arm for arm in arms if not arm["failed"]), None)
    tokens = sum(each["tokens"] for each in arm["per_prompt"]) if arm else 0
    return round(tokens / arm["tokens"]) if arm else 0


def _renew_speeds(
    arms: list[dict[str, Any]], one_row: bool, repeats: int, domains: Sequence[str]
) -> None:
    works = {arm["name"]: _works(arm, one_row, repeats) for arm in arms}
    totals = [[_total(arm.get("batch_tokens_per_s") if one_row else None)] for arm in arms]
    for arm, total in zip(arms, totals, strict=True):
        arm["mean_speedup_vs_plain"] = arm["speedup_vs_plain"]
        arm |= _speeds(arm["name"], works)
        arm |= total_speed("end_to_end_speedup_vs_plain", [total], totals[:1])
        for name, figures in (arm.get("domains") or {}).items():
            rows = [place for place, domain in enumerate(domains) if domain == name]
            figures |= _speeds(arm["name"], {n: [w[row] for row in rows] for n, w in works.items()})


def _speeds(name: str, works: dict[str, Works]) -> dict[str, Any]:
    found = total_speed("decode_tokens_per_s", [works[name]])
    for key, baseline in (("plain", "plain"), ("hf", "hf_generate")):
        if baseline in works:
            found |= total_speed(f"speedup_vs_{key}", [works[name]], [works[baseline]])
    return found


def _works(arm: dict[str, Any], one_row: bool, repeats: int) -> Works:
    """Work by prompt; without figures by prompt, the whole as though it were one."""
    if "per_prompt" in arm:
        failed = [each["prompt"] for each in arm["failures"]]
        prompts = enumerate(arm["per_prompt"])
        return [_work(each, repeats - failed.count(place)) for place, each in prompts]
    speed = arm.get("batch_decode_tokens_per_s")
    if "requests" in arm and one_row and arm["time_s"]["wall"]:
        speed = repeats * (arm["tokens"] - arm["requests"]) / arm["time_s"]["wall"]
    return [_total(speed if one_row and not arm["failed"] else None)]


def _work(figures: dict[str, Any] | None, repeats: int) -> Work | None:
    """A prompt's mean tokens after the first, at the median speed, which the file holds."""
    if figures is None:
        return None
    speed = figures["decode_tokens_per_s"]
    tokens = figures["tokens"] / repeats - 1 if repeats else 0.0
    found = Work(tokens, tokens / speed) if speed and tokens > 0 else None
    figures |= {"decode_tokens": found and found.tokens, "decode_s": found and found.seconds}
    return found


def _total(speed: float | None) -> Work | None:
    return Work(speed, 1.0) if speed else None
