"""Folders of runs as the commands write them, made from invented steps by the bench's own code."""

import json
import random
from dataclasses import asdict

from specdec.bench.config import ArmConfig, BenchConfig
from specdec.bench.store import Memory, Outcome, Run
from specdec.bench.summary import failures, peak_memory, summarise, tabulate, throughput
from specdec.engine.metrics import StepRecord

DOMAINS = ("support", "code", "math")
NUM_PROMPTS = 9
TOKENS = 25
ARMS = {
    "eagle3 chain": ("eagle3", {"depth": 4, "width": 1}, 0.75),
    "eagle3 tree": ("eagle3", {"depth": 4, "width": 3, "max_nodes": 12}, 0.85),
    "ngram <b>&amp;</b>": ("ngram", {"num_draft_tokens": 3}, 0.3),
}
PLAIN_MS = {"target": 4.0, "draft": 0.0, "verify": 0.1, "commit": 0.2, "wall": 4.5}


def bench(arms=ARMS, *, speed=1.0, seed=0, batch_size=1, repeats=3):
    """The content of a results.json; `speed` divides every time but plain decoding's."""
    configs = [ArmConfig(name, kind, options) for name, (kind, options, _) in arms.items()]
    config = BenchConfig(
        arms=configs, batch_size=batch_size, repeats=repeats, threads=1, max_new_tokens=TOKENS
    )
    config.prompts.num = NUM_PROMPTS
    done = {}
    for repeat in range(repeats):
        for name in ("plain", "hf_generate", *arms):
            draw = random.Random(f"{name} {seed} {repeat}")
            runs = [_run(name, arms, speed, place, draw) for place in range(NUM_PROMPTS)]
            for call, first in enumerate(range(0, NUM_PROMPTS, batch_size)):
                rows = runs[first : first + batch_size]
                wall_s = sum(run.ttft_s + run.decode_s for run in rows)
                done[repeat, call, name] = Outcome(rows, wall_s, Memory(1000, None, 10))
    names = ["plain", "hf_generate", *arms]
    tables = tabulate(config, done, names, NUM_PROMPTS)
    domains = [DOMAINS[place % len(DOMAINS)] for place in range(NUM_PROMPTS)]
    found = summarise(config, tables, {name: [] for name in names}, domains, [])
    for arm in found:
        outcomes = [outcome for (_, _, name), outcome in done.items() if name == arm["name"]]
        memory = peak_memory(outcomes)
        arm["peak_device_bytes"] = memory["peak_device_bytes"]
        arm["cache_bytes"] = memory["cache_bytes"]
        arm.update(throughput(outcomes, batch_size))
        arm["failures"] = failures(config, done, arm["name"])
    return {
        "schema": "specdec-bench-3",
        "provenance": provenance(config),
        "target": target(),
        "prompts": [
            {"id": f"p{i}", "domain": domain, "num_tokens": 10 + i, "fingerprint": f"{i:016x}"}
            for i, domain in enumerate(domains)
        ],
        "memory": peak_memory(done.values()),
        "arms": found,
    }


def _run(name, arms, speed, place, draw):
    if name == "hf_generate":
        return Run([7] * TOKENS, 1, 0.01, 0.0052 * (TOKENS - 1), [])
    records, left = [], TOKENS - 1
    while left:
        records.append(_step(name, arms, speed, place, len(records), left, draw))
        left -= records[-1].num_emitted
    decode_s = sum(record.wall_s for record in records)
    return Run([7] * TOKENS, 1, 0.01, decode_s, records)


def _step(name, arms, speed, place, step, left, draw):
    if name == "plain":
        seconds = {f"{part}_s": ms / 1000 for part, ms in PLAIN_MS.items()}
        return StepRecord(place, step, 1, 0, 0, 0, 1, **seconds)
    _, options, chance = arms[name]
    depth = options.get("depth") or options["num_draft_tokens"]
    nodes = options.get("max_nodes", depth)
    accepted = 0
    while accepted < depth and draw.random() < chance:
        accepted += 1
    tested = min(depth, accepted + 1)
    accepted = min(accepted, left - 1)
    tested = max(tested, accepted)
    draft_s, target_s = 0.0004 * depth / speed, (0.004 + 0.0002 * nodes) / speed
    verify_s, commit_s, rest_s = 0.0002 / speed, 0.0003 / speed, 0.0004 / speed
    wall_s = draft_s + target_s + verify_s + commit_s + rest_s + 0.0001 * draw.random()
    return StepRecord(
        place, step, 1, nodes, accepted, tested, accepted + 1, draft_s, target_s, wall_s,
        verify_s, commit_s,
    )  # fmt: skip


