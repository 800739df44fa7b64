"""A drafter keeps the target's output: its tokens, and above temperature 0 its distribution."""

from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch

from specdec.engine.decode import generate, generate_baseline, stream
from specdec.lossless.cases import SMALL_VOCAB, Case, case_of
from specdec.lossless.models import tiny_target
from specdec.sampling.config import SamplingConfig
from specdec.sampling.sampler import Sampler

PROMPTS = [[5, 6, 7, 8, 5, 6, 7], [3] * 12, [11, 12, 13, 11, 12], [60]]
HORIZON, NUM_SAMPLES = 4, 3000


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        given = metafunc.config.getoption("drafter")
        if not given:
            raise pytest.UsageError("--drafter is missing; give a type, as pkg.module:Class")
        metafunc.parametrize("case", [*map(case_of, given)], ids=given)


@pytest.fixture(scope="module")
def target() -> Any:
    return tiny_target()


@pytest.fixture(scope="module")
def small_target() -> Any:
    return tiny_target(SMALL_VOCAB, 1)


@pytest.fixture(scope="module")
def draft_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drafts")


@pytest.fixture(scope="module")
def small_vocab_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("small")


@pytest.fixture(scope="module")
def greedy(target: Any) -> Any:
    """Plain greedy decoding of PROMPTS and one that is nearly as long as the context."""
    prompts = [*PROMPTS, [5, 6, 7, 8] * (target.max_context_len // 4 - 4)]
    return prompts, generate_baseline(target, prompts, max_new_tokens=40)


def tokens_of(results: Any) -> list[list[int]]:
    return [result.tokens for result in results]


class EveryStepAnother:
    """Draft lengths that change with every step, off and on again."""

    def __init__(self, lengths: Any = (0, None, 60, None, None, 0, 0, 2, None, None)) -> None:
        self.lengths = lengths
        self.num_steps = 0

    def choose(self, batch_size: int) -> int | None:
        self.num_steps += 1
        chosen: int | None = self.lengths[self.num_steps % len(self.lengths)]
        return chosen

    def learn(self, records: Any) -> None:
        pass


def test_greedy_output_equals_plain_decoding(
    case: Case, target: Any, greedy: Any, draft_folder: Path
) -> None:
    drafter = case.build(target, draft_folder)
    prompts, plain = greedy
    drafted = generate(target, drafter, prompts, max_new_tokens=40)
    assert tokens_of(drafted) == tokens_of(plain)
    steps = [sum(result.stats.num_steps for result in results) for results in (drafted, plain)]
    is_accepted = steps[0] < steps[1]
    for rows in (1, 3):
        limited: dict[str, Any] = {"batch_size": rows, "draft_length": EveryStepAnother()}
        drafted = generate(target, drafter, prompts, max_new_tokens=40, **limited)
        assert tokens_of(drafted) == tokens_of(plain)
        is_accepted &= any(r.stats.num_accepted for r in drafted)
        assert 0 in {record.num_drafted for r in drafted for record in r.records}
    case.require("accepted", is_accepted, "nothing was ever accepted")


def decode_rows(target: Any, drafter: Any, temperature: float, batch_size: int | None) -> Any:
    full = target.max_context_len - 8  # leaves room for eight tokens only, so it ends first
    prompts = [[5, 6, 7, 8] * (full // 4), [9], [3] * 12, [11, 12, 13, 11, 12], [60] * 5]
    configs = [
        SamplingConfig(temperature=temperature, repetition_penalty=1.2 if s == 4 else 1, seed=s)
        for s in range(5)
    ]
    return generate(target, drafter, prompts, configs, max_new_tokens=24, batch_size=batch_size)


@pytest.fixture(scope="module")
def plain_rows(target: Any) -> Any:
    return decode_rows(target, None, 0.0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_row_decodes_as_if_alone(
    case: Case, temperature: float, target: Any, draft_folder: Path, plain_rows: Any
) -> None:
    drafter = case.build(target, draft_folder, case.alone)
    alone = decode_rows(target, drafter, temperature, 1) if temperature else plain_rows
    together, joined = (decode_rows(target, drafter, temperature, rows) for rows in (None, 3))
    assert [len(r.tokens) for r in alone] == [8, 24, 24, 24, 24]
    assert joined[3].records[0].batch_size == 3, "the fourth prompt waited for the whole batch"
    is_same = tokens_of(alone) == tokens_of(together) == tokens_of(joined)
    assert is_same or temperature, "a row's tokens depend on the rows beside it"
    unlike = "a row's drafts depend on other rows or on past outputs, and samples with them"
    case.require("alone", is_same, unlike)


def exact_distribution(target: Any, prompt: list[int], sampling: SamplingConfig) -> Any:
    """Probability of every sequence of HORIZON tokens under plain sampling, by enumeration."""
    sequences = list(product(range(SMALL_VOCAB), repeat=HORIZON))
    ids = torch.tensor([[*prompt, *sequence] for sequence in sequences])
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


def p_value(counts: Counter[tuple[int, ...]], exact: dict[tuple[int, ...], float]) -> float:
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
    return float(scipy.stats.power_divergence(observed, expected, lambda_="log-likelihood").pvalue)


ROOM = 12  # nodes of a draft


def sampled(
    target: Any, drafter: Any, prompt: list[int], sampling: SamplingConfig, **options: Any
) -> tuple[Counter[tuple[int, ...]], int]:
    """The first HORIZON tokens of many rows with room for whole drafts, and the depth judged."""
    counts, depth = Counter[tuple[int, ...]](), 0
    for first in range(0, NUM_SAMPLES, 1000):
        configs = [replace(sampling, seed=first + i) for i in range(1000)]
        run = stream(
            target, drafter, [prompt] * 1000, configs, max_new_tokens=HORIZON + ROOM, **options
        )
        num_tokens = Counter[int]()
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
def test_sampled_sequences_follow_target_distribution(
    case: Case, sampling: Any, lengths: Any, small_target: Any, small_vocab_folder: Path
) -> None:
    draft_length = EveryStepAnother(lengths) if lengths else None
    drafter = case.build(small_target, small_vocab_folder, case.narrow)
    prompt = [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    counts, depth = sampled(small_target, drafter, prompt, sampling, draft_length=draft_length)
    found = p_value(counts, exact_distribution(small_target, prompt, sampling))
    assert found > 1e-4, "samples do not follow the target's distribution"
    levels = min(3, drafter.max_nodes)
    case.require("deep", depth >= levels, f"no draft was judged {levels} levels deep")


@pytest.fixture(scope="module")
def matched(target: Any) -> Any:
    """One greedy row and sampled ones, decoded plainly."""
    configs = [SamplingConfig(temperature=0.8 * (s > 0), seed=s) for s in range(4)]
    return configs, generate_baseline(target, PROMPTS, configs, max_new_tokens=24)


def test_match_rule_keeps_every_sampled_token(
    case: Case, target: Any, matched: Any, draft_folder: Path
) -> None:
    drafter = case.build(target, draft_folder)
    configs, plain = matched
    drafted = generate(
        target, drafter, PROMPTS, configs, max_new_tokens=24, batch_size=3, rule="match"
    )
    assert tokens_of(drafted) == tokens_of(plain)
    is_accepted = any(r.stats.num_accepted for r in drafted)
    case.require("matched", is_accepted, "nothing was ever accepted")
