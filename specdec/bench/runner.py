"""Run a bench: arms in turn, repeated, paired by prompt, resumable."""

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed

from specdec.bench.arms import Arm, build_arms
from specdec.bench.config import ArmConfig, BenchConfig, TargetConfig
from specdec.bench.measure import PROMPT_ERRORS, decode_call
from specdec.bench.prompts import load_prompts, render
from specdec.bench.store import Key, Outcome, RunStore, read_run
from specdec.bench.summary import (
    failures,
    faster_than_tau,
    find_differences,
    peak_memory,
    summarise,
    tabulate,
    throughput,
)
from specdec.bench.workloads import unfold_turns
from specdec.checkpoints.folder import CONFIG, SIDECAR
from specdec.checkpoints.identity import TARGET, as_json, check_resumed, identify_target
from specdec.common.files import parse_json, replace_file
from specdec.common.messages import BenchPrompt
from specdec.common.provenance import machine
from specdec.engine.text import encode
from specdec.targets.hf import HFTarget
from specdec.targets.load import load_target
from specdec.verify import get_rule

_WEIGHTS = (".safetensors", ".bin", ".pt")
_DESCRIPTIONS = (CONFIG, SIDECAR, "adapter_config.json")


def plan_mark(arm: ArmConfig) -> str | None:
    """A short hash of the plan that an arm follows; None without one, or where it is not there."""
    option = arm.draft_length or {}
    path = Path(str(option["plan"])).expanduser() if "plan" in option else None
    if path is None or not path.is_file():
        return None
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def checkpoint_mark(arm: ArmConfig) -> str | None:
    """A short hash of all weights, with their descriptions, in folders that an arm's options name.

    None for an arm without any. What comes from the hub by its id, or with the package, is not
    read.
    """
    files = [file for folder in _folders(arm.options) for file in _checkpoint(folder)]
    marks = [(path.name, _hash_of_file(path, *_stamp(path))) for path in files]
    return hashlib.sha256(json.dumps(marks).encode()).hexdigest()[:16] if marks else None


def _folders(value: Any) -> Iterator[Path]:
    """Every folder in options, those of drafters inside a drafter included."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _folders(inner)
    elif isinstance(value, str) and value:
        path = Path(value).expanduser()
        if path.is_dir():
            yield path


def _checkpoint(folder: Path) -> list[Path]:
    """Its files in order; none where no weights lie."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if not any(path.suffix in _WEIGHTS for path in files):
        return []
    return [path for path in files if path.suffix in _WEIGHTS or path.name in _DESCRIPTIONS]


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


