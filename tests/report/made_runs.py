"""Folders of runs as the commands write them, cut from the committed results of experiments."""

import json
from copy import deepcopy
from functools import cache
from pathlib import Path

from specdec.analysis.results import Analysis
from specdec.common.provenance import MachineProvenance
from specdec.planning.roofline import estimate, load_hardware
from specdec.report.runs import MODELS, Run
from specdec.train.results import TrainResults

ROOT = Path(__file__).parents[2]
ARMS = {
    "plain": "plain",
    "hf_generate": "hf_generate",
    "eagle3 chain 4": "eagle3 chain 4",
    "eagle3 6-3-12": "eagle3 tree",
    "ngram": "ngram <b>&amp;</b>",
}
SHAPES = [f"eagle3 {shape}" for shape in ("3-2-6", "4-2-6", "6-2-6", "3-3-12", "4-3-12", "6-3-12")]
CHAINS = [f"eagle3 chain {length}" for length in (2, 4, 6)]


@cache
def _committed(name):
    return json.loads((ROOT / "experiments" / name).read_text())


def bench(name="11-prediction/same.json", arms=ARMS):
    """The content of a results.json with two shapes of a head and a name that looks like markup."""
    content = deepcopy(_committed(name))
    for part in (content, content["provenance"]["config"]):
        kept = [arm for arm in part["arms"] if arm["name"] in arms]
        part["arms"] = [arm | {"name": arms[arm["name"]]} for arm in kept]
    return content


def faster(results, factor):
    """The same bench, but every drafting arm decoded its prompts in less time."""
    found = deepcopy(results)
    for arm in found["arms"][2:]:
        for figures in arm["per_prompt"]:
            figures["decode_s"] /= factor
    return found


def sweep(folder):
    """A sweep over shapes at two temperatures, with its cells; returns its content."""
    names = ("plain", "hf_generate", *SHAPES, *CHAINS)
    cells = []
    for temperature in (0.0, 1.0):
        results = bench("06-shapes/results.json", {name: name for name in names})
        results["provenance"]["config"]["sampling"]["temperature"] = temperature
        name = f"temperature={temperature:g}"
        write(folder / "cells" / name, "results.json", results)
        settings = {"sampling.temperature": temperature}
        cell = {"name": name, "settings": settings, "folder": f"cells/{name}", "error": None}
        cells.append({**cell, "arms": results["arms"]})
    known = ("command", "git_commit", "git_dirty", "versions", "date")
    where = {key: results["provenance"][key] for key in known}
    return {"schema": "specdec-sweep-2", "provenance": where, "cells": cells}


def plan():
    """A plan of the machine and the target of `bench`, cut to its arms and the runners-up."""
    content = deepcopy(_committed("11-prediction/plan.json"))
    runners_up = [each["name"] for each in content["runners_up"]]
    kept = [*ARMS, content["choice"]["name"], *runners_up]
    content["configurations"] = [c for c in content["configurations"] if c["name"] in kept]
    return content


def suite(name="concurrent"):
    """A suite's first two groups."""
    content = deepcopy(_committed(f"12-serving/{name}.json"))
    del content["groups"][2:]
    return content


def roofline():
    """An estimate of the packaged recipe's hardware."""
    found = estimate(load_hardware(str(ROOT / "recipes" / "roofline-70b.yaml"), []))
    return found.model_dump(mode="json", by_alias=True)


HARDEST = {
    **{"prompt": 3, "position": 7, "before": "It ends </p>_wrong_ ", "drafted": ["<i>here</i>"]},
    **{
        "target": "<script>document.title = 'prompt'</script>",
        "p": 0.9,
        "q": 0.001,
        "overlap": 0.02,
    },
}