def provenance(config):
    return {
        "config": json.loads(json.dumps(asdict(config))),
        "config_fingerprint": "0" * 16,
        "processes": 1,
        "command": "specdec bench made.yaml --out made",
        "git_commit": "1" * 40,
        "git_dirty": False,
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "device": "cpu",
        "cpu": "A processor",
        "cpu_count": 2,
        "threads": 1,
        "load_average": 0.1,
        "dtype": "float32",
        "quantized": False,
        "date": "2026-01-01T00:00:00+00:00",
    }


def target():
    return {
        "name": "demo",
        "hidden_size": 160,
        "vocab_size": 3072,
        "num_layers": 16,
        "weights": "a" * 64,
        "tokenizer": "b" * 64,
    }


def sweep(folder):
    """A sweep over eagle3's shapes at two temperatures, with its cells; returns its content."""
    arms = {
        f"eagle3 {depth}x{nodes}": ("eagle3", {"depth": depth, "width": 3, "max_nodes": nodes}, 0.8)
        for depth in (2, 4, 6)
        for nodes in (8, 16)
    }
    arms |= {f"chain {n}": ("eagle3", {"depth": n, "width": 1}, 0.7) for n in (2, 4, 6)}
    cells = []
    for temperature in (0.0, 1.0):
        results = bench(arms, seed=int(temperature), repeats=1)
        results["provenance"]["config"]["sampling"]["temperature"] = temperature
        name = f"temperature={temperature:g}"
        write(folder / "cells" / name, "results.json", results)
        cells.append(
            {
                "name": name,
                "settings": {"sampling.temperature": temperature},
                "folder": f"cells/{name}",
                "error": None,
                "arms": results["arms"],
            }
        )
    known = ("processes", "command", "git_commit", "git_dirty", "versions", "date")
    where = {key: results["provenance"][key] for key in known}
    return {"schema": "specdec-sweep-2", "provenance": where, "cells": cells}


def plan(results, error=0.03):
    """A plan whose configurations are a bench's arms, each predicted too fast by `error`."""
    size = results["provenance"]["config"]["batch_size"]
    configurations = [
        {
            "name": arm["name"],
            "type": arm["type"],
            "options": arm["options"],
            "is_given": True,
            "is_timed": False,
            "batch_size": size,
            "predicted_tau": arm["tau"],
            "predicted_tau_ci": arm["tau_ci"],
            "predicted_speedup": arm["speedup_vs_plain"] * (1 + error),
            "predicted_speedup_ci": [x * (1 + error) for x in arm["speedup_vs_plain_ci"]],
            "step_ms": {"draft": 1.6, "target": 4.8, "other": 0.9, "wall": 7.3},
            "plain_step_ms": 4.5,
        }
        for arm in results["arms"][2:]
    ]
    configurations.sort(key=lambda each: -each["predicted_speedup"])
    return {
        "schema": "specdec-plan-2",
        "provenance": results["provenance"],
        "target": results["target"],
        "configurations": configurations,
        "choice": configurations[0],
        "runners_up": configurations[1:],
        "schedule": {"1": 12, "4": 4, "8": 0},
        "controller": {"drafter": "eagle3", "step_s": {"1": {"0": 0.004}}},
    }


