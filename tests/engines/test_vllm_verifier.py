"""Inside vLLM: our verifier in the place of its own, and our drafters as its `custom_class`."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import scipy.stats
import torch
from transformers import AutoModelForCausalLM

from specdec import AcceptanceStats, generate, generate_baseline, load_drafter, load_target
from specdec.bench.prompts import load_prompts, render
from specdec.checkpoints import read_head
from specdec.checkpoints.layouts import write_head
from specdec.demo import demo_path
from specdec.engine.text import encode

PYTHON = Path(os.environ.get("SPECDEC_ENGINES_DIR", ".engines")) / "vllm" / "bin" / "python"
ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON.exists(), reason=f"no {PYTHON}: bash scripts/engines.sh vllm"),
]

NUM_PROMPTS, NUM_TOKENS, NUM_DRAFTED = 20, 64, 5
NUM_SAMPLES, TEMPERATURE, HORIZON = 4000, 0.6, 3
SAMPLED_PROMPT = 2  # a short one
EVERY = list(range(NUM_PROMPTS))
GREEDY = {"sampling": {"temperature": 0, "max_tokens": NUM_TOKENS}, "prompts": EVERY}
SAMPLED = {
    "sampling": {"temperature": TEMPERATURE, "max_tokens": HORIZON, "ignore_eos": True},
    "prompts": [SAMPLED_PROMPT] * NUM_SAMPLES,
    "batch_size": NUM_SAMPLES,
    "compare": False,
}
MIXED = {
    "sampling": {"temperature": TEMPERATURE, "max_tokens": NUM_TOKENS},
    "greedy": EVERY[::2],
    "prompts": EVERY,
    "batch_size": NUM_PROMPTS,
}
EAGLE3 = {"type": "eagle3", "depth": NUM_DRAFTED, "width": 1, "max_nodes": NUM_DRAFTED}
LOOKUPS = {
    "suffix": {"type": "suffix", "max_nodes": NUM_DRAFTED, "num_remembered": 0},
    "ngram": {"type": "ngram", "num_draft_tokens": NUM_DRAFTED},
    "hybrid": {"type": "hybrid", "drafters": ["ngram", "suffix"], "max_nodes": NUM_DRAFTED},
}


@pytest.fixture(scope="module")
def target():
    return load_target("demo")


@pytest.fixture(scope="module")
def prompts(target):
    chosen = load_prompts("demo", NUM_PROMPTS, None, 0)
    return [encode(render(prompt, target.tokenizer), target) for prompt in chosen]


@pytest.fixture(scope="module")
def plain(target, prompts):
    return [r.tokens for r in generate_baseline(target, prompts, max_new_tokens=NUM_TOKENS)]


def run_vllm(prompts, speculative_config, runs):
    """One engine in a process of its own; the answer to each run, by its name."""
    job = {
        "target": str(demo_path("target")),
        "speculative_config": speculative_config | {"num_speculative_tokens": NUM_DRAFTED},
        "prompts": prompts,
        "runs": list(runs.values()),
    }
    environment = {
        "PYTHONPATH": str(ROOT),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [PYTHON, Path(__file__).with_name("vllm_job.py")],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip(runs, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.fixture(scope="module")
def verifier(prompts, tmp_path_factory):
    """EAGLE-3, whose head draws its tokens where a row is sampled."""
    folder = tmp_path_factory.mktemp("head")
    write_head(read_head(str(demo_path("eagle3"))), folder, "eagle3")
    config = {
        "method": "eagle3",
        "model": str(folder),
        "draft_sample_method": "probabilistic",
    }
    runs = {
        "own": GREEDY | {"batch_size": NUM_PROMPTS},
        "single": GREEDY | {"batch_size": 1, "rule": "token"},
        "batched": GREEDY | {"batch_size": NUM_PROMPTS, "rule": "block"},
        "mixed": MIXED | {"rule": "token"},
        "token": SAMPLED | {"rule": "token"},
        "block": SAMPLED | {"rule": "block"},
    }
    return run_vllm(prompts, config, runs)


@pytest.fixture(scope="module")
def lookups(prompts):
    config = {"method": "custom_class", "model": "specdec.integrations.vllm.Proposer"}
    batched = GREEDY | {"batch_size": NUM_PROMPTS}
    return run_vllm(prompts, config, {n: batched | {"drafter": o} for n, o in LOOKUPS.items()})


def in_our_loop(target, options, prompts):
    """Counts as vLLM's /metrics makes them."""
    longer = NUM_TOKENS + NUM_DRAFTED
    results = generate(target, load_drafter(options, target), prompts, max_new_tokens=longer)
    records = [record for result in results for record in result.records]
    found = AcceptanceStats.as_engine("vllm", records, NUM_TOKENS)
    accepted_at = [*found.accepted_at, *[0] * NUM_DRAFTED][:NUM_DRAFTED]
    return [found.num_steps, found.num_drafted, found.num_accepted, *accepted_at]


def test_at_temperature_0_no_cell_text_or_counter_differs(verifier, target, prompts, plain):
    counts = in_our_loop(target, EAGLE3, prompts)
    for name, num_calls in (("own", 0), ("single", 100), ("batched", 10)):
        run = verifier[name]
        assert run["tokens"] == plain, name
        assert run["counters"] == counts, name
        assert run["differ"] == 0, name
        assert run["calls"] >= num_calls, name


def test_rows_of_both_kinds_in_one_batch(verifier, plain):
    """The repaired vLLM agrees from the same random numbers, but for ties in rounding."""
    assert verifier["mixed"]["differ"] <= 3
    assert verifier["mixed"]["with_draft_probs"] > 10
    assert verifier["mixed"]["tokens"][::2] == plain[::2]
    assert verifier["mixed"]["tokens"][1::2] != plain[1::2]


def law(prompt):
    """The target's probabilities of what it may say next, as far as they are worth a bin."""
    model = AutoModelForCausalLM.from_pretrained(demo_path("target"), dtype=torch.float32)
    found = {(): 1.0}
    for _ in range(HORIZON):
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *prefix] for prefix in found])).logits[:, -1]
        rows = torch.softmax(logits.double() / TEMPERATURE, 1)
        found = {
            (*prefix, token): before * row[token].item()
            for (prefix, before), row in zip(found.items(), rows, strict=True)
            for token in (before * row >= 5 / NUM_SAMPLES).nonzero().flatten().tolist()
        }
    return found


@pytest.mark.parametrize("rule", ["token", "block"])
def test_sampled_tokens_follow_the_target(verifier, prompts, rule):
    expected = law(prompts[SAMPLED_PROMPT])
    samples = [tuple(tokens) for tokens in verifier[rule]["tokens"]]
    observed = [samples.count(key) for key in expected]
    shares = [*expected.values(), 1 - sum(expected.values())]
    statistic = scipy.stats.chisquare(
        [*observed, NUM_SAMPLES - sum(observed)], [NUM_SAMPLES * share for share in shares]
    )
    assert len(expected) > 10
    assert verifier[rule]["counters"][2] > NUM_SAMPLES / 10  # accepted
    assert statistic.pvalue > 0.01


@pytest.mark.parametrize("name", LOOKUPS)
def test_lookups_are_served_as_in_our_loop(lookups, target, prompts, plain, name):
    assert lookups[name]["tokens"] == plain
    if name != "hybrid":  # it is a tree in our loop, a path of it here
        assert lookups[name]["counters"] == in_our_loop(target, LOOKUPS[name], prompts)
    assert lookups[name]["counters"][2] > 0