@cache
def _hash_of_file(path: Path, num_bytes: int, changed_ns: int) -> str:
    """Read once by a process while size and time stay: the cells of a sweep share their files."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


ORIGIN = "origin.json"
_MACHINE = ("device", "cpu", "cpu_count", "dtype", "quantized")


def settle_origin(
    folder: Path,
    provenance: dict[str, Any],
    target: Any,
    arms: Sequence[ArmConfig],
    num_done: int,
    num_calls: int,
) -> dict[str, Any]:
    """Refuse to add calls of another origin; write down of which one those here are.

    A configuration does not say these: `target.path`, `draft_length.plan` and the folders in an
    arm's options may hold something else by now, and a device or dtype that is left out follows
    the machine. Another commit is not refused: the provenance tells which one measured last.

    Args:
        folder: of the run.
        provenance: of now, see `provenance.machine`.
        target: an `HFTarget`.
        arms: of the configuration.
        num_done: finished calls in the folder.
        num_calls: of the whole run.

    Returns:
        The provenance of now; where nothing is left to measure, that of the last start that
        measured anything.

    Raises:
        ValueError: finished calls in the folder are of another machine, target, plan or
            checkpoint of an arm.
    """
    conditions = _conditions(provenance, target, arms)
    earlier = _read(folder / ORIGIN) if num_done else None
    if earlier is not None:
        _compare(folder, earlier["conditions"], conditions)
        conditions = earlier["conditions"] | conditions
    if num_done == num_calls:
        return provenance if earlier is None else dict(earlier["provenance"])
    text = json.dumps({"conditions": conditions, "provenance": provenance}, indent=1)
    replace_file(folder / ORIGIN, f"{text}\n".encode())
    return provenance


def check_origin(
    folder: Path, provenance: dict[str, Any], target: Any, arms: Sequence[ArmConfig]
) -> None:
    """Refuse a folder with finished calls as `settle_origin` does, and write nothing."""
    earlier = _read(folder / ORIGIN)
    if earlier is not None:
        _compare(folder, earlier["conditions"], _conditions(provenance, target, arms))


def _conditions(
    provenance: dict[str, Any], target: Any, arms: Sequence[ArmConfig]
) -> dict[str, Any]:
    known = identify_target(target)
    checkpoints = {f"the checkpoint of {arm.name!r}": checkpoint_mark(arm) for arm in arms}
    return {
        **{name: provenance[name] for name in _MACHINE},
        "the target's weights": known.weights,
        TARGET: as_json(known),
        **{f"the plan of {arm.name!r}": plan_mark(arm) for arm in arms},
        # A checkpoint that is gone is not another one.
        **{name: mark for name, mark in checkpoints.items() if mark is not None},
    }


def _read(path: Path) -> dict[str, Any] | None:
    """None for a folder of an older version, or a file that is damaged."""
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
        return {key: dict(found[key]) for key in ("conditions", "provenance")}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _compare(folder: Path, earlier: dict[str, Any], now: dict[str, Any]) -> None:
    for name, value in now.items():
        if name == TARGET:
            check_resumed(folder, earlier.get(name), value)
        elif name in earlier and earlier[name] != value:
            raise ValueError(
                f"{str(folder)!r} holds calls with another origin: {name} was {earlier[name]!r} "
                f"and is {value!r} now; choose another --out folder or remove this one"
            )


Item = TypeVar("Item")

# A process may have much more to decode than another; one that has died is noticed at once.
_PATIENCE = timedelta(days=2)


@dataclass(frozen=True)
class Processes:
    """This process among those that run the same bench.

    Attributes:
        rank: its number.
        num: of processes in all.
        local_rank: its number on this machine.
    """

    rank: int = 0
    num: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the one that joins the results and speaks."""
        return self.rank == 0

    @property
    def shard(self) -> int | None:
        """The number of its file of records; None for a process alone."""
        return self.rank if self.num > 1 else None

    def share(self, items: Sequence[Item]) -> Iterator[tuple[int, Item]]:
        """What of the items is its own, with their numbers: every `num`th one."""
        return ((i, item) for i, item in enumerate(items) if i % self.num == self.rank)

    def device(self, given: str | None) -> str | None:
        """Where it puts the models: a CUDA device of its own, unless another one is given."""
        if given is None and self.num > 1 and torch.cuda.is_available():
            return f"cuda:{self.local_rank % torch.cuda.device_count()}"
        return given

    @contextmanager
    def together(self) -> Iterator[None]:
        """Leave the block when all processes have; where one of them failed, all fail.

        Raises:
            RuntimeError: another process failed or has ended.
        """
        try:
            yield
        except Exception as error:
            self._exchange(f"{type(error).__name__}: {error}")
            raise
        for rank, problem in enumerate(self._exchange("")):
            if problem:
                raise RuntimeError(f"process {rank} failed: {problem}")

    def _exchange(self, problem: str) -> list[str]:
        problems: list[Any] = [problem] * self.num
        if self.num > 1:
            try:
                distributed.all_gather_object(problems, problem)
            except RuntimeError as error:
                raise RuntimeError(
                    "another process ended before its part was done; finished calls are kept: "
                    "give the same command again"
                ) from error
        return problems


def launched_processes(environment: Mapping[str, str] = os.environ) -> Processes:
    """What the launcher's variables RANK, WORLD_SIZE and LOCAL_RANK say; without them, one."""
    num = int(environment.get("WORLD_SIZE", 1))
    if num < 2 or "RANK" not in environment:
        return Processes()
    rank = int(environment["RANK"])
    return Processes(rank, num, int(environment.get("LOCAL_RANK", rank)))


@contextmanager
def joined_processes(environment: Mapping[str, str] = os.environ) -> Iterator[Processes]:
    """Meet the processes that a launcher started; for one alone, nothing is opened."""
    processes = launched_processes(environment)
    if processes.num == 1:
        yield processes
        return
    # Of processors too: what is exchanged is text, and devices are left to the arms.
    distributed.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield processes
    finally:
        distributed.destroy_process_group()


