"""Predictions hold against the loop: every drafter of the demo, six draft shapes of each."""

from itertools import product

import pytest
import yaml

from specdec import SamplingConfig, generate, load_drafter, load_target
from specdec.analysis import predict
from specdec.analysis.predict import Predictor
from specdec.analysis.texts import Text, prompt_ids, target_answers
from specdec.bench.config import load_config
from specdec.common.stats import tau_interval
from specdec.engine.metrics import AcceptanceStats

pytestmark = pytest.mark.slow

NUM_PROMPTS, NUM_NEW = 3, 16
GREEDY = SamplingConfig()
SETTINGS = [SamplingConfig(temperature=1), SamplingConfig(temperature=0.8, top_p=0.9)]
HEAD = """
  - {depth: 2, width: 1}
  - {depth: 6, width: 1}
  - {choices: [[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0]]}
  - {depth: 5, width: 2, max_nodes: 7}
  - {depth: 4, width: 1, children: with_replacement}
  - {depth: 3, width: 3, max_nodes: 9, children: with_replacement}
"""
SHAPES = yaml.safe_load(f"""
ngram: [{{num_draft_tokens: 2}}, {{num_draft_tokens: 4}}, {{num_draft_tokens: 8}},
  {{num_draft_tokens: 8, min_ngram: 1}}, {{num_continuations: 2}},
  {{num_continuations: 3, min_ngram: 1, max_nodes: 6}}]
suffix: [{{max_nodes: 2}}, {{max_nodes: 4}}, {{max_nodes: 8}}, {{max_nodes: 8, min_match: 1}},
  {{width: 2}}, {{width: 3, min_match: 1, max_nodes: 6}}]
draft_model: [{{path: demo, num_draft_tokens: 1}}, {{path: demo, num_draft_tokens: 3}},
  {{path: demo, num_draft_tokens: 6}}, {{path: demo, num_draft_tokens: 4, width: 2}},
  {{path: demo, num_draft_tokens: 8, confidence_threshold: 0.4}},
  {{path: demo, num_draft_tokens: 3, width: 3, max_nodes: 6}}]
medusa: [{{max_nodes: 1}}, {{max_nodes: 6}}, {{max_nodes: 12}},
  {{choices: [[0], [0, 0], [0, 0, 0]]}}, {{max_nodes: 8, children: with_replacement}},
  {{choices: [[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0]]}}]
eagle: {HEAD}
eagle3: {HEAD}
dflash: {HEAD}
""")
SHAPES["mtp"] = [{"path": "demo", **shape} for shape in SHAPES["eagle3"]]
SHAPES["hybrid"] = [
    {"drafters": [{"type": lookup}, {"type": "eagle3", **SHAPES["eagle3"][index]}], "max_nodes": n}
    for lookup in ("ngram", "suffix")
    for index, n in ((0, 4), (1, 10), (3, 8))
]
CASES = [
    pytest.param({"type": name, **shape}, id=f"{name}-{index}")
    for name, shapes in SHAPES.items()
    for index, shape in enumerate(shapes)
]


def sampled_shapes(name):
    """The options of a drafter whose drafts are drawn from a distribution."""

    def is_sampled(options):
        if name == "draft_model":
            return options.get("width", 1) == 1
        return options.get("children", "top") != "top"

    return [{"type": name, **options} for options in SHAPES[name] if is_sampled(options)]


@pytest.fixture(scope="module")
def target():
    return load_target("demo")


@pytest.fixture(scope="module")
def prompts(target):
    config = load_config("demo", [f"prompts.num={NUM_PROMPTS}"])
    return prompt_ids(config, target, lambda *progress: None)[1]


@pytest.fixture(scope="module")
def greedy(target, prompts):
    """The predictor along the target's greedy answers."""
    return Predictor(target, target_answers(target, prompts, GREEDY, NUM_NEW), GREEDY)


def measured(target, prompts, options, sampling):
    """The loop's acceptance by prompt, and its texts."""
    results = generate(
        target,
        load_drafter(options, target),
        prompts,
        sampling,
        max_new_tokens=NUM_NEW,
        # A drafter with a memory is replayed text by text.
        batch_size=1 if options["type"] in ("suffix", "hybrid") else len(prompts),
    )
    texts = [Text(result.prompt_tokens, result.tokens, NUM_NEW) for result in results]
    return [result.stats for result in results], texts


def tau(stats):
    return 1 + sum(each.num_accepted for each in stats) / sum(each.num_steps for each in stats)


def test_every_drafter_of_the_demo_is_here():
    assert {arm.type for arm in load_config("demo").arms} == set(SHAPES)
    assert all(len(shapes) == 6 for shapes in SHAPES.values())


@pytest.mark.parametrize("options", CASES)
def test_greedy_steps_are_the_predicted_ones(options, target, prompts, greedy):
    stats, _ = measured(target, prompts, options, GREEDY)
    found = greedy.predict(options)
    assert found.steps == pytest.approx([each.num_steps for each in stats])
    assert found.tau == pytest.approx(tau(stats))


@pytest.mark.parametrize("name", [name for name in SHAPES if sampled_shapes(name)])
def test_sampled_drafts_take_the_expected_steps(name, target, prompts, monkeypatch):
    # Each pass serves one shape: it need not look further.
    monkeypatch.setattr(predict, "MIN_DEPTH", 1)
    monkeypatch.setattr(predict, "MIN_SIBLINGS", 1)
    luck = []
    for options, sampling in product(sampled_shapes(name), SETTINGS):
        stats, texts = measured(target, prompts * 4, options, sampling)
        found = Predictor(target, texts, sampling).predict(options)
        low, high = tau_interval(stats)
        is_near = abs(found.tau / tau(stats) - 1) <= 0.02
        assert is_near or low <= found.tau <= high, (options, sampling)
        luck += [each.num_steps - steps for each, steps in zip(stats, found.steps, strict=True)]
    # Given its text, a row's steps are what is expected and luck, which is another row's neither.
    assert abs(sum(luck)) <= 3 * sum(each**2 for each in luck) ** 0.5


def test_predictions_along_plain_texts_hold_on_average(target, prompts):
    """Other texts than the loop's, the same distribution: only means can agree."""
    sampling = SETTINGS[0]
    many = [prompt for prompt in prompts for _ in range(8)]
    options = {"type": "draft_model", "path": "demo", "num_draft_tokens": 3}
    results = generate(
        target,
        load_drafter(options, target),
        many,
        SamplingConfig(temperature=1, seed=1000),
        max_new_tokens=NUM_NEW,
    )
    stats = AcceptanceStats.from_records(record for each in results for record in each.records)
    texts = target_answers(target, many, sampling, NUM_NEW)
    found = Predictor(target, texts, sampling).predict(options)
    low, high = found.tau_interval()
    margin = (high - low) / 2
    assert stats.accepted_length == pytest.approx(found.tau, abs=2 * margin)
    assert margin < 0.3
