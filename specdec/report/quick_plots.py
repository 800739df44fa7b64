"""The results of a bench as a picture: speed beside acceptance by depth."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from specdec.report.runs import results_title
from specdec.report.tables import suite_title

# Okabe and Ito's colours, which stay apart for colour-blind readers too; baselines are grey.
_COLORS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9")
_MARKERS = "osD^vP*X"
_BASELINE_COLOR = "#999999"
_NUM_BASELINES = 2


def plot_results(results: dict[str, Any], path: Path) -> None:
    """Write a PNG.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            "the picture needs matplotlib; install it with: pip install 'specdec[plot]'"
        ) from error
    draw(results, Figure).savefig(path, dpi=130)


def draw(results: dict[str, Any], figure_class: Any) -> Any:
    """The figure, of matplotlib's class `Figure`."""
    arms = results["arms"]
    figure = figure_class(figsize=(11.5, max(4.6, 1.6 + 0.5 * len(arms))), layout="constrained")
    left, right = figure.subplots(1, 2)
    _speed(left, arms)
    _acceptance(right, arms)
    figure.suptitle(fill(results_title(results), 110), fontsize=10)
    return figure


def _color(arm: dict[str, Any], arms: list[dict[str, Any]]) -> str:
    """The arm's colour, the same in both panels."""
    place = arms.index(arm) - _NUM_BASELINES
    return _BASELINE_COLOR if place < 0 else _COLORS[place % len(_COLORS)]


def _label(arm: dict[str, Any]) -> str:
    return fill(arm["name"], 26)


def _speed(axes: Any, arms: list[dict[str, Any]]) -> None:
    shown = [arm for arm in arms if arm["speedup_vs_plain"] is not None]
    values = [arm["speedup_vs_plain"] for arm in shown]
    intervals = [arm["speedup_vs_plain_ci"] or (v, v) for arm, v in zip(shown, values, strict=True)]
    below = [max(0.0, v - low) for v, (low, _) in zip(values, intervals, strict=True)]
    above = [max(0.0, high - v) for v, (_, high) in zip(values, intervals, strict=True)]
    places = range(len(shown))
    axes.barh(
        places,
        values,
        xerr=[below, above],
        color=[_color(arm, arms) for arm in shown],
        ecolor="#333333",
        capsize=3,
    )
    axes.axvline(1.0, color="#666666", linewidth=1, linestyle="--")
    reach = max([1.0, *(v + a for v, a in zip(values, above, strict=True))])
    for place, arm, value, extra in zip(places, shown, values, above, strict=True):
        label = f"{value:.2f}x" + (f"   tau {arm['tau']:.2f}" if arm["tau"] else "")
        # The box keeps the line at 1 out of the text.
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.text(
            value + extra + 0.02 * reach, place, label, va="center", fontsize=9, bbox=box, zorder=3
        )
    axes.set_yticks(places, [_label(arm) for arm in shown], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.4 * reach)
    axes.set_xlabel("decode time of plain / own, all prompts (95 % interval over prompts)")
    axes.set_title("Speed")


def _acceptance(axes: Any, arms: list[dict[str, Any]]) -> None:
    drafted = [arm for arm in arms if arm["per_depth"]]
    for place, arm in enumerate(drafted):
        axes.plot(
            range(1, len(arm["per_depth"]) + 1),
            arm["per_depth"],
            marker=_MARKERS[place % len(_MARKERS)],
            markersize=5,
            color=_color(arm, arms),
            # Curves that coincide stay visible: the later ones are thinner.
            linewidth=3 - 2 * place / max(1, len(drafted) - 1),
            label=_label(arm),
        )
    axes.set_ylim(0, 1)
    axes.set_xlabel("depth in the draft")
    axes.set_ylabel("steps that accept at this depth / all steps")
    axes.set_title("Acceptance by depth (the sum is tau - 1)")
    axes.grid(alpha=0.3)
    if drafted:
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize=9)


_BLUE, _ORANGE, _GREEN = "#0072b2", "#e69f00", "#009e73"
_SHADES = ("#08306b", "#08519c", "#2171b5", "#4292c6", "#6baed6", "#9ecae1", "#c6dbef")