def analysis():
    """An analysis of two drafters, one of them known by replay alone."""
    figures = {"tau_ci": None, "nodes_are_exact": True, "children": "top"}
    drafts = [{**figures, "tau": 1 + 0.8 * n**0.5, "nodes_per_step": 0.9 * n} for n in (1, 2, 4)]
    chains = [draft | {"length": n} for n, draft in zip((1, 2, 4), drafts, strict=True)]
    trees = [drafts[0] | {"nodes": 4, "depth": 2, "choices": []}]
    place = {"alpha": 0.8, "acceptance": 0.8125, "count": 40}
    known = {
        **{"name": "eagle3", "type": "eagle3", "options": {}, "method": "evidence"},
        **{"alpha": 0.812, "alpha_ci": [0.79, 0.83]},
        "configured": {
            **{"tau": 2.9, "tau_ci": [2.7, 3.1], "nodes_per_step": 3.9, "nodes_are_exact": True},
            **{"tokens": [29.0, 29.0], "steps": [10.0, 10.0]},
            **{"accepted_at": [16.2, 12.8, 9.0], "tested_at": [20.0, 16.2, 12.8]},
        },
        "per_depth_conditional": [0.81, 0.79, 0.703],
        "coverage": [[0.812, 0.1, 0.05], [0.77, 0.12, 0.04]],
        "calibration": {"bins": [_bin(place) for place in range(10)], "ece": 0.042},
        "entropy_bins": [{"low": 0.0, "high": 1.0, **place}, {"low": 1.0, "high": None, **place}],
        "token_classes": [{"name": "digit", **place}],
        "positions": [{"low": 1, "high": 2, **place}],
        "hardest": [HARDEST],
        "expected": {"chains": chains, "trees": trees, "thresholds": []},
    }
    replayed = {
        **{"name": "suffix", "type": "suffix", "options": {}, "method": "replay"},
        **{"configured": known["configured"], "per_depth_conditional": [0.5]},
        **{"calibration": None, "entropy_bins": [], "token_classes": [], "positions": []},
    }
    results = bench()
    prompts = [prompt | {"new_tokens": 20} for prompt in results["prompts"]]
    where = results["provenance"] | {"text": None}
    del where["processes"]
    content = {
        "schema": "specdec-analysis-1",
        **{"provenance": where, "target": results["target"]},
        **{"prompts": prompts, "drafters": [known, replayed], "left_out": []},
    }
    return Analysis.read(content).model_dump(mode="json", by_alias=True)


def _bin(place):
    sure = place / 10 + 0.05 if place else None
    ends = {"low": place / 10, "high": (place + 1) / 10, "count": 10 * place}
    return ends | {"confidence": sure, "acceptance": sure and 0.9 * sure}


def training():
    """A training of a draft model whose gate passed."""
    where, target = bench()["provenance"], bench()["target"]
    where = {key: value for key, value in where.items() if key in MachineProvenance.model_fields}
    where["config"] = {
        **{"target": {"path": "demo"}, "drafter": {"kind": "draft_model", "options": {}}},
        **{"data": {"path": "answers"}, "training": {"max_steps": 2}},
    }
    gate = {
        **{"shape": "chain of 5 tokens", "num_prompts": 5, "max_new_tokens": 64},
        **{"predicted_tau": 2.0, "predicted_tau_ci": [1.7, 2.5], "predicted_acceptance": [0.5]},
        **{"measured_tau": 2.01, "measured_tau_ci": [1.7, 2.5], "measured_acceptance": [0.5]},
        **{"relative_difference": 0.005, "max_difference": 0.05, "mismatches": 0, "passed": True},
    }
    content = {
        **{"schema": "specdec-train-3", "provenance": where, "target": target, "steps": 2},
        **{"drafter": {"type": "draft_model", "path": "out/drafter"}, "steps_per_epoch": 2},
        **{"rows": 16, "validation_rows": 5, "dropped_rows": 0, "tokens": 900, "loss": 0.65},
        **{"answer_tokens": 300, "seconds": 4.4, "tokens_per_s": 210.0, "num_processes": 1},
        **{"parameters": 1000, "validation_loss": 0.7, "offline_tau": 1.98, "parity": gate},
        **{"offline_acceptance": [0.56, 0.45], "alpha": {"0": 0.56, "1": 0.61}},
        **{"acceptance_by_rank": None, "domains": None, "draft_vocabulary": None},
    }
    found = TrainResults.model_validate_json(json.dumps(content))
    return found.model_dump(mode="json", by_alias=True)


TRAINING_LOG = """{"kind": "step", "step": 1, "loss": 1.2}
{"kind": "step", "step": 2, "loss": 0.65}
{"kind": "evaluation", "step": 2, "validation_loss": 0.7, "acceptance": [0.56, 0.45], "tau": 1.98}
"""


def run(content, label="a", kind="bench"):
    return Run(kind, label, Path(label), MODELS[kind].read(deepcopy(content)))


def holder(content, place):
    """The part of a content that holds a dotted place, and its key there."""
    *path, key = (int(part) if part.isdigit() else part for part in place.split("."))
    for part in path:
        content = content[part]
    return content, key


def changed(place, value, content=None):
    """A copy of a content, by default that of a bench, with another value at a dotted place."""
    found = bench() if content is None else deepcopy(content)
    part, key = holder(found, place)
    part[key] = value
    return found


def write(folder, name, content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    return folder


def every_kind(folder):
    """Folders of a bench, a sweep, a plan with its analysis, a suite, an estimate, a training."""
    write(folder / "bench", "results.json", bench())
    write(folder / "sweep", "sweep.json", sweep(folder / "sweep"))
    write(folder / "plan", "plan.json", plan())
    write(folder / "plan", "analysis.json", analysis())
    write(folder / "suite", "suite.json", suite())
    write(folder / "estimate", "estimate.json", roofline())
    write(folder / "train", "results.json", training())
    (folder / "train" / "log.jsonl").write_text(TRAINING_LOG)
    return [folder / name for name in ("bench", "sweep", "plan", "suite", "estimate", "train")]
