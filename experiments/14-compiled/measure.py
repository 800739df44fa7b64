"""Our loop, eager and compiled, and other packages, in turns on the same prompts.

python experiments/14-compiled/measure.py --out runs/experiments/14-compiled

A call is a line of calls.jsonl, so that what is stopped goes on. At the end results.json holds the
figures, and the goals of the issue that asked for compiled decoding.
"""

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from fresh import compiling, load
from rich.console import Console
from rich.progress import track

from specdec import generate, load_drafter
from specdec.bench.prompts import encode_prompts, load_prompts
from specdec.common.files import Journal, write_json
from specdec.common.provenance import machine
from specdec.common.stats import Work, Works, total_speed
from specdec.demo import demo_path
from specdec.engine.interfaces import Drafter

HERE = Path(__file__).parent
SOURCES, MAX_NEW_TOKENS, THREADS = ("gsm8k", "sgd"), 64, 2
OURS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "draft model": {"type": "draft_model", "path": "demo", "num_draft_tokens": 4},
    "EAGLE-3 chain": {"type": "eagle3", "depth": 5, "width": 1},
    "EAGLE-3 tree": {"type": "eagle3", "depth": 6, "width": 3, "max_nodes": 12},
}
PEERS = (
    "flashspec dynamic",
    "flashspec compiled",
    "flashspec composite",
    "economize",
    "transformers dynamic",
    "transformers static",
    "transformers assisted",
)
# Arms by the rows that they decode together.
BATCHES = {1: (*OURS, *PEERS), 8: ("plain", "draft model", "economize")}
Prompts = list[list[int]]
Arm = Callable[[Prompts], dict[str, Any]]
Rows = dict[tuple[int, str], dict[int, list[dict[str, Any]]]]  # batch, arm -> group -> repeats


# --- Arms ---


def own_arm(target: Any, drafter: Drafter | None) -> Arm:
    """Decode all prompts of a call together, and sum up the steps that they shared."""

    def decode(prompts: Prompts) -> dict[str, Any]:
        started = time.perf_counter()
        results = generate(target, drafter, prompts, max_new_tokens=MAX_NEW_TOKENS)
        wall_s = time.perf_counter() - started
        # Steps of a batch are the same for all rows, and one row sees them all.
        steps = max((result.records for result in results), key=len)
        accepted = sum(result.stats.num_accepted for result in results)
        return {
            "tokens": [result.tokens for result in results],
            "num_first": [1] * len(results),
            "decode_s": max(result.decode_s for result in results),
            "wall_s": wall_s,
            "accepted": accepted,
            "steps": sum(len(result.records) for result in results),
            "step_wall_s": sum(step.wall_s for step in steps),
            "forward_s": sum(step.draft_s + step.target_s for step in steps),
            "other_ms": [1000 * (s.wall_s - s.draft_s - s.target_s) for s in steps],
        }

    return decode


