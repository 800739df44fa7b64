"""The pictures of the experiments, from their committed results: plot.png in every folder.

python experiments/plots.py 05-drafters 06-shapes
"""

import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import numpy as np
import prediction
import typer
from results import HERE, Arms, arms_of, cells_of, groups_of, read, strategies

from specdec.report.bench import draw, plot
from specdec.report.style import GREY, draw_series, new_figure, to_png

DOMAINS = ("gsm8k", "sgd", "taskmaster4")
RULES = ("token", "block", "traversal")
SEEDS, NODES = (0, 1, 2), (8, 16, 32, 60)
FAMILIES = ("eagle3", "eagle", "draft model", "medusa", "lookup", "hybrid")


def curve(axes: Any, number: int, at: list[float], arms: list[Any], label: str) -> None:
    """Draw speeds with intervals against something, in the number's color and mark."""
    is_log = axes.get_xscale() == "log"
    places = np.log2(at) if is_log else np.array(at)
    places = places + 0.012 * (number - 2) * np.ptp(places)  # so that intervals stay apart
    at = list(2**places if is_log else places)
    speeds = [arm.speedup_vs_plain for arm in arms]
    draw_series(axes, number, label, at, speeds, [arm.speedup_vs_plain_ci for arm in arms])


def beside(axes: Any, number: int, label: str, found: list[Any], key: str, gap: float) -> None:
    """Draw a figure of several arms as points with intervals, one arm below the other."""
    places = [place + gap * (number - 1) for place in range(len(found))]
    values = [getattr(each, key) for each in found]
    ends = [getattr(each, f"{key}_ci") for each in found]
    draw_series(axes, number, label, values, places, x_intervals=ends, linestyle="none")


def finish(axes: Any, x: str, title: str) -> None:
    """Label a panel, and mark where plain decoding is."""
    axes.axhline(1, color=GREY, linewidth=1, linestyle=":")
    axes.set_xlabel(x)
    axes.set_ylabel("speed / plain decoding")
    axes.set_title(title, fontsize=10)


def drafters() -> Any:
    cells = cells_of(read("05-drafters/sweep.json"), "sampling.temperature")
    figure, parts = new_figure(5, 10.5, columns=2, sharey=True, sharex=True)
    for axes, (temperature, arms) in zip(parts, cells.items(), strict=True):
        names = strategies(arms)
        for number, domain in enumerate(DOMAINS):
            found = [arms[name].domains[domain] for name in names]
            beside(axes, number, domain, found, "speedup_vs_plain", 0.22)
        axes.axvline(1, color=GREY, linewidth=1, linestyle=":")
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("speed / plain decoding")
        axes.set_title(f"T = {temperature:g}", fontsize=10)
    parts[0].invert_yaxis()
    parts[1].legend(frameon=False, fontsize=8)
    return figure


def shapes() -> Any:
    arms = arms_of(read("06-shapes/results.json"))
    figure, (left, right) = new_figure(4.4, 10.5, columns=2)
    left.set_xscale("log", base=2)
    for number, family in enumerate(("draft model", "eagle3 chain", "medusa")):
        found = {int(n.rsplit(" ", 1)[1]): arms[n] for n in arms if n.startswith(family)}
        curve(left, number, list(found), list(found.values()), family)
    left.set_xticks([1, 2, 4, 8, 16, 32, 63], ["1", "2", "4", "8", "16", "32", "63"])
    left.legend(frameon=False, fontsize=8)
    finish(left, "drafted tokens", "Chains, and Medusa's tree")
    _heat_map(figure, right, arms)
    return figure


