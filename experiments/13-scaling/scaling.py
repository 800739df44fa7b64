"""Growth of the parts of a step with batch, context, nodes and vocabulary: random models, T = 0.

python experiments/13-scaling/scaling.py --out runs/experiments/13-scaling/scaling.json
"""

import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from transformers import LlamaConfig, LlamaForCausalLM

from specdec import Engine, SamplingConfig, load_drafter, load_target
from specdec.common.files import write_json
from specdec.common.provenance import machine
from specdec.sampling.sampler import Sampler
from specdec.verify import Draft, match, verify

SIZES: dict[str, Any] = {
    "hidden_size": 160,
    "intermediate_size": 448,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
LAYERS = {"target": 16, "draft": 2}  # as the demo's
LEVELS, WIDTH = 4, 5
GRID = {
    "batch": (1, 2, 4, 8, 16, 32, 64),
    "context": (128, 256, 512, 1024, 2048, 4096),
    "nodes": (1, 2, 4, 8, 16, 32, 64),
    "vocab": (4096, 8192, 16384, 32768, 65536, 131072),
}
PARTS = ("target", "draft", "verify", "rest")
WARM_UP, THREADS, SEED = 3, 2, 0
LARGE_BATCH, LARGE_NODES, CHILDREN = 64, 60, 3


class Cell(NamedTuple):
    """Sizes of a step; the defaults are those that a panel keeps while it changes one."""

    batch: int = 1
    context: int = 256
    nodes: int = 16
    vocab: int = 4096


def save_models(folder: Path, vocab: int) -> None:
    """Write a target and a draft model of random weights."""
    for name, layers in LAYERS.items():
        torch.manual_seed(SEED)
        config = LlamaConfig(vocab_size=vocab, num_hidden_layers=layers, **SIZES, eos_token_id=None)
        LlamaForCausalLM(config).save_pretrained(folder / name)


def load_pair(folder: Path, is_compiled: bool) -> tuple[Any, Any]:
    """Load both; the drafter's nodes are set by each cell's `draft_length`."""
    options = {"compile": True} if is_compiled else {}
    target = load_target(str(folder / "target"), **options)
    shape = {"num_draft_tokens": LEVELS, "width": WIDTH, "max_nodes": max(GRID["nodes"])}
    return target, load_drafter(
        {"type": "draft_model", "path": str(folder / "draft"), **shape}, target
    )


def random_prompts(num: int, length: int, vocab: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(vocab, (num, length), generator=generator).tolist()


def step_times(target: Any, drafter: Any, cell: Cell, num_steps: int) -> dict[str, list[float]]:
    """Seconds of each part in every step of a batch, whose first steps warm up.

    Random models accept next to nothing, so that a context stays what it is.
    """
    num_tokens = 1 + WARM_UP + num_steps
    engine = Engine(target, drafter, max_rows=cell.batch, draft_length=cell.nodes)
    for prompt in random_prompts(cell.batch, cell.context - num_tokens, cell.vocab):
        # A budget that ends would cut the last drafts.
        engine.submit(prompt, max_new_tokens=2 * (num_tokens + cell.nodes))
    for _ in range(1 + WARM_UP + num_steps):  # the first one reads the prompts
        engine.advance()
    steps = engine.peek(0).records[WARM_UP:]
    engine.preempt()
    times = defaultdict(list)
    for step in steps:
        known = {"target": step.target_s, "draft": step.draft_s, "verify": step.verify_s}
        for part, seconds in known.items():
            times[part].append(seconds)
        times["rest"].append(step.wall_s - sum(known.values()))
    return times


def grid_times(
    pairs: dict[tuple[str, int], tuple[Any, Any]], modes: list[str], num_steps: int, repeats: int
) -> list[dict[str, Any]]:
    """Median milliseconds of every part in every cell; repeats of all cells take turns."""
    cells = {Cell(**{size: value}) for size, values in GRID.items() for value in values}
    times: dict[tuple[str, Cell], dict[str, list[float]]] = {}
    rounds = [(mode, cell) for _ in range(repeats) for cell in sorted(cells) for mode in modes]
    for mode, cell in track(rounds, "measuring", console=Console(stderr=True)):
        found = step_times(*pairs[mode, cell.vocab], cell, num_steps)
        kept = times.setdefault((mode, cell), defaultdict(list))
        for part, seconds in found.items():
            kept[part] += seconds
    return [
        {
            "mode": mode,
            "size": size,
            "value": value,
            "ms": {p: 1000 * median(times[mode, Cell(**{size: value})][p]) for p in PARTS},
        }
        for mode in modes
        for size, values in GRID.items()
        for value in values
    ]


def slopes(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Exponents of growth between the last two points of each panel: 1 is in proportion."""
    found = []
    for mode in dict.fromkeys(cell["mode"] for cell in cells):
        for size in GRID:
            before, last = [c for c in cells if c["mode"] == mode and c["size"] == size][-2:]
            growth = np.log(last["value"] / before["value"])
            by_part = {
                part: float(np.log(last["ms"][part] / before["ms"][part]) / growth)
                for part in PARTS
            }
            found.append({"mode": mode, "size": size, **by_part})
    return found


# --- Verifying where there is most to verify ---


def large_tree(vocab: int) -> Draft:
    """Rows of LARGE_NODES nodes, CHILDREN to a parent, siblings different as a top-k's are."""
    parents = [node // CHILDREN - 1 for node in range(LARGE_NODES)]
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.rand(LARGE_BATCH, vocab, generator=generator).topk(LARGE_NODES).indices
    return Draft.tree(tokens, torch.tensor(parents))


@torch.inference_mode()
def large_verify(target: Any, repeats: int) -> dict[str, Any]:
    """Time the verifier alone and the target's forward of the same step, and what lies between."""
    vocab = target.vocab_size
    prompts = random_prompts(LARGE_BATCH, 64, vocab)
    target.prefill(prompts)
    draft, root = large_tree(vocab), torch.zeros(LARGE_BATCH, dtype=torch.long)
    generator = torch.Generator().manual_seed(SEED)
    uniforms = torch.rand(LARGE_BATCH, LARGE_NODES, generator=generator)
    noise = torch.empty(LARGE_BATCH, vocab).exponential_(generator=generator)
    settings = [SamplingConfig(temperature=0.8)] * LARGE_BATCH
    sampler = Sampler(settings, vocab, target.device, [[0]] * LARGE_BATCH, ())
    times: dict[str, list[float]] = defaultdict(list)

    def timed(part: str, work: Callable[..., Any], *given: Any, **options: Any) -> Any:
        started = time.perf_counter()
        result = work(*given, **options)
        times[part].append(time.perf_counter() - started)
        return result

    for _ in track(range(repeats + 1), "verifying", console=Console(stderr=True)):
        logits = timed("target forward", target.score, root, draft).logits
        best = timed("argmax of the logits", logits.argmax, -1)
        timed("verify, greedy (match)", match, best, draft)
        probs = timed("softmax of the logits", sampler.probs, logits)
        del logits  # each of these is gigabytes
        randomness = {"uniforms": uniforms, "noise": noise}
        timed("verify, sampled (token)", verify, probs, draft, **randomness, check=False)
        del probs
    medians = {part: median(seconds[1:]) for part, seconds in times.items()}
    forward = medians["target forward"]
    greedy = [forward, medians["argmax of the logits"], medians["verify, greedy (match)"]]
    sampled = [forward, medians["softmax of the logits"], medians["verify, sampled (token)"]]
    return {
        "shape": {"batch": LARGE_BATCH, "nodes": LARGE_NODES, "vocab": vocab, "context": 64},
        "ms": {part: 1000 * seconds for part, seconds in medians.items()},
        "step": "the random target's forward, the logits' processing and the verifier",
        "step_ms": {"greedy": 1000 * sum(greedy), "sampled": 1000 * sum(sampled)},
        "verify_share": {"greedy": greedy[-1] / sum(greedy), "sampled": sampled[-1] / sum(sampled)},
    }


def main(
    out: Annotated[Path, typer.Option(help="JSON file to write")],
    steps: Annotated[int, typer.Option(help="of each cell and repeat, behind a warm-up")] = 20,
    repeats: int = 3,
    large_repeats: int = 5,
    eager_only: Annotated[bool, typer.Option("--eager-only", help="compile nothing")] = False,
) -> None:
    torch.set_num_threads(THREADS)
    modes = ["eager"] if eager_only else ["eager", "compiled"]
    pairs = {}
    for vocab in GRID["vocab"]:
        with TemporaryDirectory() as folder:
            save_models(Path(folder), vocab)
            for mode in modes:
                pairs[mode, vocab] = load_pair(Path(folder), mode == "compiled")
    cells = grid_times(pairs, modes, steps, repeats)
    eager = pairs["eager", max(GRID["vocab"])][0]
    results = {
        "schema": "specdec-scaling-1",
        "provenance": machine(eager) | {"steps": steps, "repeats": repeats, "seed": SEED},
        "models": SIZES | {"layers": LAYERS, "levels": LEVELS, "width": WIDTH},
        "others": Cell()._asdict(),
        "cells": cells,
        "slopes": slopes(cells),
        "large": large_verify(eager, large_repeats),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, results)


if __name__ == "__main__":
    typer.run(main)
