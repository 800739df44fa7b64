"""Runs inside vLLM's environment: one engine, and every call of its verifier judged twice.

The job on stdin: speculative config, prompts as ids, and `runs`, each with a rule (None: vLLM's
own verifier), a drafter for `custom_class`, and sampling. The last line printed is the answer: for
each run the tokens, the counters, and how often the two verifiers differed.
"""

import json
import os
import sys
from copy import copy

import torch
import vllm
from vllm.v1.sample import rejection_sampler

from specdec.integrations.vllm import Proposer, install

job = json.load(sys.stdin)
proposers, own, tally = [], rejection_sampler.rejection_sample, {}


def repaired(x, cu_num_tokens, num_tokens, replace_from=0, replace_to=0):
    """As the function of this name; the wheel's throws its output away (vllm#55005)."""
    x = torch.where(x == replace_from, replace_to, x)
    return x.repeat_interleave(torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1)))


def remember(proposer, config):
    proposers.append((proposer, config))
    make(proposer, config)


def judged_twice(*args, **options):
    """Both verifiers, from the same random numbers; ours is served."""
    generators = args[7].generators
    twins = copy(args[7])
    twins.generators = {row: g.clone_state() for row, g in generators.items()}
    state = torch.get_rng_state()
    theirs = own(*args[:7], twins, **options)
    torch.set_rng_state(state)
    found = ours(*args, **options)
    assert (found.shape, found.dtype) == (theirs.shape, theirs.dtype)
    tally["calls"] += 1
    tally["with_draft_probs"] += args[4] is not None
    tally["cells"] += found.numel()
    tally["differ"] += int((found != theirs).sum())
    return found


make, Proposer.__init__ = Proposer.__init__, remember
rejection_sampler.expand_batch_to_tokens = repaired
os.environ["SPECDEC_DRAFTER"] = json.dumps(job["runs"][0].get("drafter", ""))
engine = vllm.LLM(
    job["target"],
    dtype="float32",
    max_model_len=256,
    max_num_seqs=256,
    enforce_eager=True,
    enable_prefix_caching=False,
    disable_log_stats=False,
    speculative_config=job["speculative_config"],
)


def counters():
    found = {m.name: m for m in engine.get_metrics() if m.name.startswith("vllm:spec_decode")}
    single = [
        found[f"vllm:spec_decode_num_{n}"].value
        for n in ("drafts", "draft_tokens", "accepted_tokens")
    ]
    return [*single, *found["vllm:spec_decode_num_accepted_tokens_per_pos"].values]


answers = []
for run in job["runs"]:
    tally |= {"calls": 0, "with_draft_probs": 0, "cells": 0, "differ": 0}
    rejection_sampler.rejection_sample = own
    if run.get("rule"):
        os.environ["SPECDEC_VERIFIER"] = run["rule"]
        install()
        ours = rejection_sampler.rejection_sample
        assert ours is not own
        if run.get("compare", True):
            rejection_sampler.rejection_sample = judged_twice
    if "drafter" in run:
        os.environ["SPECDEC_DRAFTER"] = json.dumps(run["drafter"])
        for proposer, config in proposers:
            make(proposer, config)
    prompts = [{"prompt_token_ids": job["prompts"][index]} for index in run["prompts"]]
    sampling = [
        vllm.SamplingParams(**run["sampling"] | cold, seed=index)
        for index in range(len(prompts))
        for cold in [{"temperature": 0} if index in run.get("greedy", ()) else {}]
    ]
    before, size = counters(), run["batch_size"]
    outputs = []
    for start in range(0, len(prompts), size):
        part = slice(start, start + size)
        outputs += engine.generate(prompts[part], sampling[part], use_tqdm=False)
    answers.append(
        {
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "counters": [after - b for after, b in zip(counters(), before, strict=True)],
            **tally,
        }
    )
print("\n" + json.dumps(answers))
