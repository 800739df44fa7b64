"""The pictures of this experiment, from its committed results.

python experiments/03-domain/plots.py
"""

import json
from pathlib import Path
from typing import Any

from specdec.report.style import COLORS, new_figure, to_png

HERE = Path(__file__).parent
SIZES = {
    "250 steps": {
        100: "qlora-sgd-100",
        500: "qlora-sgd-500",
        2000: "qlora-sgd",
        8000: "qlora-sgd-8000",
    },
    "800 steps": {2000: "qlora-sgd-2000-long", 8000: "qlora-sgd-8000-long"},
}
OBJECTIVES = {
    "generic": "generic-draft",
    "cross-entropy": "qlora-gsm8k-cross_entropy",
    "forward KL": "qlora-gsm8k",
    "reverse KL": "qlora-gsm8k-reverse_kl",
    "total variation": "qlora-gsm8k-total_variation",
}
BLUE, ORANGE = COLORS[0], COLORS[3]


def read(domain: str) -> dict[str, Any]:
    return json.loads((HERE / f"alpha-{domain}.json").read_text())["drafters"]


def bars(values: list[dict[str, Any]]) -> tuple[list[float], list[list[float]]]:
    heights = [each["value"] for each in values]
    low = [each["value"] - each["interval"][0] for each in values]
    return heights, [low, [each["interval"][1] - each["value"] for each in values]]


def growth() -> None:
    found = read("sgd")
    figure, (axes,) = new_figure(4.4)
    for temperature, color, marker in (("0", BLUE, "o"), ("1", ORANGE, "s")):
        for (budget, runs), line in zip(SIZES.items(), ("-", "--"), strict=True):
            heights, errors = bars([found[name]["alpha"][temperature] for name in runs.values()])
            style = {"color": color, "marker": marker, "capsize": 4, "linestyle": line}
            axes.errorbar(
                list(runs), heights, errors, label=f"T = {temperature}, {budget}", **style
            )
        start = found["generic-draft"]["alpha"][temperature]["value"]
        axes.axhline(start, color=color, linestyle=":", linewidth=1)
    axes.annotate("generic: no queries", (8000, start - 0.012), ha="right", va="top", fontsize=8)
    sizes = list(SIZES["250 steps"])
    axes.set_xscale("log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.set_ylim(0.25, 0.7)
    axes.set_xlabel("collected queries (sgd)")
    axes.set_ylabel("alpha on held-out queries")
    axes.set_title("QLoRA draft model; 95 % intervals", fontsize=10)
    axes.legend(frameon=False, loc="upper left", ncol=2, fontsize=8)
    (HERE / "growth.png").write_bytes(to_png(figure))


def objectives() -> None:
    found = read("gsm8k")
    figure, (axes,) = new_figure(4.4)
    for offset, temperature, color, hatch in ((-0.2, "0", BLUE, ""), (0.2, "1", ORANGE, "//")):
        values = [found[name]["alpha"][temperature] for name in OBJECTIVES.values()]
        heights, errors = bars(values)
        places = [number + offset for number in range(len(OBJECTIVES))]
        style = {"color": color, "hatch": hatch, "capsize": 3, "label": f"T = {temperature}"}
        axes.bar(places, heights, 0.38, yerr=errors, **style)
    axes.set_xticks(range(len(OBJECTIVES)), list(OBJECTIVES), fontsize=9)
    axes.set_ylim(0, 0.8)
    axes.set_ylabel("alpha on held-out queries (gsm8k)")
    axes.set_title("QLoRA draft model, 250 steps each; 95 % intervals", fontsize=10)
    axes.legend(frameon=False, loc="upper left", ncol=2)
    (HERE / "objectives.png").write_bytes(to_png(figure))


if __name__ == "__main__":
    growth()
    objectives()
