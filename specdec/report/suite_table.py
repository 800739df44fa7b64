"""The results of a suite as tables."""

from collections.abc import Callable
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from specdec.report.table import fitting, number, with_interval

_FIRST = {
    "single_turn": "prompt, tokens",
    "multi_turn": "turn",
    "long_context": "position, tokens",
    "concurrent": "users",
}
_DEFINITIONS = (
    "TTFT: from sending to the first token; ITL: a request's mean time between tokens; "
    "chunk gap: from one chunk of tokens to the next"
)
Figure = Callable[[dict[str, Any]], str]
Columns = dict[str, Figure]  # header -> what stands there for an arm of a group


def suite_tables(results: dict[str, Any], width: int = 140) -> list[Table]:
    """Speeds and waiting times, a row an arm of a group.

    Args:
        results: the content of `suite.json`.
        width: columns of the terminal.
    """
    first = _load if results["suite"] == "concurrent" else _alone
    return [
        fitting(lambda shown: _table(results, first(shown), _notes(results, shown)), width),
        _table(results, _waiting(results), [_DEFINITIONS]),
    ]


def suite_title(results: dict[str, Any]) -> str:
    """Suite, model, machine and settings in one line."""
    where = results["provenance"]
    config = where["config"]
    name = config["target"]["path"].rstrip("/").rpartition("/")[2]
    repeats = f"{config['repeats']} repeat{'s' * (config['repeats'] > 1)}"
    return (
        f"{results['suite'].replace('_', ' ')}: {name} on {where['device']}, {where['dtype']}, "
        f"T = {config['sampling']['temperature']:g}, {repeats}"
    )


def _table(results: dict[str, Any], columns: Columns, notes: list[str]) -> Table:
    table = Table(
        title=suite_title(results),
        caption="\n".join(notes),
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column(_FIRST[results["suite"]], overflow="fold")
    table.add_column("arm", overflow="fold")
    arms = [arm for group in results["groups"] for arm in group["arms"]]
    # What this machine does not tell, such as power, takes no space.
    columns = {h: of for h, of in columns.items() if any(of(arm) != "-" for arm in arms)}
    for header in columns:
        table.add_column(header, justify="right", no_wrap=True)
    for group in results["groups"]:
        for place, arm in enumerate(group["arms"]):
            figures = [figure(arm) for figure in columns.values()]
            table.add_row("" if place else group["name"], arm["name"], *figures)
        table.add_section()
    return table


def _alone(shown: tuple[str, ...]) -> Columns:
    """Of suites that serve one request at a time."""
    return {
        "tau": lambda arm: with_interval(arm, "tau", shown),
        "accepted": lambda arm: (
            "-" if not arm["acceptance_rate"] else f"{arm['acceptance_rate']:.0%}"
        ),
        "tokens\n/s": lambda arm: number(arm["decode_tokens_per_s"], 0),
        "vs\nplain": lambda arm: with_interval(arm, "speedup_vs_plain", shown),
        "with prefill\nvs plain": lambda arm: number(arm["end_to_end_speedup_vs_plain"], 2),
        "loop\neff.": lambda arm: number(arm["loop_efficiency"], 3),
        **_MEMORY,
        **_CHECKS,
    }


def _load(shown: tuple[str, ...]) -> Columns:
    """Of users at the same time."""
    return {
        "tau": lambda arm: number(arm["tau"], 2),
        "tokens/s\nall users": lambda arm: number(arm["load"]["tokens_per_s"], 0),
        "vs\nplain": lambda arm: number(arm["load"]["tokens_per_s_vs_plain"], 2),
        "tokens/s\na user": lambda arm: number(arm["load"]["user_tokens_per_s_mean"], 0),
        "a user's\nvs plain": lambda arm: _user_speed(arm["load"], shown),
        "Jain": lambda arm: number(arm["load"]["jain_index"], 3),
        "worst\n/mean": lambda arm: number(arm["load"]["worst_over_mean"], 2),
        **_MEMORY,
        **_CHECKS,
    }


def _user_speed(load: dict[str, Any], shown: tuple[str, ...]) -> str:
    # Columns give up their intervals by name, and this is the speed that counts here.
    key = "speedup_vs_plain"
    speed = {key: load["user_speed_vs_plain"], f"{key}_ci": load["user_speed_vs_plain_ci"]}
    return with_interval(speed, key, shown)


def _waiting(results: dict[str, Any]) -> Columns:
    kinds = {"ttft_s": "TTFT", "itl_s": "ITL", "chunk_gap_s": "chunk gap"}
    if results["suite"] == "concurrent":
        kinds = {"queue_s": "queue", **kinds}
    else:
        kinds = {**kinds, "latency_s": "request"}
    return {
        f"{name}\n{percentile} ms": _milliseconds(key, percentile)
        for key, name in kinds.items()
        for percentile in ("p50", "p95", "p99")
    }


def _milliseconds(key: str, percentile: str) -> Figure:
    def figure(arm: dict[str, Any]) -> str:
        seconds = arm[key].get(percentile)
        return number(None if seconds is None else 1000 * seconds, 1)

    return figure


def _memory(key: str) -> Figure:
    def figure(arm: dict[str, Any]) -> str:
        count = arm["memory"][key]
        return number(None if count is None else count / 2**20, 0)

    return figure


_MEMORY: Columns = {
    "cache\nMiB": _memory("cache_bytes"),
    "process\nMiB": _memory("peak_rss_bytes"),
    "device\nMiB": _memory("peak_device_bytes"),
    "J/token": lambda arm: number(arm["power"]["energy_j_per_token"], 3),
}
_CHECKS: Columns = {
    "differ": lambda arm: "-" if arm["mismatches"] is None else str(arm["mismatches"]),
    "failed": lambda arm: str(arm["failed"]),
}


def _notes(results: dict[str, Any], shown: tuple[str, ...]) -> list[str]:
    notes = ["differ: requests whose greedy tokens are not plain decoding's"]
    if results["suite"] == "concurrent":
        notes.append("Jain: 1 where all users are served alike")
    if shown:
        notes.append("in brackets: 95 % intervals over requests")
    arms = [arm for group in results["groups"] for arm in group["arms"]]
    if all(arm["power"]["energy_j"] is None for arm in arms):
        notes.append("power: not measured, which takes a CUDA device and nvidia-ml-py")
    return notes
