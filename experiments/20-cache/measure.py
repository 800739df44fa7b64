"""Quantized keys and values of the demo target: bytes, errors of logits, perplexity, and tau.

SPECDEC_DATA_DIR=DATA python experiments/20-cache/measure.py --out runs/experiments/20-cache.json
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor

from specdec import SamplingConfig, generate, generate_baseline, load_drafter, load_target
from specdec.bench.prompts import encode_prompts, load_prompts
from specdec.common.files import write_json
from specdec.common.provenance import machine
from specdec.engine.quantize import MODES
from specdec.targets.taps import read_text

CACHES = ("none", *MODES)
MAX_NEW_TOKENS, THREADS = 64, 2
DRAFTERS: dict[str, dict[str, Any]] = {
    "draft model": {"type": "draft_model", "path": "demo", "num_draft_tokens": 4},
    "eagle3 chain": {"type": "eagle3", "depth": 6, "width": 1},
    "eagle3 tree": {"type": "eagle3", "depth": 6, "width": 3, "max_nodes": 12},
}

Tokens = list[list[int]]


def answer_logits(target: Any, prompts: Tokens, answers: Tokens) -> list[Tensor]:
    """Logits [A, V] of every token of each answer, read through the target's own cache."""
    texts = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    firsts = [len(prompt) - 1 for prompt in prompts]
    return [
        read_text(target, text, first).logits[:-1]
        for text, first in zip(texts, firsts, strict=True)
    ]


def compared(logits: Sequence[Tensor], whole: Sequence[Tensor], answers: Tokens) -> dict[str, Any]:
    """Errors against the logits of a whole cache, and the perplexity of the answers."""
    ours, theirs = torch.cat([*logits]), torch.cat([*whole])
    tokens = [token for answer in answers for token in answer]
    errors = (ours - theirs).square().mean(-1).sqrt() / theirs.std(-1)
    chosen = ours.log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens)]
    return {
        "num_tokens": len(tokens),
        "logit_error": errors.mean().item(),
        "argmax_changes": (ours.argmax(-1) != theirs.argmax(-1)).double().mean().item(),
        "perplexity": (-chosen.double().mean()).exp().item(),
    }


def drafted(target: Any, options: dict[str, Any], prompts: Tokens, plain: Tokens) -> dict[str, Any]:
    """Tau of greedy texts, and the texts that are not those of plain decoding."""
    results = generate(
        target, load_drafter(options, target), prompts, max_new_tokens=MAX_NEW_TOKENS
    )
    num_steps = sum(result.stats.num_steps for result in results)
    num_accepted = sum(result.stats.num_accepted for result in results)
    differ = [result.tokens != tokens for result, tokens in zip(results, plain, strict=True)]
    return {"tau": 1 + num_accepted / num_steps, "differ": sum(differ)}


def main(
    out: Annotated[Path, typer.Option(help="file of the figures")],
    num: Annotated[int, typer.Option(help="held-out prompts")] = 90,
    source: Annotated[str, typer.Option(help="source of the prompts")] = "held_out",
) -> None:
    torch.set_num_threads(THREADS)
    whole = load_target("demo")
    prompts = encode_prompts(load_prompts(source, num), whole)
    # Drawn from the target with a whole cache, so that no other one has a lower expectation.
    sampling = [SamplingConfig(temperature=1.0, seed=seed) for seed in range(len(prompts))]
    drawn = generate_baseline(whole, prompts, sampling, max_new_tokens=MAX_NEW_TOKENS)
    answers = [result.tokens for result in drawn]
    expected, greedy, rows = answer_logits(whole, prompts, answers), [], []
    for cache in track(CACHES, "measuring", console=Console(stderr=True)):
        target = load_target("demo", cache=cache)
        plain = generate_baseline(target, prompts, max_new_tokens=MAX_NEW_TOKENS)
        tokens = [result.tokens for result in plain]
        greedy = greedy or tokens
        row = {"cache": cache, "bytes_per_token": target.bytes_for(1, 1)}
        row |= compared(answer_logits(target, prompts, answers), expected, answers)
        row["texts_changed"] = sum(a != b for a, b in zip(tokens, greedy, strict=True))
        row["drafters"] = {
            name: drafted(target, options, prompts, tokens) for name, options in DRAFTERS.items()
        }
        # The draft model's cache alone: the target's stays whole.
        options = {**DRAFTERS["draft model"], "cache": cache}
        row["draft_cache_alone"] = drafted(whole, options, prompts, greedy)
        rows.append(row)
    write_json(out, {"num_prompts": len(prompts), "provenance": machine(whole), "rows": rows})
    head = [
        "cache",
        "bytes a token",
        "logit error",
        "argmax changes",
        "perplexity",
        "texts changed",
    ]
    taus = [f"tau, {name}" for name in (*DRAFTERS, "draft model's cache alone")]
    print("|", " | ".join([*head, *taus, "differ"]), "|")
    print("|", " | ".join(["---"] * (len(head) + len(taus) + 1)), "|")
    for row in rows:
        found = [*row["drafters"].values(), row["draft_cache_alone"]]
        cells = [
            row["cache"],
            f"{row['bytes_per_token']:,}",
            f"{100 * row['logit_error']:.2f}%",
            f"{100 * row['argmax_changes']:.2f}%",
            f"{row['perplexity']:.4f}",
            f"{row['texts_changed']} of {len(prompts)}",
            *(f"{each['tau']:.2f}" for each in found),
            f"{sum(each['differ'] for each in found)}",
        ]
        print("|", " | ".join(cells), "|")


if __name__ == "__main__":
    typer.run(main)
