"""The embedded heads: they draft well for the demo target, and change nothing of what it says."""

from collections import Counter

import pytest
import scipy.stats

from specdec import SamplingConfig, generate, generate_baseline, load_drafter, load_target
from specdec.bench.config import load_config
from specdec.bench.prompts import load_prompts, render
from specdec.checkpoints import check_target, identify_target, read_head
from specdec.demo import demo_path
from specdec.registry import head_kinds

pytestmark = pytest.mark.slow

NOT_EMBEDDED = {"mixture_of_attentions", "peagle"}
HORIZON, NUM_SAMPLES = 4, 400
PROMPT = 2
HEADS = [
    {"type": "medusa"},
    {"type": "eagle", "depth": 4, "width": 3, "max_nodes": 10},
    {"type": "eagle", "depth": 3, "width": 3, "max_nodes": 8, "children": "without_replacement"},
    {"type": "eagle3", "depth": 4, "width": 3, "max_nodes": 10},
    {"type": "eagle3", "depth": 4, "width": 1, "children": "with_replacement"},
    {"type": "mtp", "path": "demo", "depth": 3, "width": 2, "max_nodes": 6},
    {"type": "dflash", "width": 3, "max_nodes": 10},
    {"type": "dflash", "width": 1, "children": "with_replacement"},
    {
        "type": "hybrid",
        "drafters": [{"type": "suffix", "min_match": 1}, {"type": "eagle3", "width": 2}],
    },
]


@pytest.fixture(scope="module")
def target():
    return load_target("demo")


@pytest.fixture(scope="module")
def prompts(target):
    return [render(prompt, target.tokenizer) for prompt in load_prompts("demo", 6, None, 0)]


@pytest.fixture(scope="module")
def plain(target, prompts):
    return generate_baseline(target, prompts, max_new_tokens=32)


def sampled(target, prompt, seed, drafter=None):
    sampling = SamplingConfig(
        temperature=0.9, top_p=0.9, repetition_penalty=1.2, frequency_penalty=0.1, seed=seed
    )
    batch = [prompt] * NUM_SAMPLES
    return generate(target, drafter, batch, sampling, max_new_tokens=HORIZON, batch_size=100)


@pytest.fixture(scope="module")
def plain_samples(target, prompts):
    # Other random numbers than a drafter's, so the two samples are independent.
    return sampled(target, prompts[PROMPT], 100_005)


@pytest.mark.parametrize("kind", sorted({*head_kinds()} - NOT_EMBEDDED))
def test_embedded_head_knows_target_and_training(kind, target):
    head = read_head(str(demo_path(kind)))
    assert head.kind == kind
    assert head.target is not None
    assert None not in (head.target.weights, head.target.tokenizer)
    check_target(head, identify_target(target))
    assert head.training["tokens"] > 1e5  # of the last of its trainings
    assert head.training["acceptance_by_rank"][0][0] > 0.5


@pytest.mark.parametrize("options", HEADS, ids=str)
def test_greedy_text_is_targets_in_fewer_steps(options, target, prompts, plain):
    ours = generate(target, load_drafter(options, target), prompts, max_new_tokens=32)
    assert [r.tokens for r in ours] == [r.tokens for r in plain]
    steps = [sum(r.stats.num_steps for r in results) for results in (ours, plain)]
    assert steps[0] < 0.6 * steps[1]


@pytest.mark.parametrize("options", HEADS, ids=str)
def test_sampled_tokens_follow_target_distribution(options, target, prompts, plain_samples):
    ours = sampled(target, prompts[PROMPT], 5, load_drafter(options, target))
    assert sum(result.stats.num_accepted for result in ours) > NUM_SAMPLES / 10
    for length in (1, 2, 3, HORIZON):
        counts = [Counter(tuple(r.tokens[:length]) for r in rows) for rows in (ours, plain_samples)]
        common = [key for key in counts[1] if counts[0][key] + counts[1][key] >= 10]
        table = [
            [count[key] for key in common] + [NUM_SAMPLES - sum(count[key] for key in common)]
            for count in counts
        ]
        table = [column for column in zip(*table, strict=True) if sum(column)]
        if len(table) > 1:
            assert scipy.stats.chi2_contingency(table).pvalue > 1e-4


def test_the_demo_compares_every_drafter():
    from specdec.registry import DRAFTERS

    assert {arm.type for arm in load_config("demo").arms} == set(DRAFTERS) - NOT_EMBEDDED
    for kind in NOT_EMBEDDED:
        with pytest.raises(ValueError, match=f"drafter '{kind}' needs the option 'path'"):
            load_drafter(kind, load_target("demo"))
