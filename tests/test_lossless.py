"""Every registered drafter keeps the target's output: a new one is checked without a new test."""

import pytest
import torch
from tiny_heads import save_tiny_head

from specdec import SamplingConfig
from specdec.lossless.cases import Case, with_paths
from specdec.lossless.test_lossless import *  # noqa: F403 (the tests and their fixtures)
from specdec.lossless.test_lossless import exact_distribution, p_value, sampled
from specdec.registry import DRAFTERS
from specdec.verify import RULES

# Random heads guess badly, so their trees are wide: something must be accepted.
WIDE = {"depth": 3, "width": 24, "max_nodes": 60}
SAMPLED = [[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0]]
DELAYED = {"stem": 1, "branches": 3, "depth": 3}
# Options that turn on what a drafter does not do by default.
VARIANTS: dict[str, list[dict]] = {
    "eagle": [
        WIDE,
        {"choices": [[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0]]},
        {**WIDE, "children": "without_replacement"},
        {"choices": SAMPLED, "children": "with_replacement"},
        {"choices": DELAYED, "children": "with_replacement"},
        {"width": 1, "depth": 3, "children": "with_replacement"},
    ],
    "eagle3": [
        WIDE,
        {"depth": 2, "width": 64, "max_nodes": 120, "window": 6},
        {**WIDE, "children": "without_replacement"},
        {**WIDE, "children": "with_replacement"},
    ],
    "hybrid": [
        {"drafters": [{"type": "ngram", "min_ngram": 1}, {"type": "eagle", **WIDE}]},
        {
            "drafters": [
                {"type": "suffix", "min_match": 1, "width": 2, "num_remembered": 0},
                {"type": "medusa", "max_nodes": 60},
                {"type": "draft_model", "width": 3, "max_nodes": 8},
            ],
            "max_nodes": 30,
            "calibrate": False,
        },
    ],
    "dflash": [
        {**WIDE, "window": 5},
        {**WIDE, "children": "with_replacement"},
    ],
    "mixture_of_attentions": [
        {**WIDE, "window": 6},
        {"choices": SAMPLED, "children": "with_replacement"},
    ],
    "mtp": [WIDE, {**WIDE, "children": "with_replacement"}],
    "peagle": [
        WIDE,
        {"choices": SAMPLED, "children": "with_replacement"},
    ],
    "medusa": [
        {"max_nodes": 60},
        {"choices": SAMPLED},
        {"max_nodes": 60, "width": 60},
        {"max_nodes": 40, "children": "without_replacement"},
        {"choices": SAMPLED, "children": "with_replacement"},
    ],
    "draft_model": [
        {},
        {"width": 3, "max_nodes": 8},
        {"confidence_threshold": 0.3},
        {"width": 3, "max_nodes": 8, "cache": "int4"},
    ],
    "ngram": [{"min_ngram": 1}, {"min_ngram": 1, "num_continuations": 3}],
}
# The option that keeps past outputs from changing later drafts.
FORGET = {"suffix": {"num_remembered": 0}, "hybrid": {"calibrate": False}}
ALL = {"accepted", "matched", "deep", "alone"}
# These random heads hardly ever guess what is sampled.
PROMISES = dict.fromkeys(("medusa", "peagle"), ALL - {"matched"})
# Trees that a small vocabulary fills, three levels deep within the nodes that a row may draft.
NARROW = {"depth": 3, "width": 3, "max_nodes": 12}


def narrow(options):
    """The options with trees that are no wider than needed for three levels."""
    options = {key: NARROW.get(key, value) for key, value in options.items()}
    if "drafters" in options:
        options["drafters"] = [narrow(inner) for inner in options["drafters"]]
    return options


def case(name, options):
    options = {"type": name, **options}
    alone = {**options, **FORGET.get(name, {})}
    return Case(options, alone, narrow(options), PROMISES.get(name, ALL))


# Name, options and id of every variant.
NAMED = [
    (name, options, f"{name}-{index}")
    for name in DRAFTERS
    for index, options in enumerate(VARIANTS.get(name, [{}]))
]
CASES = [pytest.param(case(name, options), id=each) for name, options, each in NAMED]


def resolved(name, options, folder, target):
    """The options with the paths of tiny checkpoints in them."""
    options = dict(options)
    if num_modules := options.pop("num_modules", None):
        options["path"] = save_tiny_head(folder / "modules", name, target, num_modules=num_modules)
    return with_paths({"type": name, **options}, target, folder)


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", CASES)


def with_heads(folder, target, **options):
    """A folder of drafts whose EAGLE-3 head reads three hidden states, not one three times.

    And whose block head draws a token behind the one before it.
    """
    top = target.config.num_hidden_layers
    taps = [0, top // 2, top]
    save_tiny_head(folder / "eagle3", "eagle3", target, taps=taps, **options)
    spark = {"markov": "gated", "confidence": True, "sample_from_anchor": True}
    save_tiny_head(folder / "dflash", "dflash", target, taps=taps, **spark)
    return folder


@pytest.fixture(scope="module")
def draft_folder(tmp_path_factory, target):
    return with_heads(tmp_path_factory.mktemp("drafts"), target)


@pytest.fixture(scope="module")
def small_vocab_folder(tmp_path_factory, small_target):
    return with_heads(tmp_path_factory.mktemp("small"), small_target)


def test_plain_decoding_equals_transformers_generate(target, greedy):
    for prompt, result in zip(*greedy, strict=True):
        theirs = target.model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=40, pad_token_id=0
        )
        room = target.max_context_len - len(prompt)
        assert result.tokens == theirs[0, len(prompt) :].tolist()[:room]


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if rule.lossless])
def test_lossless_rule_keeps_the_distribution(rule, small_target, small_vocab_folder):
    drafter = Case({"type": "draft_model"}).build(small_target, small_vocab_folder)
    prompt, sampling = [0, 1, 2], SamplingConfig(temperature=0.9)
    counts, depth = sampled(small_target, drafter, prompt, sampling, rule=rule)
    assert depth >= 3
    assert p_value(counts, exact_distribution(small_target, prompt, sampling)) > 1e-4


@pytest.mark.parametrize("rule", ["token", "traversal"])
def test_delayed_branches_keep_the_distribution(rule, small_target, small_vocab_folder):
    options = {"type": "eagle3", "choices": DELAYED, "children": "with_replacement"}
    drafter = Case(options).build(small_target, small_vocab_folder)
    prompt, sampling = [0, 1, 2], SamplingConfig(temperature=0.9)
    counts, depth = sampled(small_target, drafter, prompt, sampling, rule=rule)
    assert depth == 3
    assert p_value(counts, exact_distribution(small_target, prompt, sampling)) > 1e-4


def test_wrong_distribution_is_noticed(small_target):
    prompt, sampling = [0, 1, 2], SamplingConfig(temperature=0.8)
    counts, _ = sampled(small_target, None, prompt, sampling)
    wrong = exact_distribution(small_target, prompt, SamplingConfig(temperature=1.0))
    assert p_value(counts, wrong) < 1e-6