def _heat_map(figure: Any, axes: Any, arms: Arms) -> None:
    """EAGLE-3 trees: speed by levels and nodes."""
    trees = {}
    for name in arms:
        if shape := re.fullmatch(r"eagle3 (\d+)-\d+-(\d+)", name):
            trees[int(shape[1]), int(shape[2])] = arms[name]
    depths, sizes = (sorted({shape[axis] for shape in trees}) for axis in (0, 1))
    grid = np.full((len(depths), len(sizes)), np.nan)
    for (depth, size), arm in trees.items():
        row, column = depths.index(depth), sizes.index(size)
        grid[row, column] = arm.speedup_vs_plain
        text = f"{arm.speedup_vs_plain:.2f}\ntau {arm.tau:.2f}"
        axes.annotate(
            text, (column, row), ha="center", va="center", fontsize=8, bbox=WHITE, color="black"
        )
    image = axes.imshow(grid, cmap="cividis", aspect="auto")
    axes.set_xticks(range(len(sizes)), sizes)
    axes.set_yticks(range(len(depths)), depths)
    axes.set_xlabel("nodes")
    axes.set_ylabel("levels")
    axes.set_title("EAGLE-3 trees", fontsize=10)
    figure.colorbar(image, ax=axes, label="speed / plain decoding")


WHITE = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}


def draft_size() -> Any:
    arms = arms_of(read("07-draft-size/results.json"))
    figure, (axes,) = new_figure(4.4)
    for number, size in enumerate(("1 layer", "4 layers", "8 layers")):
        found = {int(n.split(", ")[1]): arms[n] for n in arms if n.startswith(f"{size}, ")}
        curve(axes, number, list(found), list(found.values()), size)
    axes.legend(frameon=False, fontsize=8, title="draft model")
    finish(axes, "drafted tokens", "Three sizes of draft model, trained alike; T = 0")
    return figure


def sampling() -> Any:
    by_temperature = cells_of(read("08-sampling/temperature.json"), "sampling.temperature")
    by_top_p = cells_of(read("08-sampling/top-p.json"), "sampling.top_p")
    by_top_p[1] = by_temperature[1]
    figure, parts = new_figure(4.4, 10.5, columns=2, sharey=True)
    both = (("temperature", by_temperature), ("top-p, at T = 1", by_top_p))
    for axes, (setting, cells) in zip(parts, both, strict=True):
        for number, name in enumerate(strategies(by_temperature[1])):
            curve(axes, number, list(cells), [arms[name] for arms in cells.values()], name)
        finish(axes, setting, "")
    parts[1].legend(frameon=False, fontsize=8)
    return figure


def rules() -> Any:
    figure, parts = new_figure(4.4, 10.5, columns=2)
    for axes, kind in zip(parts, ("chains", "trees"), strict=True):
        cells = cells_of(read(f"09-rules/{kind}.json"), "sampling.temperature", "rule")
        names = strategies(next(iter(cells.values())))
        groups = [(name, temperature) for name in names for temperature in _firsts(cells)]
        kinds = list(dict.fromkeys(rule for _, rule in cells))
        for number, rule in enumerate(RULES):
            if rule not in kinds:
                continue
            found = [cells[temperature, rule][name] for name, temperature in groups]
            beside(axes, number, rule, found, "tau", 0.2)
        axes.set_yticks(range(len(groups)), [f"{name}, T = {t:g}" for name, t in groups])
        axes.invert_yaxis()
        axes.set_xlabel("tau")
        axes.set_title(kind, fontsize=10)
    parts[0].legend(frameon=False, fontsize=8)
    return figure


def _firsts(cells: dict[Any, Arms]) -> list[Any]:
    return list(dict.fromkeys(key[0] for key in cells))


def batch() -> Any:
    figure, parts = new_figure(4.4, 13, columns=3, sharey=True)
    titles = ("fixed", "held-out", "hostile")
    for axes, kind in zip(parts, titles, strict=True):
        cells = cells_of(read(f"10-batch/{kind}.json"), "batch_size")
        axes.set_xscale("log", base=2)
        for number, name in enumerate(strategies(next(iter(cells.values())))):
            curve(axes, number, list(cells), [arms[name] for arms in cells.values()], name)
        axes.set_xticks(list(cells), [str(size) for size in cells])
        axes.legend(frameon=False, fontsize=8)
        finish(axes, "batch", f"{kind} lengths" if kind == "fixed" else f"{kind} prompts")
    return figure


