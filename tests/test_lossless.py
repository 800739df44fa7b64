"""Every registered drafter keeps the target's output: a new one is checked without a new test."""

import inspect
from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import scipy.stats
import torch
from tiny_heads import save_tiny_head
from tiny_models import perturbed, tiny_target

from specdec import SamplingConfig, generate, generate_baseline, load_drafter, stream
from specdec.registry import DRAFTERS, head_kinds, strategy
from specdec.sampling.sampler import Sampler
from specdec.verify import RULES

PROMPTS = [[5, 6, 7, 8, 5, 6, 7], [3] * 12, [11, 12, 13, 11, 12], [60]]
HORIZON, SMALL_VOCAB, NUM_SAMPLES = 4, 5, 3000

# Random heads guess badly, so their trees are wide: something must be accepted.
WIDE = {"depth": 3, "width": 24, "max_nodes": 60}
SAMPLED = [[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0]]
# Options that turn on what a drafter does not do by default.
VARIANTS: dict[str, list[dict]] = {
    "eagle": [
        WIDE,
        {"choices": [[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0]]},
        {**WIDE, "children": "without_replacement"},
        {"choices": SAMPLED, "children": "with_replacement"},
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
    "medusa": [
        {"max_nodes": 60},
        {"choices": SAMPLED},
        {"max_nodes": 40, "children": "without_replacement"},
        {"choices": SAMPLED, "children": "with_replacement"},
    ],
    "draft_model": [{}, {"width": 3, "max_nodes": 8}, {"confidence_threshold": 0.3}],
    "ngram": [{"min_ngram": 1}, {"min_ngram": 1, "num_continuations": 3}],
}
CASES = [
    pytest.param(name, options, id=f"{name}-{index}")
    for name in DRAFTERS
    for index, options in enumerate(VARIANTS.get(name, [{}]))
]


# The option that keeps past outputs from changing later drafts.
FORGET = {"suffix": {"num_remembered": 0}, "hybrid": {"calibrate": False}}


def save_drafts(folder, target, amount):
    """A draft model and every kind of head, each in a folder of its own."""
    perturbed(target.model, amount).save_pretrained(folder / "draft_model")
    top = target.config.num_hidden_layers
    options = {"medusa": {}, "eagle": {}, "eagle3": {"taps": [0, top // 2, top]}}
    for kind in head_kinds():
        save_tiny_head(folder / kind, kind, target, **options[kind])
    return folder


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def small_target():
    return tiny_target(SMALL_VOCAB, 1)


@pytest.fixture(scope="module")
def draft_folder(tmp_path_factory, target):
    return save_drafts(tmp_path_factory.mktemp("drafts"), target, 0.15)


@pytest.fixture(scope="module")
def small_vocab_folder(tmp_path_factory, small_target):
    return save_drafts(tmp_path_factory.mktemp("small"), small_target, 0.3)


@pytest.fixture(scope="module")
def greedy(target):
    """Plain greedy decoding of PROMPTS and one that is nearly as long as the context."""
    prompts = [*PROMPTS, [5, 6, 7, 8] * (target.max_context_len // 4 - 4)]
    return prompts, generate_baseline(target, prompts, max_new_tokens=40)


def build(name, options, target, folder):
    return load_drafter(resolved(name, options, folder), target)


def resolved(name, options, folder):
    """The options with the paths of the tiny checkpoints in them."""
    parameters = inspect.signature(getattr(strategy(name), "load", strategy(name))).parameters
    path = {"path": str(folder / name)} if "path" in parameters else {}
    options = {"type": name, **path, **options}
    if "drafters" in options:
        inner = [{**item} for item in options["drafters"]]
        options["drafters"] = [resolved(item.pop("type"), item, folder) for item in inner]
    return options


def tokens_of(results):
    return [result.tokens for result in results]


def test_plain_decoding_equals_transformers_generate(target, greedy):
    for prompt, result in zip(*greedy, strict=True):
        theirs = target.model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=40, pad_token_id=0
        )
        room = target.max_context_len - len(prompt)
        assert result.tokens == theirs[0, len(prompt) :].tolist()[:room]


class EveryStepAnother:
    """Draft lengths that change with every step, off and on again."""

    def __init__(self, lengths=(0, None, 60, None, None, 0, 0, 2, None, None)):
        self.lengths = lengths
        self.num_steps = 0

    def choose(self, batch_size):
        self.num_steps += 1
        return self.lengths[self.num_steps % len(self.lengths)]

    def learn(self, records):
        pass


@pytest.mark.parametrize(("name", "options"), CASES)
def test_greedy_output_equals_plain_decoding(name, options, target, greedy, draft_folder):
    drafter = build(name, options, target, draft_folder)
    prompts, plain = greedy
    drafted = generate(target, drafter, prompts, max_new_tokens=40)
    assert tokens_of(drafted) == tokens_of(plain)
    steps = sum(result.stats.num_steps for result in drafted)
    assert steps < sum(result.stats.num_steps for result in plain), "nothing was ever accepted"
    for rows in (1, 3):
        limited = {"batch_size": rows, "draft_length": EveryStepAnother()}
        drafted = generate(target, drafter, prompts, max_new_tokens=40, **limited)
        assert tokens_of(drafted) == tokens_of(plain)
        assert any(r.stats.num_accepted for r in drafted), "nothing was ever accepted"
        assert 0 in {record.num_drafted for r in drafted for record in r.records}


def decode_rows(target, drafter, temperature, batch_size):
    full = target.max_context_len - 8  # leaves room for eight tokens only, so it ends first
    prompts = [[5, 6, 7, 8] * (full // 4), [9], [3] * 12, [11, 12, 13, 11, 12], [60] * 5]
    configs = [
        SamplingConfig(temperature=temperature, repetition_penalty=1.2 if s == 4 else 1, seed=s)
        for s in range(5)
    ]
    return generate(target, drafter, prompts, configs, max_new_tokens=24, batch_size=batch_size)


@pytest.fixture(scope="module")
def plain_rows(target):
    return decode_rows(target, None, 0.0, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_row_decodes_as_if_alone(name, options, temperature, target, draft_folder, plain_rows):
    # With shared memory of past outputs drafts differ, and with them the random numbers used.
    drafter = build(name, {**options, **FORGET.get(name, {})}, target, draft_folder)
    alone = decode_rows(target, drafter, temperature, 1) if temperature else plain_rows
    together, joined = (decode_rows(target, drafter, temperature, rows) for rows in (None, 3))
    assert tokens_of(alone) == tokens_of(together) == tokens_of(joined)
    assert [len(r.tokens) for r in alone] == [8, 24, 24, 24, 24]
    assert joined[3].records[0].batch_size == 3, "the fourth prompt waited for the whole batch"


def exact_distribution(target, prompt, sampling):
    """Probability of every sequence of HORIZON tokens under plain sampling, by enumeration."""
    sequences = list(product(range(SMALL_VOCAB), repeat=HORIZON))
    ids = torch.tensor([prompt + list(sequence) for sequence in sequences])
    with torch.no_grad():
        logits = target.model(input_ids=ids).logits[:, len(prompt) - 1 : -1]
    exact = torch.ones(len(sequences), dtype=torch.float64)
    sampler = Sampler([sampling] * len(ids), SMALL_VOCAB, None, [prompt] * len(ids), ())
    for position in range(HORIZON):
        token = ids[:, len(prompt) + position]
        probs = sampler.probs(sampler.scores(logits[:, position : position + 1]))[:, 0]
        exact *= probs.gather(1, token[:, None])[:, 0].double()
        sampler.observe(token[:, None])
    return dict(zip(sequences, exact.tolist(), strict=True))


def p_value(counts, exact):
    """Run a G-test; cells that are too rare for it are joined."""
    num_samples = sum(counts.values())
    common = [s for s, p in exact.items() if p * num_samples >= 5]
    impossible = [s for s in counts if exact[s] == 0]
    assert not impossible, f"sampled what the target cannot emit: {impossible[:3]}"
    observed = [counts[s] for s in common]
    expected = [exact[s] * num_samples for s in common]
    rest = num_samples - sum(expected)
    if rest > 1e-6 * num_samples:
        observed.append(num_samples - sum(observed))
        expected.append(rest)
    scale = sum(observed) / sum(expected)
    expected = [value * scale for value in expected]
    return scipy.stats.power_divergence(observed, expected, lambda_="log-likelihood").pvalue


# Trees that a small vocabulary fills, three levels deep within the nodes that a row may draft.
NARROW = {"depth": 3, "width": 3, "max_nodes": 12}
ROOM = 12


def narrow(options):
    """The options with trees that are no wider than needed for three levels."""
    options = {key: NARROW.get(key, value) for key, value in options.items()}
    if "drafters" in options:
        options["drafters"] = [narrow(inner) for inner in options["drafters"]]
    return options


def sampled(target, drafter, prompt, sampling, **options):
    """The first HORIZON tokens of many rows with room for whole drafts, and the depth judged."""
    counts, depth = Counter(), 0
    for first in range(0, NUM_SAMPLES, 1000):
        configs = [replace(sampling, seed=first + i) for i in range(1000)]
        run = stream(
            target, drafter, [prompt] * 1000, configs, max_new_tokens=HORIZON + ROOM, **options
        )
        num_tokens = Counter()
        for chunks in run.steps():
            num_tokens.update({chunk.index: len(chunk.tokens) for chunk in chunks})
            if min(num_tokens.values()) >= HORIZON:
                break
        results = run.results()
        counts.update(tuple(result.tokens[:HORIZON]) for result in results)
        judged = (record.depth_tested for result in results for record in result.records)
        depth = max(depth, *judged)
    return counts, depth


SETTINGS = [
    SamplingConfig(temperature=1.0),
    SamplingConfig(temperature=0.7, top_p=0.9, repetition_penalty=1.3, frequency_penalty=0.2),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampling", "lengths"),
    [(SETTINGS[1], ()), (SETTINGS[0], (1, 12, 12, 0))],  # most of these are whole drafts
    ids=["penalties", "changing length"],
)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_sampled_sequences_follow_target_distribution(
    name, options, sampling, lengths, small_target, small_vocab_folder
):
    draft_length = EveryStepAnother(lengths) if lengths else None
    drafter = build(name, narrow(options), small_target, small_vocab_folder)
    prompt = [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    counts, depth = sampled(small_target, drafter, prompt, sampling, draft_length=draft_length)
    assert depth >= 3, "no draft was judged three levels deep"
    assert p_value(counts, exact_distribution(small_target, prompt, sampling)) > 1e-4


@pytest.mark.parametrize(("name", "options"), CASES)
def test_match_rule_keeps_every_sampled_token(name, options, target, matched, draft_folder):
    drafter = build(name, options, target, draft_folder)
    configs, plain = matched
    drafted = generate(
        target, drafter, PROMPTS, configs, max_new_tokens=24, batch_size=3, rule="match"
    )
    assert tokens_of(drafted) == tokens_of(plain)
    # Random Medusa heads never guess what is sampled.
    assert name == "medusa" or any(r.stats.num_accepted for r in drafted), "nothing was accepted"


@pytest.fixture(scope="module")
def matched(target):
    """One greedy row and sampled ones, decoded plainly."""
    configs = [SamplingConfig(temperature=0.8 * (s > 0), seed=s) for s in range(4)]
    return configs, generate_baseline(target, PROMPTS, configs, max_new_tokens=24)


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if rule.lossless])
def test_lossless_rule_keeps_the_distribution(rule, small_target, small_vocab_folder):
    drafter = build("draft_model", {}, small_target, small_vocab_folder)
    prompt, sampling = [0, 1, 2], SamplingConfig(temperature=0.9)
    counts, depth = sampled(small_target, drafter, prompt, sampling, rule=rule)
    assert depth >= 3
    assert p_value(counts, exact_distribution(small_target, prompt, sampling)) > 1e-4


def test_wrong_distribution_is_noticed(small_target):
    prompt, sampling = [0, 1, 2], SamplingConfig(temperature=0.8)
    counts, _ = sampled(small_target, None, prompt, sampling)
    wrong = exact_distribution(small_target, prompt, SamplingConfig(temperature=1.0))
    assert p_value(counts, wrong) < 1e-6