def plot_curves(log: Path, path: Path) -> None:
    """Write a PNG of a `log.jsonl`.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            "the picture needs matplotlib; install it with: pip install 'specdec[plot]'"
        ) from error
    records = [json.loads(line) for line in log.read_text().splitlines()]
    draw_curves(records, Figure).savefig(path, dpi=130)


def draw_curves(records: Sequence[dict[str, Any]], figure_class: Any) -> Any:
    """The figure, of matplotlib's class `Figure`."""
    steps = [each for each in records if each["kind"] == "step"]
    evaluations = [each for each in records if each["kind"] == "evaluation"]
    figure = figure_class(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _losses(left, steps, evaluations)
    _acceptance_of_curves(right, evaluations)
    return figure


def _losses(axes: Any, steps: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> None:
    places = [each["step"] for each in steps]
    losses = [each["loss"] for each in steps]
    axes.plot(places, losses, color=_BLUE, alpha=0.25, linewidth=0.8)
    axes.plot(places, _smoothed(losses), color=_BLUE, label="training (smoothed)")
    if evaluations:
        held_out = [each["validation_loss"] for each in evaluations]
        axes.plot(_steps(evaluations), held_out, "o-", color=_ORANGE, label="held-out rows")
    axes.set(xlabel="step", ylabel="loss", title="Loss")
    axes.legend()


def _acceptance_of_curves(axes: Any, evaluations: list[dict[str, Any]]) -> None:
    axes.set(xlabel="step", ylabel="share of tested depths", ylim=(0, 1))
    axes.set_title("Offline acceptance on held-out rows")
    if not evaluations:
        axes.text(0.5, 0.5, "no held-out rows", ha="center", transform=axes.transAxes)
        return
    for depth, values in enumerate(zip(*(e["acceptance"] for e in evaluations), strict=True)):
        shade = _SHADES[min(depth, len(_SHADES) - 1)]
        shown = [float("nan") if value is None else value for value in values]
        axes.plot(_steps(evaluations), shown, ".-", color=shade, label=f"depth {depth + 1}")
    axes.legend(loc="lower right", ncols=2, fontsize=8)
    beside = axes.twinx()
    beside.plot(_steps(evaluations), [e["tau"] for e in evaluations], "s--", color=_GREEN)
    beside.set_ylim(bottom=1)
    beside.set_ylabel("offline tau (dashed)", color=_GREEN)


def _steps(records: list[dict[str, Any]]) -> list[int]:
    return [each["step"] for each in records]


def _smoothed(values: list[float]) -> list[float]:
    """Exponential mean over about a fiftieth of the run, without the pull of its start."""
    weight = 1 - 1 / max(1.0, len(values) / 50)
    smoothed, mean, norm = [], 0.0, 0.0
    for value in values:
        mean, norm = weight * mean + (1 - weight) * value, weight * norm + 1 - weight
        smoothed.append(mean / norm)
    return smoothed


# Okabe and Ito's colours, which stay apart for colour-blind readers too; plain decoding is grey.


_LINES = ("-", "--", "-.", ":")
_PLAIN = "#777777"
_DODGE = 0.07  # of the way to the next group, so that error bars stand side by side
_MIB = 2**20

Arm = dict[str, Any]
Value = Callable[[Arm], float | None]


@dataclass(frozen=True)
class _Panel:
    """One figure of all arms over the groups.

    Attributes:
        title: what it is, with its unit.
        value: the figure of an arm in a group.
        interval: its interval; None for none.
        line_at: a value to compare with; None for none.
        shows_plain: whether plain decoding is drawn; not where it is 1 by definition.
    """

    title: str
    value: Value
    interval: Callable[[Arm], Any] = lambda arm: None
    line_at: float | None = None
    shows_plain: bool = True


def _ms(key: str, percentile: str) -> Value:
    def value(arm: Arm) -> float | None:
        seconds = arm[key].get(percentile)
        return None if seconds is None else 1000 * seconds

    return value


_SPEED = _Panel(
    "decode speed / plain decoding",
    lambda arm: arm["speedup_vs_plain"],
    lambda arm: arm["speedup_vs_plain_ci"],
    line_at=1.0,
    shows_plain=False,
)
_TAU = _Panel(
    "tau, tokens per target forward", lambda arm: arm["tau"], lambda arm: arm["tau_ci"], 1.0, False
)
_TOKENS = _Panel(
    "decode speed, tokens/s",
    lambda arm: arm["decode_tokens_per_s"],
    lambda arm: arm["decode_tokens_per_s_ci"],
)
_TTFT = _Panel("TTFT, median, ms", _ms("ttft_s", "p50"))
_ITL = _Panel("mean ITL, median, ms", _ms("itl_s", "p50"))
_LATENCY = _Panel("whole answer, median, ms", _ms("latency_s", "p50"))
_CONCURRENT = (
    _Panel(
        "all users, tokens/s (bars: lowest to highest repeat)",
        lambda arm: arm["load"]["tokens_per_s"],
        lambda arm: arm["load"]["tokens_per_s_range"],
    ),
    _Panel(
        "a user's speed / plain at the same load",
        lambda arm: arm["load"]["user_speed_vs_plain"],
        lambda arm: arm["load"]["user_speed_vs_plain_ci"],
        line_at=1.0,
        shows_plain=False,
    ),
    _Panel("TTFT, 95th percentile, ms", _ms("ttft_s", "p95")),
    _Panel("mean ITL, 95th percentile, ms", _ms("itl_s", "p95")),
    _Panel("fairness, Jain's index", lambda arm: arm["load"]["jain_index"], line_at=1.0),
    _Panel(
        "caches of target and drafter, MiB",
        lambda arm: (
            None if arm["memory"]["cache_bytes"] is None else arm["memory"]["cache_bytes"] / _MIB
        ),
    ),
)
_PANELS = {
    "single_turn": (_SPEED, _TAU, _TTFT, _ITL),
    "multi_turn": (_SPEED, _TAU, _TTFT, _LATENCY),
    "long_context": (_SPEED, _TAU, _TOKENS, _TTFT),
    "concurrent": _CONCURRENT,
}
_AXIS = {
    "single_turn": "prompt (tokens)",
    "multi_turn": "turn",
    "long_context": "position in the context, up to token",
    "concurrent": "users at the same time",
}


def plot_suite(results: dict[str, Any], path: Path) -> None:
    """Write a PNG.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            "the picture needs matplotlib; install it with: pip install 'specdec[plot]'"
        ) from error
    draw_suite(results, Figure).savefig(path, dpi=130)


def draw_suite(results: dict[str, Any], figure_class: Any) -> Any:
    """The figure, of matplotlib's class `Figure`."""
    panels = _PANELS[results["suite"]]
    rows = (len(panels) + 1) // 2
    figure = figure_class(figsize=(11, 3.3 * rows + 1), layout="constrained")
    grid = figure.subplots(rows, 2, squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        _draw(axes, results, panel)
    _legend(figure, results)
    title = f"{suite_title(results)}; bars: 95 % intervals over requests"
    figure.suptitle(fill(title, 110), fontsize=10)
    return figure


def _draw(axes: Any, results: dict[str, Any], panel: _Panel) -> None:
    groups = results["groups"]
    names = [arm["name"] for arm in groups[0]["arms"]]
    if panel.line_at is not None:
        axes.axhline(panel.line_at, color=_PLAIN, linewidth=1, linestyle=(0, (2, 2)))
    for place, name in enumerate(names):
        if place or panel.shows_plain:
            arms = [group["arms"][place] for group in groups]
            shift = _DODGE * (place - (len(names) - 1) / 2)
            _line(axes, arms, panel, shift, _look(place) | {"label": name})
    axes.set_title(panel.title, fontsize=10)
    axes.set_xticks(range(len(groups)), [_tick(results, group) for group in groups], fontsize=9)
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.set_xlabel(_AXIS[results["suite"]], fontsize=9)
    axes.grid(alpha=0.3)
    axes.set_ylim(bottom=0)
    axes.set_ylim(top=1.06 * axes.get_ylim()[1])


def _line(axes: Any, arms: list[Arm], panel: _Panel, shift: float, look: dict[str, Any]) -> None:
    points = [
        (index + shift, value, panel.interval(arm) or (value, value))
        for index, arm in enumerate(arms)
        if (value := panel.value(arm)) is not None
    ]
    below = [max(0.0, value - low) for _, value, (low, _) in points]
    above = [max(0.0, high - value) for _, value, (_, high) in points]
    axes.errorbar(
        [x for x, _, _ in points],
        [value for _, value, _ in points],
        yerr=[below, above],
        markersize=6,
        elinewidth=1,
        capsize=2,
        **look,
    )


def _look(place: int) -> dict[str, Any]:
    """Colour, marker and line of an arm, so that print without colour tells them apart too."""
    if place == 0:
        return {"color": _PLAIN, "marker": "x", "linestyle": "-", "linewidth": 1.2}
    return {
        "color": _COLORS[(place - 1) % len(_COLORS)],
        "marker": _MARKERS[(place - 1) % len(_MARKERS)],
        "linestyle": _LINES[(place - 1) % len(_LINES)],
        "linewidth": 1.4,
    }


def _tick(results: dict[str, Any], group: dict[str, Any]) -> str:
    if results["suite"] == "single_turn":
        return str(group["name"]).replace(" (", "\n(")
    return str(group["value"])


def _legend(figure: Any, results: dict[str, Any]) -> None:
    """One for all panels, below them."""
    from matplotlib.lines import Line2D

    names = [arm["name"].replace("$", r"\$") for arm in results["groups"][0]["arms"]]
    handles = [Line2D([], [], label=fill(n, 34), **_look(place)) for place, n in enumerate(names)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(names)), fontsize=9)