def predicted() -> Any:
    figure, parts = new_figure(5.2, 10.5, columns=2, sharex=True, sharey=True)
    for axes, kind in zip(parts, ("same", "fresh"), strict=True):
        found = prediction.pairs(kind)
        for number, family in enumerate(FAMILIES):
            some = [each for each in found if _family(each.arm.type) == family]
            predicted = [each.planned.predicted_speedup for each in some]
            measured = [each.arm.speedup_vs_plain for each in some]
            ends = [each.arm.speedup_vs_plain_ci for each in some]
            draw_series(axes, number, family, predicted, measured, ends, linestyle="none")
        ends = np.array(axes.get_xlim())
        axes.plot(ends, ends, color=GREY, linewidth=1)
        axes.fill_between(ends, 0.93 * ends, 1.07 * ends, color=GREY, alpha=0.15, linewidth=0)
        axes.set_xlabel("planned speed / plain decoding")
        axes.set_ylabel("measured")
        axes.set_title(f"{kind} prompts; grey: within 7 %", fontsize=10)
    parts[0].legend(frameon=False, fontsize=8)
    return figure


def _family(kind: str) -> str:
    return {"ngram": "lookup", "suffix": "lookup", "draft_model": "draft model"}.get(kind, kind)


def serving() -> Any:
    figure, panels = new_figure(8, 10.5, rows=2, columns=2, sharey=True)
    words = {"single-turn": "prompt", "multi-turn": "turn"}
    words |= {"long-context": "tokens of context, at most", "concurrent": "users at the same time"}
    seen: list[str] = []  # an arm has the same colour in all parts
    for axes, (name, title) in zip(panels, words.items(), strict=True):
        groups = groups_of(f"12-serving/{name}.json")
        places = [float(number) for number in range(len(groups))]
        shown = strategies(next(iter(groups.values())))
        seen += [arm for arm in shown if arm not in seen]
        for arm in shown:
            some = [arms[arm] for arms in groups.values()]
            if name == "concurrent":  # the speed that a user sees, waiting included
                speeds = [each.load.user_speed_vs_plain for each in some]
                ends = [each.load.user_speed_vs_plain_ci for each in some]
                draw_series(axes, seen.index(arm), arm, places, speeds, ends)
            else:
                curve(axes, seen.index(arm), places, some, arm)
        numbers = [re.findall(r"\d+", group) for group in groups]
        axes.set_xticks(places, groups if name == "single-turn" else [n[-1] for n in numbers])
        axes.legend(frameon=False, fontsize=8)
        finish(axes, title, name)
    return figure


def scaling() -> Any:
    found = read("13-scaling/scaling.json")
    titles = {
        "batch": "rows",
        "context": "tokens of context",
        "nodes": "drafted nodes",
        "vocab": "tokens of the vocabulary",
    }
    figure, panels = new_figure(8, 10.5, rows=2, columns=2, sharey=True)
    for axes, (size, title) in zip(panels, titles.items(), strict=True):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for mode, line in (("eager", "-"), ("compiled", "--")):
            cells = [c for c in found["cells"] if (c["size"], c["mode"]) == (size, mode)]
            at = [cell["value"] for cell in cells]
            for number, part in enumerate(cells[0]["ms"] if cells else ()):
                times = [cell["ms"][part] for cell in cells]
                draw_series(axes, number, f"{part}, {mode}", at, times, linestyle=line)
        others = {k: n for k, n in found["others"].items() if k != size}
        axes.set_xlabel(title)
        axes.set_ylabel("ms a step")
        axes.set_title(", ".join(f"{name} {n}" for name, n in others.items()), fontsize=10)
    panels[0].legend(frameon=False, fontsize=8, ncols=2)
    return figure


def compiled() -> Any:
    found = read("14-compiled/results.json")["arms"]
    figure, parts = new_figure(5.5, 10.5, columns=2)
    for axes, size in zip(parts, (1, 8), strict=True):
        arms = [arm for arm in found if arm["batch"] == size]
        names = [arm["name"] for arm in arms]
        for number, kind in enumerate(("ours, eager", "ours, compiled", "other packages")):
            some = [arm for arm in arms if kind == _maker(arm)]
            if not some:
                continue
            draw_series(
                axes,
                number,
                kind,
                [arm["vs_plain_eager"] for arm in some],
                [names.index(arm["name"]) for arm in some],
                x_intervals=[arm["vs_plain_eager_ci"] for arm in some],
                linestyle="none",
            )
        axes.axvline(1, color=GREY, linewidth=1, linestyle=":")
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlabel("speed / plain decoding, eager")
        axes.set_title(f"batch {size}", fontsize=10)
    parts[0].legend(frameon=False, fontsize=8)
    return figure


