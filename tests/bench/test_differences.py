"""Greedy outputs that differ: an error in float32, a near tie to report in half precision."""

import pytest
import torch
from tiny_models import tiny_target

from specdec import generate_baseline
from specdec.bench.config import BenchConfig, SamplingOptions
from specdec.bench.measure import Run
from specdec.bench.summary import find_differences
from specdec.bench.workloads import Request

IDS = [[3, 4, 5], [8, 9]]
REQUESTS = [Request(str(i), "", ids, 8, 0) for i, ids in enumerate(IDS)]


def compare(change, **settings):
    """Differences of three arms, where `change` alters the tokens of the last one."""
    target, sampling = tiny_target(), SamplingOptions(**settings)
    rows = generate_baseline(target, IDS, sampling.with_seed(0), max_new_tokens=8)
    runs = [[Run(row.tokens, 1, 0.1, 0.1)] for row in rows]
    changed = [[Run(change(i, run.tokens), 1, 0.1, 0.1)] for i, (run,) in enumerate(runs)]
    tables = {"plain": runs, "hf_generate": runs, "ngram": changed}
    found = find_differences(REQUESTS, tables, BenchConfig(sampling=sampling), target)
    assert found["plain"] == found["hf_generate"] == []
    return target, [row.tokens for row in rows], found["ngram"]


def test_equal_outputs_have_no_differences():
    assert compare(lambda i, tokens: tokens)[2] == []


def test_difference_names_place_and_logit_gap():
    def change(index, tokens):
        return tokens if index == 0 else [*tokens[:5], (tokens[5] + 1) % 97, *tokens[6:]]

    target, tokens, (difference,) = compare(change)
    assert (difference.prompt, difference.against, difference.position) == (1, "plain", 5)
    with torch.no_grad():
        logits = target.model(torch.tensor([IDS[1] + tokens[1][:5]])).logits[0, -1]
    best = logits.topk(2).values
    assert difference.top2_gap == pytest.approx(float(best[0] - best[1]), rel=1e-4)


def test_output_that_ends_early_differs_where_it_ends():
    found = compare(lambda i, tokens: tokens[: 3 + i])[2]
    assert [(each.prompt, each.position) for each in found] == [(0, 3), (1, 4)]


def test_gap_is_of_the_penalized_logits():
    def change(index, tokens):
        return [*tokens[:4], 0]

    gaps = [compare(change, presence_penalty=each)[2][0].top2_gap for each in (-50.0, 0.0)]
    assert gaps[0] != pytest.approx(gaps[1])


def test_sampled_outputs_are_not_compared():
    assert compare(lambda i, tokens: [0], temperature=1.0)[2] == []


def test_quantized_cache_is_not_held_against_transformers():
    runs = {name: [[Run([n], 1, 0.1, 0.1)]] for n, name in enumerate(("plain", "hf_generate"))}
    tables = {**runs, "ngram": runs["plain"], "other": runs["hf_generate"]}
    for cache, differ in (("none", set(tables)), ("int8", {"other"})):
        config = BenchConfig(target={"cache": cache})
        found = find_differences(REQUESTS[:1], tables, config, None)
        assert {name for name in found if found[name]} == differ
