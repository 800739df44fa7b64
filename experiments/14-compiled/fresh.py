"""A fresh process that measures its own start, memory and compilations; for measure.py.

python experiments/14-compiled/fresh.py --compiled   # a line of JSON
"""

import json
import random
import time
from contextlib import suppress
from importlib import import_module
from typing import Annotated, Any

import torch
import typer

from specdec import Engine, generate, load_drafter, load_target
from specdec.bench.config import load_config
from specdec.bench.measure import read_peaks, reset_peaks
from specdec.bench.prompts import encode_prompts, load_prompts
from specdec.engine.interfaces import Drafter

MAX_ROWS = 8
CHANGES = 20  # steps after which other numbers of rows are wanted
# Drafters of these whose rows join and leave: a chain, and a tree.
JOINING = ("draft model", "eagle3")


def load(is_compiled: bool) -> Any:
    """Load the demo target in a mode; its drafters follow it."""
    return load_target("demo", **({"compile": True} if is_compiled else {}))


def compiling(figure: str) -> float:
    """Ask what this process has compiled or loaded: its number, `num_compiled`, or `compile_s`."""
    for name in ("specdec.common.compile", "specdec.targets.compiled"):
        with suppress(ImportError, AttributeError):  # of code that cannot compile
            return getattr(import_module(name), figure)()
    return 0


def run_steps(engine: Engine, prompts: list[list[int]], num_steps: int, seed: int) -> None:
    """Run steps of 1 to MAX_ROWS rows, which join and leave, each with its own length."""
    rng, wanted = random.Random(seed), MAX_ROWS
    for step in range(num_steps):
        if step % CHANGES == 0:
            wanted = rng.randint(1, MAX_ROWS)
        while engine.num_running + engine.num_waiting < wanted:
            engine.submit(rng.choice(prompts), max_new_tokens=rng.randint(2, 64))
        for chunk in engine.advance():
            if chunk.finish_reason:
                engine.result(chunk.index)


def count_compilations(
    target: Any, drafter: Drafter, prompts: list[list[int]], num_steps: int
) -> float:
    """Count compilations in steps behind as many that warm up, with other requests."""
    engine = Engine(target, drafter, max_rows=MAX_ROWS)
    run_steps(engine, prompts, num_steps, seed=1)
    before = compiling("num_compiled")
    run_steps(engine, prompts, num_steps, seed=2)
    engine.preempt()
    return compiling("num_compiled") - before


def main(
    compiled: bool = False,
    prompts: Annotated[int, typer.Option(help="of the demo's, as in bench demo")] = 18,
    steps: Annotated[int, typer.Option(help="of rows that join and leave; 0 for none")] = 0,
    threads: int = 2,
) -> None:
    torch.set_num_threads(threads)
    started = time.perf_counter()
    config, target = load_config("demo"), load(compiled)
    drafters: dict[str, Drafter | None] = {"plain": None}
    for arm in config.arms:
        drafters[arm.name] = load_drafter({"type": arm.type, **arm.options}, target)
    load_s = time.perf_counter() - started
    ids = encode_prompts(load_prompts("demo", prompts), target)

    def decode_all() -> float:
        began = time.perf_counter()
        for drafter in drafters.values():
            for prompt in ids:
                generate(target, drafter, [prompt], max_new_tokens=config.max_new_tokens)
        return time.perf_counter() - began

    first_s = decode_all()
    if compiled and not compiling("num_compiled"):
        raise RuntimeError("nothing was compiled that num_compiled() knows of: is it elsewhere?")
    peak = read_peaks(target.device, None).peak_rss_bytes
    compile_s = compiling("compile_s")
    reset_peaks(target.device)
    second_s = decode_all()
    found = {
        "load_s": load_s,
        "first_pass_s": first_s,
        "second_pass_s": second_s,
        "start_s": load_s + first_s - second_s,
        "compile_s": compile_s,
        "num_compiled": compiling("num_compiled"),
        "peak_bytes": peak,
        "decoding_peak_bytes": read_peaks(target.device, None).peak_rss_bytes,
    }
    if steps:
        found["compilations_while_joining"] = {
            name: count_compilations(target, drafters[name], ids, steps) for name in JOINING
        }
    print(json.dumps(found))


if __name__ == "__main__":
    typer.run(main)