def analysis(results):
    """An analysis of two drafters, one of them known by replay alone."""
    bins = [_bin(place) for place in range(10)]
    drafts = [
        {"tau": 1 + 0.8 * n**0.5, "tau_ci": None, "nodes_per_step": 0.9 * n, "children": "top"}
        for n in (1, 2, 4)
    ]
    place = {"alpha": 0.8, "acceptance": 0.8125, "count": 40}
    eagle3 = {
        "name": "eagle3",
        "type": "eagle3",
        "options": {},
        "method": "evidence",
        "alpha": 0.812,
        "alpha_ci": [0.79, 0.83],
        "configured": {
            "tau": 2.9,
            "tau_ci": [2.7, 3.1],
            "nodes_per_step": 3.9,
            "steps": [10.0, 10.0],
            "accepted_at": [16.2, 12.8, 9.0],
        },
        "not_configured_because": None,
        "per_depth_conditional": [0.81, 0.79, 0.703],
        "coverage": [[0.812, 0.1, 0.05], [0.77, 0.12, 0.04]],
        "calibration": {"bins": bins, "ece": 0.042},
        "entropy_bins": [{"low": 0.0, "high": 1.0, **place}, {"low": 1.0, "high": None, **place}],
        "token_classes": [{"name": "digit", **place}],
        "positions": [{"low": 1, "high": 2, **place}],
        "hardest": [HARDEST],
        "expected": {
            "chains": [{"length": n, **each} for n, each in zip((1, 2, 4), drafts, strict=True)],
            "trees": [{"nodes": n, "depth": 2, **drafts[1]} for n in (4, 8)],
            "thresholds": [{"threshold": 0.5, "tau": 1.5, "tau_ci": None, "nodes_per_step": 0.7}],
        },
    }
    ngram = {
        **eagle3,
        "name": "ngram",
        "type": "ngram",
        "method": "replay",
        "alpha": None,
        "alpha_ci": None,
        "configured": None,
        "not_configured_because": "rule typical has no expectation",
        "per_depth_conditional": [],
        "coverage": [],
        "calibration": None,
        "hardest": [],
        "expected": {"chains": [], "trees": [], "thresholds": []},
    }
    return {
        "schema": "specdec-analysis-1",
        "provenance": results["provenance"],
        "target": results["target"],
        "drafters": [eagle3, ngram],
    }


HARDEST = {
    "prompt": 2,
    "position": 17,
    "before": "if a < b & c:\n    print('<i>",
    "drafted": ["</p>_wrong_"],
    "target": "right",
    "p": 0.98,
    "q": 0.01,
    "overlap": 0.02,
}


def _bin(place):
    confidence = place / 10 + 0.05 if place else None
    return {
        "low": place / 10,
        "high": (place + 1) / 10,
        "count": 10 * place,
        "confidence": confidence,
        "acceptance": confidence and 0.9 * confidence,
    }


def suite(results):
    """A suite of one and four users."""
    groups = []
    for users in (1, 4):
        arms = []
        for arm in results["arms"]:
            if arm["name"] != "hf_generate":
                known = ("name", "tau", "tau_ci", "decode_tokens_per_s", "speedup_vs_plain")
                seconds = {"p50": 0.01, "p95": 0.02, "p99": 0.0315}
                arms.append(
                    {
                        **{key: arm[key] for key in known},
                        "requests": 8,
                        "failed": 0,
                        "ttft_s": seconds,
                        "itl_s": seconds,
                        "queue_s": seconds,
                        "memory": {"cache_bytes": 12_000_000},
                        "power": {"power_w": None},
                        "load": {"users": users, "tokens_per_s": 100.0, "jain_index": 0.97},
                    }
                )
        groups.append({"name": f"{users} users", "value": users, "arms": arms})
    return {
        "schema": "specdec-suite-2",
        "suite": "concurrent",
        "provenance": {k: results["provenance"][k] for k in ("device", "dtype", "threads")},
        "groups": groups,
    }


def estimate():
    """An estimate of two draft models."""
    lengths = [
        {
            "num_draft_tokens": n,
            "estimated_tau": 1 + 0.6 * n,
            "estimated_step_ms": 40.0 + n,
            "estimated_speedup": 1 + 0.2 * n,
            "estimated_tokens_per_s": 20.0 + n,
        }
        for n in range(4)
    ]
    drafter = {"batch_size": 1, "alpha": 0.7, "best": lengths[-1], "lengths": lengths}
    return {
        "schema": "specdec-estimate-1",
        "label": "estimate: nothing here was measured",
        "provenance": {"command": "specdec plan", "versions": {}},
        "assumptions": ["Weights are read once a forward."],
        "target": [{"batch_size": 1, "estimated_forward_ms": 40.0}],
        "drafters": [
            {"name": name, "estimated_draft_forward_ms": 1.5, **drafter} for name in ("1B", "8B")
        ],
    }


def write(folder, name, content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    return folder


def every_kind(folder):
    """Folders of a bench, a sweep, a plan with its analysis, a suite and an estimate."""
    results = bench()
    write(folder / "bench", "results.json", results)
    write(folder / "sweep", "sweep.json", sweep(folder / "sweep"))
    write(folder / "plan", "plan.json", plan(results))
    write(folder / "plan", "analysis.json", analysis(results))
    write(folder / "suite", "suite.json", suite(results))
    write(folder / "estimate", "estimate.json", estimate())
    return [folder / name for name in ("bench", "sweep", "plan", "suite", "estimate")]
