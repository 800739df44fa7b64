"""Train every kind of head on the same answers, for the same number of tokens.

python experiments/16-drafters/heads.py STORE ANSWERS --out runs/experiments/16-heads

Every run is a folder below --out, and what is there is kept: a stopped experiment goes on with the
same command. `bench-*.yaml` decode with what it leaves.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from time import process_time
from typing import Annotated, Any

import typer
from losses import FIGURES, in_processes, mean, trained_by

from specdec.checkpoints import read_head
from specdec.common.files import write_json

HERE = Path(__file__).parent
TAPS = "[2, 8, 13]"  # EAGLE-3's, for all heads on several
BLOCK = ["drafter.kind=dflash", f"drafter.options.taps={TAPS}"]
# DSpark's root is the slot of the first token: a block of seven drafts seven, as one of eight does.
SPARK = [*BLOCK, "drafter.options.sample_from_anchor=true", "drafter.options.block_size=7"]
SPARK += ["drafter.options.markov=vanilla", "drafter.options.markov_rank=32"]
MIXED = ["drafter.kind=mixture_of_attentions", "loss.cross_entropy_weight=1.0"]
# What differs from train.yaml.
HEADS = {
    "eagle": ["drafter.kind=eagle", "drafter.options.bias=false"],
    "eagle3": [f"drafter.options.taps={TAPS}", "draft_vocab_size=2048"],
    "medusa": ["drafter.kind=medusa", "drafter.options.num_heads=7"],
    "mtp": ["drafter.kind=mtp"],
    "peagle": ["drafter.kind=peagle", "drafter.options.num_depths=7", "draft_vocab_size=2048"],
    "dflash": BLOCK,
    "dspark": [*SPARK, "loss.objective=lk_hybrid"],
    "jetspec": [*BLOCK, "drafter.options.causal=true", "loss.objective=forward_kl"],
    "mixture": MIXED,
    "mixture, no layer attention": [*MIXED, "drafter.options.layer_self_attention=false"],
    "mixture, no cross-attention": [*MIXED, "drafter.options.cross_attention=false"],
}


def folder_of(head: str, seed: int) -> str:
    return f"{head.replace(', ', '-').replace(' ', '-')}-{seed}"


def train(
    head: str, seed: int, data: Path, out: Path, settings: Sequence[str]
) -> tuple[str, int, dict[str, Any]]:
    changes = [*HEADS[head], f"training.seed={seed}", f"data.path={data}", *settings]
    folder = out / folder_of(head, seed)
    is_new, began = not folder.exists(), process_time()
    found = trained_by(HERE / "train.yaml", changes, folder)
    cost = folder / "cost.json"
    if is_new:  # what was stopped and went on has no cost of one piece
        write_json(cost, {"cpu_minutes": (process_time() - began) / 60})
    if cost.exists():
        found |= json.loads(cost.read_text())
    tensors = read_head(folder / "drafter").tensors.values()
    size = {"parameters": sum(t.numel() for t in tensors if t.is_floating_point())}
    return head, seed, {"head": head, "seed": seed, **size, **found}


def main(
    features: Annotated[Path, typer.Argument(help="a store of what the target makes of answers")],
    answers: Annotated[Path, typer.Argument(help="them, for heads that would need a large one")],
    out: Annotated[Path, typer.Option(help="folder of all runs, and of heads.json")],
    steps: int = 600,
    num_seeds: int = 3,
    workers: Annotated[int, typer.Option(help="processes of one thread")] = 2,
) -> None:
    settings = [f"training.max_steps={steps}", f"training.warmup_steps={max(1, steps // 10)}"]
    data = {head: answers if head.startswith("mixture") else features for head in HEADS}
    seeds = range(num_seeds)
    wanted = [(head, seed, data[head], out, settings) for seed in seeds for head in HEADS]
    runs = []
    for head, seed, run in in_processes(train, wanted, "heads", workers):
        print(f"{head}, seed {seed}: offline tau {run['tau']:.3f}")
        runs.append(run)
    runs.sort(key=lambda run: ([*HEADS].index(run["head"]), run["seed"]))
    summary = []
    for head in HEADS:
        own = [run for run in runs if run["head"] == head]
        figures = {key: mean([run[key] for run in own]) for key in FIGURES}
        costs = [run["cpu_minutes"] for run in own if "cpu_minutes" in run]
        figures["cpu_minutes"] = mean(costs) if costs else None
        by_depth = zip(*(run["acceptance"] for run in own), strict=True)
        facts = {"head": head, "parameters": own[0]["parameters"], **figures}
        # A depth that no chain reached has no acceptance.
        told = [[share for share in each if share is not None] for each in by_depth]
        shares = [sum(each) / len(each) if each else None for each in told]
        summary.append(facts | {"acceptance": shares})
    kept = [{key: value for key, value in run.items() if key != "provenance"} for run in runs]
    results = {"schema": "specdec-heads-1", "provenance": runs[0]["provenance"]}
    write_json(out / "heads.json", {**results, "steps": steps, "runs": kept, "summary": summary})


if __name__ == "__main__":
    typer.run(main)