SCHEMA = "specdec-bench-3"
RESULTS = "results.json"


class GreedyMismatchError(RuntimeError):
    """At temperature 0 in float32 two arms disagreed: something is not lossless."""


def run_bench(
    config: BenchConfig,
    folder: Path,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
    *,
    target: HFTarget | None = None,
    processes: Processes = Processes(),
) -> dict[str, Any]:
    """Run what is not in the folder yet and write `results.json` there.

    Args:
        config: see `load_config`.
        folder: for `records.jsonl` and `results.json`.
        progress: called with calls done, calls in all, and what runs next.
        target: of the configuration, where it is loaded already.
        processes: those that share the calls; all of them call this.

    Returns:
        The content of `results.json`; `check_results` says whether it stands. The same in
        all processes; the first one writes it.

    Raises:
        ValueError: bad configuration, prompts, or a folder of another configuration or origin, see
            `settle_origin`.
        OSError: the folder cannot be written, or is full; finished calls are kept.
        RuntimeError: another process failed.
    """
    torch.set_num_threads(config.threads)
    get_rule(config.rule)
    with processes.together():
        prompts = read_prompts(config)
        mark = fingerprint(config, prompts)
        store = RunStore(folder, mark, processes.shard)
        try:
            target = target or open_target(config.target, processes)
            # Of now: the code and the machine may be others when the run ends.
            provenance = collect(config, mark, target, processes.num)
            prompts = unfold_turns(prompts, target, config.max_new_tokens, progress)
            ids = encode_prompts(prompts, target)
            if processes.is_first:
                num_calls = len(_keys(config, range(-(-len(ids) // config.call_size))))
                provenance = settle_origin(
                    folder, provenance, target, config.arms, len(store.done), num_calls
                )
            _run_missing(config, target, ids, store, progress, processes)
        finally:
            store.close()
    done = read_run(folder, mark)
    results = {
        "schema": SCHEMA,
        "provenance": provenance,
        "target": asdict(identify_target(target)),
        "prompts": [_prompt(p, i) for p, i in zip(prompts, ids, strict=True)],
        "memory": peak_memory(done.values()),
        "arms": _arms(config, target, prompts, ids, done),
    }
    text = json.dumps(results, indent=1, allow_nan=False) + "\n"
    if processes.is_first:
        replace_file(folder / RESULTS, text.encode())
    content: dict[str, Any] = json.loads(text)
    return content


def read_prompts(config: BenchConfig) -> list[BenchPrompt]:
    """The prompts of a configuration; errors as in `load_prompts`."""
    where = config.prompts
    return load_prompts(where.source, where.num, where.data_dir, where.seed)


def encode_prompts(prompts: Sequence[BenchPrompt], target: HFTarget) -> list[list[int]]:
    """Token ids of every prompt; errors as in `encode`."""
    return [encode(render(p, target.tokenizer), target, i) for i, p in enumerate(prompts)]


def open_target(config: TargetConfig, processes: Processes) -> HFTarget:
    """Load the target that a configuration names; errors as in `load_target`."""
    return load_target(
        config.path,
        dtype=config.dtype,
        device=processes.device(config.device),
        quantization=config.quantization,
    )


def _prompt(prompt: BenchPrompt, ids: list[int]) -> dict[str, Any]:
    return {
        "id": prompt.id,
        "domain": prompt.domain,
        "num_tokens": len(ids),
        "fingerprint": fingerprint_of_ids(ids),
    }


def _arms(
    config: BenchConfig,
    target: HFTarget,
    prompts: list[BenchPrompt],
    ids: list[list[int]],
    done: dict[Key, Outcome],
) -> list[dict[str, Any]]:
    tables = tabulate(config, done, _names(config), len(ids))
    differences = find_differences(config, tables, target, ids)
    domains = [prompt.domain for prompt in prompts]
    arms = summarise(config, tables, differences, domains, target.eos_token_ids)
    for arm in arms:
        outcomes = [outcome for (_, _, name), outcome in done.items() if name == arm["name"]]
        memory = peak_memory(outcomes)
        arm["peak_device_bytes"] = memory["peak_device_bytes"]
        arm["cache_bytes"] = memory["cache_bytes"]
        arm.update(throughput(outcomes, config.batch_size))
        arm["failures"] = failures(config, done, arm["name"])
    return arms


def _names(config: BenchConfig) -> list[str]:
    return ["plain", "hf_generate", *(arm.name for arm in config.arms)]


def check_results(results: dict[str, Any]) -> None:
    """Fail a run that proves an arm wrong, or that measured nothing of one.

    In half precision, or quantised, greedy tokens may differ where two logits nearly tie: that is
    reported, and fails nothing.

    Args:
        results: what `run_bench` returned.

    Raises:
        GreedyMismatchError: tokens differ at temperature 0 in float32.
        RuntimeError: every prompt of an arm failed, or one is faster than its tau; see
            `faster_than_tau`.
    """
    for arm in results["arms"]:
        if arm["failed"] == arm["prompts"]:
            raise RuntimeError(
                f"every prompt of the arm {arm['name']!r} failed: {arm['failures'][0]['reason']}"
            )
    provenance = results["provenance"]
    wrong = {arm["name"]: arm["mismatches"] for arm in results["arms"] if arm["mismatches"]}
    if wrong and provenance["dtype"] == "float32" and not provenance["quantized"]:
        first = next(arm["differences"][0] for arm in results["arms"] if arm["differences"])
        raise GreedyMismatchError(
            f"outputs differ at temperature 0 in float32; prompts by arm: {wrong}; first: prompt "
            f"{first['prompt']} from output token {first['position']} on (top-2 logit gap "
            f"{first['top2_gap']}); see differences in results.json"
        )
    if impossible := faster_than_tau(results):
        raise RuntimeError("; ".join(impossible))


def _run_missing(
    config: BenchConfig,
    target: HFTarget,
    ids: list[list[int]],
    store: RunStore,
    progress: Callable[[int, int, str], None],
    processes: Processes,
) -> None:
    size = config.call_size
    calls = [ids[i : i + size] for i in range(0, len(ids), size)]
    own = list(processes.share(calls))
    names = _names(config)
    keys = _keys(config, [index for index, _ in own])
    total, missing = len(keys), keys - store.done.keys()
    if missing:
        for name, arm in build_arms(config, target).items():
            progress(total - len(missing), total, f"warm-up {name}")
            _warm_up(arm, calls[0][: config.batch_size])
    for repeat in sorted({repeat for repeat, _, _ in missing}):
        arms = build_arms(config, target)
        for index, call in own:
            # Another arm goes first each time, so that none always meets a cold machine.
            turn = (repeat + index) % len(names)
            for name in names[turn:] + names[:turn]:
                key = (repeat, index, name)
                if key not in missing:
                    continue
                done = total - len(missing)
                progress(done, total, f"{name}, repeat {repeat + 1}, call {index + 1}")
                indices = range(index * size, index * size + len(call))
                store.add(key, decode_call(arms[name], call, indices, target.device))
                missing.discard(key)
                progress(done + 1, total, name)


def _keys(config: BenchConfig, calls: Sequence[int]) -> set[Key]:
    """Every arm's call of every repeat, for these numbers of calls."""
    return set(itertools.product(range(config.repeats), calls, _names(config)))


def _warm_up(arm: Arm, batch: list[list[int]]) -> None:
    try:
        arm(batch, range(len(batch)))
    except ValueError:
        raise  # the prompts are sound, so the options are not
    except PROMPT_ERRORS:
        pass  # the measurement meets it again, and keeps the reason


def fingerprint(config: BenchConfig, prompts: Sequence[BenchPrompt]) -> str:
    """A short hash of configuration and prompts: a folder of results belongs to one."""
    whole = {"config": asdict(config), "prompts": [asdict(prompt) for prompt in prompts]}
    text = json.dumps(whole, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint_of_ids(ids: Sequence[int]) -> str:
    """A short hash of a prompt as the target reads it."""
    return hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest()[:16]


def collect(
    config: BenchConfig, mark: str, target: HFTarget, num_processes: int = 1
) -> dict[str, Any]:
    """Configuration of a bench with its fingerprint, and where it ran."""
    return {
        "config": asdict(config),
        "config_fingerprint": mark,
        "processes": num_processes,
        **machine(target),
    }
