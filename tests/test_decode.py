"""The loop: stop rules, limits, streaming, ragged batches."""

import pytest
import torch
from engine_cases import breaking
from tiny_models import perturbed, tiny_llama, tiny_target

from specdec import SamplingConfig, generate, generate_baseline, stream
from specdec.drafters.draft_model import DraftModel
from specdec.engine.metrics import AcceptanceStats
from specdec.targets.hf import HFTarget

PROMPT = [5, 6, 7, 8]
PROMPTS = [PROMPT, [9] * 30, [1], list(range(20, 60))]


class LetterTokenizer:
    """Token t is the t-th character from "0" on, so that tests can read texts."""

    def __call__(self, text):
        return {"input_ids": [ord(letter) - 48 for letter in text]}

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(48 + token) for token in ids)

    def get_vocab(self):
        return {chr(48 + token): token for token in range(97)}


@pytest.fixture(scope="module")
def target():
    return HFTarget(tiny_llama(), LetterTokenizer())


@pytest.fixture(scope="module")
def drafter(target):
    return DraftModel(HFTarget(perturbed(tiny_llama(), 0.15), None), target.vocab_size, 4)


def plain_tokens(target, count, prompt=PROMPT):
    return generate_baseline(target, [prompt], max_new_tokens=count)[0].tokens


def test_rows_agree_with_single_runs(target, drafter):
    limits = [30, 9, 1, 2]
    expected = [plain_tokens(target, n, p) for p, n in zip(PROMPTS, limits, strict=True)]
    for batch_size in (None, 2):
        results = generate(target, drafter, PROMPTS, max_new_tokens=limits, batch_size=batch_size)
        assert [result.tokens for result in results] == expected
        assert [len(result.tokens) for result in results] == limits
        assert {result.finish_reason for result in results} == {"length"}
        for result in results:
            stats = result.stats
            assert len(result.tokens) == 1 + stats.num_accepted + stats.num_steps
            assert stats.accepted_length == pytest.approx(1 + sum(stats.acceptance_at_depth))


def test_twin_of_target_is_always_accepted(target):
    twin = DraftModel(HFTarget(tiny_llama(), None), target.vocab_size, 4)
    configs = [SamplingConfig(temperature=1.0, seed=seed) for seed in range(3)]
    for rule in ("match", "token"):
        results = generate(target, twin, PROMPTS[:3], configs, max_new_tokens=41, rule=rule)
        assert all(r.stats.num_accepted == r.stats.num_drafted > 0 for r in results)


def test_steps_give_all_tokens_then_reason(target, drafter):
    run = stream(target, drafter, PROMPTS[:3], max_new_tokens=12, batch_size=2)
    chunks = [chunk for step in run.steps() for chunk in step]
    for index, result in enumerate(run.results()):
        mine = [chunk for chunk in chunks if chunk.index == index]
        assert [token for chunk in mine for token in chunk.tokens] == result.tokens
        assert [chunk.finish_reason for chunk in mine] == [None] * (len(mine) - 1) + ["length"]


def test_first_end_of_sequence_token_ends_output(target, drafter, monkeypatch):
    tokens = plain_tokens(target, 20)
    eos = tokens[6]
    monkeypatch.setattr(target, "eos_token_ids", (eos,))
    result = generate(target, drafter, [PROMPT], max_new_tokens=20)[0]
    assert result.tokens == tokens[: tokens.index(eos) + 1]
    assert result.finish_reason == "eos"


def test_stop_string_ends_text_and_stream(target, drafter):
    text = target.tokenizer.decode(plain_tokens(target, 20))
    stop = text[9:12]
    chunks = list(stream(target, drafter, [PROMPT], max_new_tokens=20, stop=[stop]))
    result = generate(target, drafter, [PROMPT], max_new_tokens=20, stop=[stop])[0]
    expected = text[: text.index(stop)]
    assert "".join(chunk.text for chunk in chunks) == result.text == expected
    reasons = [chunk.finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + [result.finish_reason]
    assert result.finish_reason == "stop"


def test_plain_decoding_accepts_one_token_a_step(target):
    stats = generate_baseline(target, [PROMPT], max_new_tokens=9)[0].stats
    assert stats == AcceptanceStats(8, 0, 0, (), ())
    assert stats.accepted_length == 1.0


def test_context_ends_a_row(target, drafter):
    prompt = [5, 6, 7, 8] * 62 + [5]  # 249 of 256
    result = generate(target, drafter, [prompt], max_new_tokens=50)[0]
    assert len(result.tokens) == 256 - 249
    assert result.finish_reason == "length"
    assert result.tokens == plain_tokens(target, 50, prompt)


def test_seed_decides_samples(target, drafter):
    sampling = [{"temperature": 1.0, "seed": seed} for seed in (3, 3, 4)]
    first, again, other = generate(target, drafter, [PROMPT] * 3, sampling, max_new_tokens=20)
    assert first.tokens == again.tokens != other.tokens


def test_time_limit_keeps_finished_tokens(target, drafter):
    options = {"max_new_tokens": 50, "max_time_s": 1e-9, "batch_size": 1}
    results = generate(target, drafter, [PROMPT] * 3, **options)
    assert [result.finish_reason for result in results] == ["time"] * 3
    assert [result.tokens for result in results] == [plain_tokens(target, 1), [], []]


def test_interrupt_returns_finished_tokens(target, drafter, monkeypatch):
    breaking(monkeypatch, target, "score", 3, KeyboardInterrupt(), done=False)
    results = generate(target, drafter, [PROMPT, [1]], max_new_tokens=50, batch_size=1)
    assert [result.finish_reason for result in results] == ["interrupted", "interrupted"]
    assert results[0].tokens == plain_tokens(target, len(results[0].tokens))
    assert len(results[0].tokens) >= 3
    assert results[1].tokens == []


def test_nan_logits_raise_with_the_prompt(drafter):
    broken = tiny_target()
    with torch.no_grad():
        broken.model.lm_head.weight[3] = float("nan")
    with pytest.raises(FloatingPointError, match="prompt 0"):
        generate(broken, drafter, [PROMPT], max_new_tokens=5)


def test_parts_of_a_step_do_not_overlap(target, drafter):
    for record in generate(target, drafter, PROMPTS[:2], max_new_tokens=20)[0].records:
        parts = (record.draft_s, record.target_s, record.verify_s, record.commit_s)
        assert min(parts[1:]) > 0
        assert sum(parts) <= record.wall_s
