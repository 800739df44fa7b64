r"""From your users' queries to a draft model that is faster on them, measured before and after.

    python recipes/domain_draft.py
    python recipes/domain_draft.py requests.jsonl --domain support --num 10000 \
        --max-new-tokens 1024 --target Qwen/Qwen3-8B --quantization 4bit --draft Qwen/Qwen3-0.6B \
        --recipe recipes/qlora_draft_model.yaml --out runs/support

The first line takes the demo target and 2,000 questions of a bank's customers (banking77, from the
folder SPECDEC_DATA_DIR or from the hub), and a few minutes on two CPU cores; the second is for one
GPU with 24 GB (memory and time: see its recipe). Every step is a command that goes on where it was
stopped, so this goes on too when it is given again. The draft model must have the target's
tokenizer.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer


def main(
    source: Annotated[str, typer.Argument()] = "banking77",
    domain: str = "banking77",
    target: str = "demo",
    draft: str = "demo",
    out: Path = Path("runs/domain_draft"),
    recipe: str = "recipes/demo/qlora_draft_model.yaml",
    quantization: Annotated[str, typer.Option(help="of the target: 8bit, 4bit or null")] = "null",
    num: Annotated[int, typer.Option(help="queries to collect")] = 2000,
    max_new_tokens: Annotated[int, typer.Option(help="of an answer")] = 128,
    prompts: Annotated[int, typer.Option(help="held-out queries to measure on")] = 40,
    override: Annotated[list[str] | None, typer.Option(help="key=value of the recipe")] = None,
) -> None:
    """Collect, regenerate, train, and measure before and after."""
    queries, answers, training, bench = (
        str(out / name) for name in ("queries", "answers", "training", "bench")
    )
    drafter = f"{training}/drafter"
    model = [f"target.path={target}", f"target.quantization={quantization}"]

    # 1. What users asked: without duplicates and private data, a tenth of it held out.
    specdec("collect", source, "--domain", domain, "--num", str(num), "--out", queries)

    # 2. What the target answers. A drafter predicts its target: nobody else's answers will do.
    limit = ["--max-new-tokens", str(max_new_tokens)]
    specdec("regenerate", queries, "--target", target, *limit, "--out", answers)

    # 3. A QLoRA adapter on the draft model, merged into a plain checkpoint at the end, which any
    #    engine that takes a draft model reads. The parity gate has decoded with what was written.
    start = [f"data.path={answers}", f"drafter.options.path={draft}"]
    specdec("train", recipe, *model, *start, *(override or []), "--out", training)

    # 4. Both draft models on held-out queries, prompt by prompt in turn, beside plain decoding.
    arms = ", ".join(
        f"{{name: {name}, type: draft_model, options: {{path: {path}, num_draft_tokens: 4}}}}"
        for name, path in (("before", draft), ("after", drafter))
    )
    asked = [f"prompts.source={queries}", f"prompts.num={prompts}"]
    limit = [f"max_new_tokens={max_new_tokens}"]
    specdec("bench", "demo", *model, *asked, *limit, f"arms=[{arms}]", "--out", bench)

    print(before_and_after(Path(bench, "results.json")))
    print(f"The drafter, a plain checkpoint: {drafter}")


def specdec(*words: str) -> None:
    """Run a command and show it, as it could be typed."""
    print(f"\n$ specdec {shlex.join(words)}", flush=True)
    status = subprocess.run([sys.executable, "-m", "specdec", *words], check=False).returncode
    if status:
        sys.exit(status)


def before_and_after(results: Path) -> str:
    """A table of both draft models, with 95 % intervals over prompts."""
    arms = {arm["name"]: arm for arm in json.loads(results.read_text())["arms"]}
    lines = [f"\n{'':8}{'alpha':>7}{'tau':>20}{'speed / plain':>20}"]
    for name in ("before", "after"):
        arm = arms[name]
        # Of the first tokens drafted: at T = 0 the share where both argmaxes agree.
        alpha = (arm["per_depth_conditional"] or [0.0])[0]
        figures = (interval(arm, key) for key in ("tau", "speedup_vs_plain"))
        lines.append(f"{name:8}{alpha:7.3f}{''.join(f'{each:>20}' for each in figures)}")
    return "\n".join(lines)


def interval(arm: dict, key: str) -> str:
    """A figure of an arm; with one prompt there is no interval."""
    low, high = arm[f"{key}_ci"] or (float("nan"), float("nan"))
    return f"{arm[key]:.2f} [{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    typer.run(main)
