"""The results of a bench as a table."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from specdec.bench.grid import in_words, short_names
from specdec.report.runs import results_title

# Columns that have an interval, the one to give up first at the end.
_INTERVALS = ("speedup_vs_plain", "tau", "speedup_vs_hf")


def results_table(results: dict[str, Any], width: int = 140) -> Table:
    """One row an arm, with as many 95 % intervals over prompts as fit.

    Args:
        results: the content of `results.json`.
        width: columns of the terminal.
    """
    return fitting(lambda intervals: _table(results, intervals), width)


def fitting(build: Callable[[tuple[str, ...]], Table], width: int) -> Table:
    """The table with as many intervals as fit.

    Args:
        build: makes it, given the columns that show one.
        width: columns of the terminal.
    """
    return first_that_fits((build(intervals) for intervals in interval_choices()), width)


def interval_choices() -> list[tuple[str, ...]]:
    """Which columns show their interval: all that have one, then fewer and fewer."""
    return [_INTERVALS[:count] for count in range(len(_INTERVALS), -1, -1)]


def first_that_fits(tables: Iterable[Table], width: int) -> Table:
    """The first table that fits, or the last one.

    Args:
        tables: the one that shows most first.
        width: columns of the terminal.
    """
    console = Console(width=1000)
    for table in tables:
        if console.measure(table).maximum <= width:
            break
    return table


def _table(results: dict[str, Any], intervals: tuple[str, ...]) -> Table:
    table = Table(
        title=results_title(results),
        caption=_caption(results, bool(intervals)),
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    # Where a terminal is too narrow for everything, an arm's name goes on in the next line.
    table.add_column("arm", overflow="fold")
    headers = ("tau", "acc.", "tokens\n/s", "vs\nplain", "vs\nHF", "e2e", "loop\neff.", "differ")
    for header in (*headers, "failed"):
        table.add_column(header, justify="right", no_wrap=True)
    for arm in results["arms"]:
        table.add_row(
            arm["name"],
            with_interval(arm, "tau", intervals),
            "-" if not arm["acceptance_rate"] else f"{arm['acceptance_rate']:.0%}",
            number(arm["decode_tokens_per_s"], 0),
            with_interval(arm, "speedup_vs_plain", intervals),
            with_interval(arm, "speedup_vs_hf", intervals),
            number(arm["end_to_end_speedup_vs_plain"], 2),
            number(arm["loop_efficiency"], 3),
            "-" if arm["mismatches"] is None else str(arm["mismatches"]),
            str(arm["failed"]),
        )
    return table


def _caption(results: dict[str, Any], has_intervals: bool) -> str:
    lines = [
        "acc.: accepted / drafted; speeds: of total times; e2e: with prefill",
        "HF: transformers' generate; differ: prompts whose greedy tokens differ",
    ]
    if has_intervals:
        lines.append("in brackets: 95 % intervals over prompts")
    differences = [each for arm in results["arms"] for each in arm["differences"]]
    gaps = [each["top2_gap"] for each in differences if each["top2_gap"] is not None]
    if gaps:
        lines.append(f"the two best logits where outputs part are at most {max(gaps):.2g} apart")
    return "\n".join(lines)


def number(value: float | None, digits: int) -> str:
    """A figure in a table; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def with_interval(arm: dict[str, Any], key: str, intervals: tuple[str, ...]) -> str:
    """An arm's figure, with its interval where that is among those to show."""
    value, interval = arm[key], arm[f"{key}_ci"]
    if value is None or interval is None or key not in intervals:
        return number(value, 2)
    low, high = interval
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def analysis_table(analysis: dict[str, Any]) -> Table:
    """One row a drafter.

    Args:
        analysis: the content of `analysis.json`.
    """
    table = Table(
        title=_title(analysis),
        caption="tau: expected accepted length as configured; best: of chains up to 10 tokens, and "
        "of static trees\nin brackets: 95 % intervals over prompts",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("drafter", overflow="fold")
    for header in ("alpha", "tau", "depth 1", "2", "3", "ECE", "best\nchain", "best\ntree"):
        table.add_column(header, justify="right", no_wrap=True)
    for each in analysis["drafters"]:
        configured = each["configured"] or {"tau": None, "tau_ci": None}
        depths = [*each["per_depth_conditional"], None, None, None][:3]
        table.add_row(
            each["name"],
            _with_interval(each["alpha"], each["alpha_ci"]),
            _with_interval(configured["tau"], configured["tau_ci"]),
            *map(_number, depths),
            _number((each["calibration"] or {}).get("ece")),
            _best(each["expected"]["chains"], "length"),
            _best(each["expected"]["trees"], "nodes"),
        )
    return table


def _title(analysis: dict[str, Any]) -> str:
    config, texts = analysis["provenance"]["config"], len(analysis["prompts"])
    tokens = sum(prompt["new_tokens"] for prompt in analysis["prompts"])
    return (
        f"{texts} texts of {tokens} new tokens, T = {config['sampling']['temperature']:g}: "
        "expected, not measured"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _with_interval(value: float | None, interval: list[float] | None) -> str:
    if value is None or interval is None:
        return _number(value)
    return f"{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"


def _best(rows: list[dict[str, Any]], size: str) -> str:
    if not rows:
        return "-"
    best = max(rows, key=lambda row: row["tau"])
    return f"{best['tau']:.2f} ({best[size]})"


def choices_table(found: Sequence[dict[str, Any]], chosen: dict[str, Any]) -> Table:
    """One row a choice of taps, dtype and number of logits; the chosen one is marked.

    Args:
        found: of `FeatureExtraction.choices`.
        chosen: one of them.
    """
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("taps")
    table.add_column("dtype")
    for header in ("top-k", "bytes per token", "bytes"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("")
    for each in found:
        note = "chosen" if each == chosen else ""
        table.add_row(
            ",".join(map(str, each["taps"])) or "none",
            each["dtype"] if each["taps"] else "-",
            str(each["top_k"]),
            f"{each['bytes_per_token']:,.1f}",
            f"{each['bytes']:,}",
            ", ".join(filter(None, [note, "" if each["fits"] else "does not fit"])),
        )
    return table


def plan_table(plan: dict[str, Any]) -> Table:
    """The choice and the runners-up.

    Args:
        plan: the content of `plan.json`.
    """
    size, tokens = plan["choice"]["batch_size"], plan["workload"]["tokens"]
    table = _table_of_plan_table(
        f"plan for batch size {size}: predictions from measured costs and the acceptance of "
        f"{tokens} tokens",
        "in brackets: 95 % intervals; tau: from acceptance; step: milliseconds of draft, target "
        "and everything else, timed as it is or fitted to other shapes"
        + "".join(f"\n{x}" for x in not_trusted(plan)),
    )
    for header in ("", "configuration"):
        table.add_column(header, overflow="fold")
    for header in ("tau", "vs plain", "step is", "step", "draft", "target", "other"):
        table.add_column(header, justify="right", no_wrap=True)
    for place, row in enumerate([plan["choice"], *plan["runners_up"]]):
        step = row["step_ms"]
        table.add_row(
            "choice" if place == 0 else str(place + 1),
            row["name"],
            _with_interval_of_plan_table(row, "predicted_tau"),
            _with_interval_of_plan_table(row, "predicted_speedup"),
            timed_or_fitted(row),
            *(f"{step[part]:.2f}" for part in ("wall", "draft", "target", "other")),
        )
    return table


def timed_or_fitted(configuration: dict[str, Any]) -> str:
    """Where the times of its steps come from."""
    return "timed" if configuration["is_timed"] else "fitted"


def not_trusted(plan: dict[str, Any]) -> list[str]:
    """A warning about a plan whose times a busy machine made; none for others, or old ones."""
    trust = plan.get("trust")
    if not trust or trust["is_trusted"]:
        return []
    return [
        f"its times are not to be trusted: {'; '.join(trust['reasons'])}; plan again, in a new "
        "folder, with nothing else running"
    ]


def schedule_table(plan: dict[str, Any]) -> Table:
    """The draft length of every batch size."""
    table = _table_of_plan_table(
        f"nodes to draft, {plan['controller']['drafter']}",
        "0: plain decoding",
    )
    table.add_column("rows", justify="right")
    table.add_column("nodes", justify="right")
    table.add_column("vs plain", justify="right")
    table.add_column("step is")
    for size, nodes in plan["schedule"].items():
        here = [row for row in plan["schedule_predictions"] if row["batch_size"] == int(size)]
        best = next((row for row in here if row["nodes"] == nodes), None)
        gain = f"{best['predicted_speedup']:.2f}" if best else "1.00"
        table.add_row(size, str(nodes), gain, timed_or_fitted(best) if best else "timed")
    return table


def costs_table(plan: dict[str, Any]) -> Table:
    """What the fits leave over."""
    table = _table_of_plan_table(
        "fits of measured times", "errors are relative to the measured time"
    )
    table.add_column("what")
    for header in ("rows", "points", "median error", "largest"):
        table.add_column(header, justify="right")
    costs = plan["costs"]
    for size, fit in costs["forward"].items():
        count = sum(p["batch_size"] == int(size) and not p["is_tree"] for p in costs["points"])
        _residuals(table, "target forward", size, count, fit["chain"]["residuals"])
    for row in costs["drafters"]:
        name, size = f"step with {row['drafter']}", str(row["batch_size"])
        _residuals(table, name, size, len(row["points"]), row["residuals"])
    return table


def _residuals(table: Table, name: str, size: str, count: int, errors: dict[str, float]) -> None:
    table.add_row(name, size, str(count), f"{errors['median']:.1%}", f"{errors['largest']:.1%}")


def estimate_table(estimate: dict[str, Any]) -> Table:
    """An estimate's drafters at their best draft lengths.

    Args:
        estimate: what `specdec.planning.roofline.estimate` gave.
    """
    table = _table_of_plan_table("ESTIMATE from stated parameters: nothing here was measured", None)
    table.add_column("drafter")
    for header in ("rows", "alpha", "est. draft ms", "est. best length", "est. tau"):
        table.add_column(header, justify="right")
    for header in ("est. step ms", "est. vs plain", "est. tokens/s a row"):
        table.add_column(header, justify="right")
    for row in estimate["drafters"]:
        best = row["best"]
        table.add_row(
            row["name"],
            str(row["batch_size"]),
            str(row["alpha"]),
            f"{row['estimated_draft_forward_ms']:.2f}",
            str(best["num_draft_tokens"]),
            f"{best['estimated_tau']:.2f}",
            f"{best['estimated_step_ms']:.2f}",
            f"{best['estimated_speedup']:.2f}",
            f"{best['estimated_tokens_per_s']:.1f}",
        )
    return table


def _table_of_plan_table(title: str, caption: str | None) -> Table:
    return Table(title=title, caption=caption, box=SIMPLE_HEAD, show_edge=False, pad_edge=False)


def _with_interval_of_plan_table(row: dict[str, Any], key: str) -> str:
    interval = row[f"{key}_ci"]
    shown = "" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]"
    return f"{row[key]:.2f}{shown}"


def planned_table(plan: dict[str, Any], results: dict[str, Any]) -> Table:
    """One row an arm that the plan knows, the chosen one marked.

    Args:
        plan: the content of `plan.json`.
        results: the content of `results.json`, of the same prompts and settings.
    """
    choice = plan["choice"]["name"]
    table = Table(
        title=f"The plan chose: {choice}",
        caption="\n".join(["speed / plain; in brackets: 95 % intervals", *not_trusted(plan)]),
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("arm", overflow="fold")
    headers = ("tau\npredicted", "tau\nmeasured", "steps\nare", "speed\npredicted")
    for header in (*headers, "speed\nmeasured", "measured /\npredicted"):
        table.add_column(header, justify="right", no_wrap=True)
    predictions = {each["name"]: each for each in plan["configurations"]}
    for arm in results["arms"]:
        known = predictions.get(arm["name"])
        measured = arm["speedup_vs_plain"]
        # A draft length that changes with the batch is another configuration than the plan's.
        if known is None or measured is None or arm["draft_length"] is not None:
            continue
        table.add_row(
            arm["name"] + (" *" if arm["name"] == choice else ""),
            number(known["predicted_tau"], 2),
            number(arm["tau"], 2),
            timed_or_fitted(known),
            _speed(known["predicted_speedup"], known["predicted_speedup_ci"]),
            _speed(measured, arm["speedup_vs_plain_ci"]),
            number(measured / known["predicted_speedup"], 2),
        )
    return table


def _speed(value: float, interval: list[float] | None) -> str:
    if interval is None:
        return number(value, 2)
    return f"{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"


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
        fitting(
            lambda shown: _table_of_suite_table(results, first(shown), _notes(results, shown)),
            width,
        ),
        _table_of_suite_table(results, _waiting(results), [_DEFINITIONS]),
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


def _table_of_suite_table(results: dict[str, Any], columns: Columns, notes: list[str]) -> Table:
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


def sweep_table(sweep: dict[str, Any], width: int = 140) -> Table:
    """One row an arm of a cell, with as much of this as fits: domains, and 95 % intervals.

    Args:
        sweep: the content of `sweep.json`.
        width: columns of the terminal.
    """
    choices = [
        (intervals, domains)
        for domains in _domains(sweep)
        for intervals in interval_choices()
        # Without a single interval, domains would say more than was measured.
        if intervals or not domains
    ]
    return first_that_fits((_table_of_sweep_table(sweep, *choice) for choice in choices), width)


def _domains(sweep: dict[str, Any]) -> list[list[str]]:
    """The domains of all cells, then none; of a single one there is nothing more to say."""
    arms = [arm for cell in sweep["cells"] for arm in cell["arms"]]
    names = list(dict.fromkeys(name for arm in arms for name in arm["domains"]))
    several = any(len(arm["domains"]) > 1 for arm in arms)
    return [names, []] if several else [[]]


def _table_of_sweep_table(
    sweep: dict[str, Any], intervals: tuple[str, ...], domains: list[str]
) -> Table:
    cells = sweep["cells"]
    table = Table(
        title=f"{len(cells)} cells",
        caption=_caption_of_sweep_table(intervals, domains),
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    names = short_names(list(cells[0]["settings"]))
    for name in names.values():
        table.add_column(name.replace("_", "\n"), no_wrap=True)
    table.add_column("arm", overflow="fold")
    for header in ("tau", "tokens\n/s", "vs\nplain", "vs\nHF", *domains):
        table.add_column(header, justify="right", no_wrap=True)
    for cell in cells:
        settings = [_setting(cell["settings"][key]) for key in names]
        # What failed before it measured anything keeps its place in the table.
        for place, arm in enumerate(cell["arms"] or [None]):
            shown = settings if place == 0 else [""] * len(settings)
            figures = _figures(arm, intervals, domains) if arm else ["failed"]
            table.add_row(*shown, *figures)
        table.add_section()
    return table


def _caption_of_sweep_table(intervals: tuple[str, ...], domains: list[str]) -> str | None:
    lines = ["in brackets: 95 % intervals over prompts"] if intervals else []
    if domains:
        lines.append("by domain: tau and speed / plain decoding")
    return "\n".join(lines) or None


def _setting(value: Any) -> str:
    return in_words(value).rstrip("/").rpartition("/")[2]


def _figures(arm: dict[str, Any], intervals: tuple[str, ...], domains: list[str]) -> list[str]:
    return [
        arm["name"],
        with_interval(arm, "tau", intervals),
        number(arm["decode_tokens_per_s"], 0),
        with_interval(arm, "speedup_vs_plain", intervals),
        with_interval(arm, "speedup_vs_hf", intervals),
        *(_of_domain(arm["domains"].get(domain)) for domain in domains),
    ]


def _of_domain(figures: dict[str, Any] | None) -> str:
    if figures is None:
        return "-"
    return f"{number(figures['tau'], 2)}  {number(figures['speedup_vs_plain'], 2)}"
