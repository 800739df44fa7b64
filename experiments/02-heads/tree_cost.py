"""Which draft pays: the measured cost of a forward over n tokens, against what n nodes accept.

python experiments/02-heads/tree_cost.py --out experiments/02-heads/tree_cost.json
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from specdec import load_target
from specdec.bench.prompts import load_prompts, render
from specdec.checkpoints import read_head
from specdec.common.provenance import machine
from specdec.demo import demo_path
from specdec.drafters.eagle3 import Eagle3Drafter
from specdec.engine.text import encode
from specdec.sampling.config import SamplingConfig
from specdec.sampling.sampler import Sampler
from specdec.verify import Draft, best_static_tree, from_choices

SIZES = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32)
DEPTHS = (1, 2, 3, 4, 5)


def interleaved(works: dict[Any, Callable[[], object]], repeats: int) -> dict[Any, float]:
    """Median milliseconds of each, taken in turns; the first three rounds are a warm-up."""
    times: dict[Any, list[float]] = {key: [] for key in works}
    for repeat in track(range(repeats + 3), "measuring", console=Console(stderr=True)):
        for key, work in works.items():
            started = time.perf_counter()
            work()
            if repeat >= 3:
                times[key].append(1000 * (time.perf_counter() - started))
    return {key: float(np.median(values)) for key, values in times.items()}


def accepted_length(acceptance: list[list[float]], choices: list[tuple[int, ...]]) -> float:
    """Tau of a tree if depths are independent: 1 + the sum of the worths of its nodes."""
    worth = [
        float(np.prod([acceptance[depth][rank] for depth, rank in enumerate(path)]))
        for path in choices
    ]
    return 1 + sum(worth)


@torch.inference_mode()
def measure(repeats: int) -> dict[str, Any]:
    """Costs, and the accepted length and speed that they predict for every depth and size."""
    target = load_target("demo")
    prompt = encode(render(load_prompts("demo", 1, None, 0)[0], target.tokenizer), target)
    head = read_head(str(demo_path("eagle3")))
    acceptance = head.training["acceptance_by_rank"]
    shapes = {
        (depth, size): sorted(best_static_tree(acceptance[:depth], size), key=lambda p: (len(p), p))
        for depth in DEPTHS
        for size in SIZES
        if size >= depth
    }
    sampler = Sampler([SamplingConfig()], target.vocab_size, target.device, [prompt], ())
    drafters = {
        depth: Eagle3Drafter.load(target, choices=shapes[depth, 12], depth=depth)
        for depth in DEPTHS
    }
    output = target.prefill([prompt], drafters[1].taps)
    root = output.logits[0, -1].argmax().view(1)
    for drafter in drafters.values():
        drafter.begin([[*prompt, int(root)]], output, sampler)

    def score(size: int) -> Callable[[], object]:
        if not size:
            return lambda: target.score(root, Draft.empty(1))
        tree = from_choices(best_static_tree(acceptance, size))
        tokens = torch.arange(len(tree.parents)).unsqueeze(0) + 100
        draft = Draft.tree(tokens, tree.parents, depth=tree.depth)
        return lambda: target.score(root, draft, drafters[1].taps)

    verify_ms = interleaved({size: score(size) for size in SIZES}, repeats)
    draft_ms = interleaved(
        {d: lambda d=d: drafters[d].propose(root, [12], sampler) for d in DEPTHS}, repeats
    )
    rows = []
    for (depth, size), choices in shapes.items():
        tau = accepted_length(acceptance, choices)
        step_ms = draft_ms[depth] + verify_ms[size]
        rows.append(
            {
                "depth": depth,
                "nodes": size,
                "predicted_tau": tau,
                "predicted_speedup": tau * verify_ms[0] / step_ms,
            }
        )
    return {
        "schema": "specdec-tree-cost-1",
        "provenance": machine(target) | {"repeats": repeats},
        "verify_ms": verify_ms,
        "draft_ms": draft_ms,
        "shapes": sorted(rows, key=lambda row: -row["predicted_speedup"]),
    }


def main(
    out: Annotated[Path, typer.Option(help="JSON file to write")],
    repeats: int = 40,
    threads: int = 2,
) -> None:
    torch.set_num_threads(threads)
    results = measure(repeats)
    out.write_text(json.dumps(results, indent=1) + "\n")
    table = Table("nodes", "target forward, ms", title="batch 1, demo target")
    for size, cost in results["verify_ms"].items():
        table.add_row(str(size), f"{cost:.2f}")
    Console().print(table)
    best = Table("depth", "nodes", "predicted tau", "predicted speedup", title="best trees")
    for row in results["shapes"][:12]:
        best.add_row(
            str(row["depth"]),
            str(row["nodes"]),
            f"{row['predicted_tau']:.2f}",
            f"{row['predicted_speedup']:.2f}",
        )
    Console().print(best)


if __name__ == "__main__":
    typer.run(main)
