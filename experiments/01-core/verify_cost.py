"""What verifying costs beside the target's forward: the demo target, a 60-node tree, batch 8.

python experiments/01-core/verify_cost.py --out experiments/01-core/verify_cost.json
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from specdec import SamplingConfig, load_target
from specdec.bench.prompts import load_prompts, render
from specdec.common.provenance import machine
from specdec.engine.text import encode
from specdec.sampling.sampler import Sampler
from specdec.verify import Draft, match, verify

BATCH_SIZE, NUM_NODES, VOCAB_SIZE = 8, 60, 32_000
CHILDREN, SEED = 3, 0


def tree(vocab_size: int, generator: torch.Generator, device: torch.device) -> Draft:
    """Rows of NUM_NODES nodes, CHILDREN to a parent, siblings different as a top-k's are."""
    parents = [node // CHILDREN - 1 for node in range(NUM_NODES)]
    noise = torch.rand(BATCH_SIZE, vocab_size, generator=generator)
    tokens = noise.topk(NUM_NODES).indices.to(device)
    depth = 0
    node = NUM_NODES - 1
    while node >= 0:  # the last node is a deepest one
        node, depth = parents[node], depth + 1
    return Draft.tree(tokens, torch.tensor(parents, device=device), depth=depth)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


@torch.inference_mode()
def measure(repeats: int, device: str | None, dtype: str | None) -> dict:
    target = load_target("demo", device=device, dtype=dtype)
    place = target.device
    generator = torch.Generator().manual_seed(SEED)
    chosen = load_prompts("demo", BATCH_SIZE, None, SEED)
    prompts = [encode(render(p, target.tokenizer), target, index) for index, p in enumerate(chosen)]
    target.prefill(prompts)
    small, large = (tree(size, generator, place) for size in (target.vocab_size, VOCAB_SIZE))
    root = torch.zeros(BATCH_SIZE, dtype=torch.long, device=place)
    logits = 3 * torch.randn(BATCH_SIZE, NUM_NODES + 1, VOCAB_SIZE, generator=generator).to(place)
    settings = [SamplingConfig(temperature=0.8)] * BATCH_SIZE
    sampler = Sampler(settings, VOCAB_SIZE, place, [[0]] * BATCH_SIZE, ())
    probs, best = sampler.probs(logits), logits.argmax(-1)
    uniforms = torch.rand(BATCH_SIZE, NUM_NODES, generator=generator).to(place)
    noise = torch.empty(BATCH_SIZE, VOCAB_SIZE).exponential_(generator=generator).to(place)
    parts: dict[str, Callable[[], object]] = {
        "target forward": lambda: target.score(root, small),
        "softmax of the target's logits": lambda: sampler.probs(logits),
        "argmax of the target's logits": lambda: logits.argmax(-1),
        "verify match": lambda: match(best, large),
    }
    for rule in ("token", "traversal"):
        parts[f"verify {rule}"] = lambda rule=rule: verify(
            probs, large, rule=rule, uniforms=uniforms, noise=noise, check=False
        )
    times: dict[str, list[float]] = {name: [] for name in parts}
    for repeat in track(range(repeats + 3), "measuring", console=Console(stderr=True)):
        for name, work in parts.items():  # interleaved, and the first three are a warm-up
            spent = seconds(work, place)
            if repeat >= 3:
                times[name].append(spent)
    forward = np.array(times["target forward"])
    return {
        "schema": "specdec-verify-cost-1",
        "provenance": machine(target) | {"seed": SEED, "repeats": repeats},
        "shape": {"batch": BATCH_SIZE, "nodes": NUM_NODES, "vocab": VOCAB_SIZE},
        "parts": {
            name: {
                "median_ms": 1000 * float(np.median(values)),
                "p10_ms": 1000 * float(np.percentile(values, 10)),
                "p90_ms": 1000 * float(np.percentile(values, 90)),
                "share_of_forward": float(np.median(np.array(values) / forward)),
            }
            for name, values in times.items()
        },
    }


def main(
    out: Annotated[Path, typer.Option(help="JSON file to write")],
    repeats: int = 60,
    threads: int = 2,
    device: str | None = None,
    dtype: str | None = None,
) -> None:
    torch.set_num_threads(threads)
    results = measure(repeats, device, dtype)
    out.write_text(json.dumps(results, indent=1) + "\n")
    table = Table("part", "median, ms", "share of a target forward", title="batch 8, 60-node tree")
    for name, part in results["parts"].items():
        table.add_row(name, f"{part['median_ms']:.2f}", f"{part['share_of_forward']:.1%}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