def _maker(arm: dict[str, Any]) -> str:
    return f"ours, {arm['name'].rpartition(' ')[2]}" if arm["tau"] else "other packages"


def new_heads() -> Any:
    seeds = [cells_of(read(f"16-drafters/chains-{n}.json"), "sampling.temperature") for n in SEEDS]
    trees = [arms_of(read(f"16-drafters/trees-{n}.json")) for n in SEEDS]
    found = read("16-drafters/losses.json")["summary"]
    figure, (left, middle, right) = new_figure(5.4, 15, columns=3)
    names = strategies(seeds[0][0])
    for number, temperature in enumerate((0, 1)):
        taus = [[cells[temperature][name].tau for cells in seeds] for name in names]
        _rows(left, number, f"T = {temperature}", range(len(names)), *_over_seeds(taus))
    _finish_rows(left, names, 1, "accepted length of chains of 7")
    for number, kind in enumerate(("eagle3", "marginal", "conditional", "medusa")):
        taus = [[arms[f"{kind} {n}"].tau for arms in trees] for n in NODES]
        draw_series(middle, number, kind, list(NODES), *_over_seeds(taus))
    middle.set_xscale("log", base=2)
    middle.set_xticks(NODES, [str(nodes) for nodes in NODES])
    middle.set_xlabel("nodes")
    middle.set_title("accepted length of trees, T = 0", fontsize=10)
    middle.legend(frameon=False, fontsize=8)
    losses = sorted({row["loss"] for row in found}, key=lambda loss: ("," in loss, loss))
    for number, kind in enumerate(dict.fromkeys(row["head"] for row in found)):
        changes = {row["loss"]: row["tau, change"] for row in found if row["head"] == kind}
        values, ends = ([each[part] for each in changes.values()] for part in ("value", "ci"))
        _rows(right, number, kind, [losses.index(loss) for loss in changes], values, ends)
    _finish_rows(right, losses, 0, "tau, offline, above cross-entropy's")
    return figure


def _over_seeds(taus: list[list[float]]) -> tuple[list[float], list[tuple[float, float]]]:
    """Give means over seeds, and the lowest and highest seed."""
    return [sum(each) / len(each) for each in taus], [(min(each), max(each)) for each in taus]


def _rows(
    axes: Any, number: int, label: str, at: Sequence[int], values: list[float], ends: list[Any]
) -> None:
    places = [place + 0.2 * (number - 1) for place in at]
    draw_series(axes, number, label, values, places, x_intervals=ends, linestyle="none")


def _finish_rows(axes: Any, names: list[str], neutral: float, title: str) -> None:
    axes.axvline(neutral, color=GREY, linewidth=1, linestyle=":")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False, fontsize=8)


def redraw(name: str) -> None:
    """The picture that a bench draws of its own results, from what the tables say."""
    for path in sorted((HERE / name).glob("*/results.json")):
        plot(read(str(path.relative_to(HERE))), path.with_suffix(".png"))
        print(path.with_suffix(".png"))


BENCHES = ("01-core", "02-heads", "03-domain", "04-recipes")
PLOTS: dict[str, Callable[[], Any]] = {
    "05-drafters": drafters,
    "06-shapes": shapes,
    "07-draft-size": draft_size,
    "08-sampling": sampling,
    "09-rules": rules,
    "10-batch": batch,
    "11-prediction": predicted,
    "12-serving": serving,
    "13-scaling": scaling,
    "14-compiled": compiled,
    "15-engines": lambda: draw(read("15-engines/bake-off.json")),
    "16-drafters": new_heads,
}


def main(
    names: Annotated[list[str] | None, typer.Argument(help="folders; all if none")] = None,
) -> None:
    for name in names or (*BENCHES, *PLOTS):
        if name in BENCHES:
            redraw(name)
            continue
        figure = PLOTS[name]()
        path = HERE / name / "plot.png"
        path.write_bytes(to_png(figure))
        print(path)


if __name__ == "__main__":
    typer.run(main)