class Peer:
    """An arm of another package, in a process of its own."""

    def __init__(self, name: str, python: Path, capacity: int) -> None:
        paths = [str(demo_path(model)) for model in ("target", "draft")]
        command = [str(python), str(HERE / "peers.py"), name, *paths, str(capacity)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.about = self._read()

    def __call__(self, prompts: Prompts) -> dict[str, Any]:
        assert self._process.stdin is not None
        call = {"prompts": prompts, "max_new_tokens": MAX_NEW_TOKENS}
        self._process.stdin.write(json.dumps(call) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise RuntimeError(f"{self._process.args} has ended; its error is above")
        return json.loads(line)


def in_turns(
    arms: dict[str, Arm], groups: list[Prompts], batch: int, repeats: int, journal: Journal
) -> float:
    """Measure what the journal lacks, and return what was compiled in calls that were timed."""
    done = {tuple(row["call"]) for row in journal.entries}
    calls = [(r, g, name) for r in range(repeats) for g in range(len(groups)) for name in arms]
    calls = [call for call in calls if (batch, *call) not in done]
    if not calls:
        return 0
    console = Console(stderr=True)
    # All of them, for none may compile when its time is taken; the longest one sizes static caches.
    by_length = sorted(groups, key=lambda prompts: -max(map(len, prompts)))
    for name in track(arms, f"warming up, batch {batch}", console=console):
        for prompts in by_length:
            arms[name](prompts)
    before = compiling("num_compiled")
    names = list(arms)
    calls.sort(key=lambda call: (call[0], call[1], (names.index(call[2]) - call[1]) % len(names)))
    for repeat, group, name in track(calls, f"measuring, batch {batch}", console=console):
        row = {"call": [batch, repeat, group, name], **arms[name](groups[group])}
        journal.append(row)
        journal.entries.append(row)
    return compiling("num_compiled") - before


# --- Fresh processes ---


def run_fresh(is_compiled: bool, cache: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "fresh.py"), *options]
    command += ["--compiled"] if is_compiled else []
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def starts(modes: Iterable[str], num_prompts: int, num_steps: int) -> dict[str, dict[str, Any]]:
    """Start all of `bench demo`: eagerly, with nothing compiled, and with what that start kept."""
    prompts = ("--prompts", str(num_prompts))
    with TemporaryDirectory() as folder:
        found = {"eager": run_fresh(False, Path(folder), *prompts)}
        if "compiled" in modes:
            found["cold"] = run_fresh(True, Path(folder), *prompts)
            steps = ("--steps", str(num_steps))
            found["warm"] = run_fresh(True, Path(folder), *prompts, *steps)
    return found


# --- Figures ---


def works(rows: dict[int, list[dict[str, Any]]], seconds: str = "decode_s") -> Works:
    """Tokens of each call behind its first ones, and the median seconds of its repeats."""
    found = []
    for _, calls in sorted(rows.items()):
        first = sum(calls[0]["num_first"]) if seconds == "decode_s" else 0
        tokens = sum(map(len, calls[0]["tokens"])) - first
        found.append(Work(tokens, median(call[seconds] for call in calls)))
    return found


def arm_figures(name: str, batch: int, rows: Rows) -> dict[str, Any]:
    own, plain = rows[batch, name], rows[batch, "plain eager"]
    calls = [call for repeats in own.values() for call in repeats]
    expected = {group: repeats[0]["tokens"] for group, repeats in plain.items()}
    found: dict[str, Any] = {
        "name": name,
        "batch": batch,
        "mismatches": sum(
            tokens != wanted
            for group, repeats in own.items()
            for call in repeats
            for tokens, wanted in zip(call["tokens"], expected[group], strict=True)
        ),
        "answers": sum(len(call["tokens"]) for call in calls),
        **total_speed("tokens_per_s", [works(own)]),
        **total_speed("vs_plain_eager", [works(own)], [works(plain)]),
        **total_speed("whole_vs_plain_eager", [works(own, "wall_s")], [works(plain, "wall_s")]),
        **dict.fromkeys(("tau", "other_ms_per_step", "loop_efficiency")),
    }
    if "steps" in calls[0]:  # our own loop tells
        accepted, steps, forward_s, wall_s = (
            sum(call[key] for call in calls)
            for key in ("accepted", "steps", "forward_s", "step_wall_s")
        )
        found["tau"] = 1 + accepted / steps
        found["other_ms_per_step"] = median(ms for call in calls for ms in call["other_ms"])
        found["loop_efficiency"] = forward_s / wall_s
    return found


def ratio(rows: Rows, batch: int, over: str, under: str) -> dict[str, Any]:
    """Total decode time of `under` over that of `over`; None where one was not measured."""
    if (batch, over) not in rows or (batch, under) not in rows:
        return {"value": None, "value_ci": None, "over": over, "under": under}
    speed = total_speed("value", [works(rows[batch, over])], [works(rows[batch, under])])
    return {**speed, "over": over, "under": under}


def goals(
    rows: Rows, arms: list[dict[str, Any]], started: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """List goals beside what was measured; a goal is a least or a most."""
    by_name = {arm["name"]: arm for arm in arms if arm["batch"] == 1}

    def fastest(*kinds: str) -> str:
        known = [name for name in by_name if name in kinds]
        return max(known, key=lambda name: by_name[name]["tokens_per_s"], default=kinds[0])

    flashspec = fastest("flashspec dynamic", "flashspec compiled")
    plain = fastest("plain compiled", "plain eager", "transformers static", "transformers dynamic")
    chain, draft = "EAGLE-3 chain compiled", "draft model compiled"
    speeds = [
        ("plain: compiled / eager", 1, "plain compiled", "plain eager", 1.4),
        ("draft model, chain of 4: compiled / eager", 1, draft, "draft model eager", 1.6),
        ("EAGLE-3 chain: compiled / eager", 1, chain, "EAGLE-3 chain eager", 1.5),
        ("EAGLE-3 chain / plain, both compiled", 1, chain, "plain compiled", 2.1),
        ("draft model compiled / flashspec at its fastest", 1, draft, flashspec, 1.4),
        ("draft model compiled / flashspec by its options", 1, draft, "flashspec dynamic", None),
        ("draft model compiled / transformers assisted", 1, draft, "transformers assisted", 2.2),
        ("draft model compiled / economize, batch 8", 8, draft, "economize", 1.5),
        ("draft model compiled / fastest plain", 1, draft, plain, None),
        ("EAGLE-3 chain compiled / fastest plain", 1, chain, plain, None),
    ]
    found = []
    for what, batch, over, under, least in speeds:
        found.append({"what": what, "least": least, **ratio(rows, batch, over, under)})
    for name, most in (("plain", 0.3), ("draft model", 0.6), ("EAGLE-3 tree", 1.2)):
        what = f"time in neither model a step, eager: {name}, ms"
        value = by_name[f"{name} eager"]["other_ms_per_step"]
        found.append({"what": what, "most": most, "value": value})
    efficiency = by_name["draft model eager"]["loop_efficiency"]
    what = "loop efficiency, batch 1, draft model, eager"
    found.append({"what": what, "least": 0.95, "value": efficiency})
    cold, warm = started.get("cold"), started.get("warm")
    joining = warm["compilations_while_joining"] if warm else None
    memory = warm["peak_bytes"] / started["eager"]["peak_bytes"] if warm else None
    return [
        *found,
        {"what": "cold start of bench demo, s", "most": 90, "value": cold and cold["start_s"]},
        {"what": "with a warm cache, s", "most": 15, "value": warm and warm["start_s"]},
        {
            "what": "compilations in steps after warm-up, rows joining and leaving",
            "most": 0,
            "value": joining and sum(joining.values()),
        },
        {"what": "peak memory, compiled / eager", "most": 1.2, "value": memory},
    ]


def main(
    out: Annotated[Path, typer.Option(help="folder of the run")],
    prompts: Annotated[int, typer.Option(help="of each source, held out")] = 20,
    groups: Annotated[int, typer.Option(help="of eight prompts, at batch 8")] = 10,
    repeats: int = 3,
    demo_prompts: Annotated[int, typer.Option(help="of the fresh processes")] = 18,
    steps: Annotated[int, typer.Option(help="of rows that join and leave")] = 2000,
    eager_only: Annotated[bool, typer.Option("--eager-only", help="compile nothing")] = False,
) -> None:
    python = Path(os.environ.get("SPECDEC_ENGINES_DIR", ".engines")) / "peers/bin/python"
    if not python.is_file():
        raise typer.BadParameter(f"no {python}; run bash experiments/14-compiled/peers.sh")
    torch.set_num_threads(THREADS)
    modes = ["eager"] if eager_only else ["eager", "compiled"]
    targets = {mode: load(mode == "compiled") for mode in modes}
    eager = targets["eager"]
    chosen = [load_prompts(source, max(prompts, 4 * groups)) for source in SOURCES]
    mixed = encode_prompts([each for pair in zip(*chosen, strict=True) for each in pair], eager)
    by_batch = {
        1: [[ids] for ids in mixed[: 2 * prompts]],
        8: [mixed[first : first + 8] for first in range(0, 8 * groups, 8)],
    }
    capacity = max(map(len, mixed)) + MAX_NEW_TOKENS
    arms: dict[str, Arm] = {}
    for name, options in OURS.items():
        for mode, target in targets.items():
            drafter = options and load_drafter(options, target)
            arms[f"{name} {mode}"] = own_arm(target, drafter)
    others = {name: Peer(name, python, capacity) for name in PEERS}
    arms |= others
    facts = machine(eager)
    identity = {key: facts[key] for key in ("git_commit", "versions", "cpu", "threads", "dtype")}
    identity |= {"modes": modes, "prompts": prompts, "groups": groups, "repeats": repeats}
    with Journal(out / "calls.jsonl", identity) as journal:
        timed = 0.0
        for batch, kinds in BATCHES.items():
            own = {n: arm for n, arm in arms.items() if n in kinds or n.rpartition(" ")[0] in kinds}
            timed += in_turns(own, by_batch[batch], batch, repeats, journal)
        if not any(row["call"] == ["starts"] for row in journal.entries):
            row = {"call": ["starts"], "starts": starts(modes, demo_prompts, steps)}
            journal.append(row)
            journal.entries.append(row)
        entries = journal.entries
    rows: Rows = defaultdict(lambda: defaultdict(list))
    for entry in entries:
        if entry["call"] != ["starts"]:
            batch, _, group, name = entry["call"]
            rows[batch, name][group].append(entry)
    started = next(entry["starts"] for entry in entries if entry["call"] == ["starts"])
    figures = [arm_figures(name, batch, rows) for batch, name in rows]
    results = {
        "schema": "specdec-compiled-1",
        "provenance": facts
        | {
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
            "peers": {name: peer.about for name, peer in others.items()},
            "compile_s": compiling("compile_s"),
            "compiled_while_timed": timed,
            "prompts": {"sources": SOURCES, "each": prompts, "groups_of_8": groups},
            "max_new_tokens": MAX_NEW_TOKENS,
            "repeats": repeats,
            "joining_steps": steps,
        },
        "arms": figures,
        "starts": started,
        "goals": goals(rows, figures, started),
    }
    write_json(out / "results.json", results)


if __name__ == "__main__":
    typer.run(main)
