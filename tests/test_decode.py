"""The loop: stop rules, limits, streaming, ragged batches, bad input."""

import pytest
import torch
from tiny_models import perturbed, tiny_llama, tiny_target

from specdec import SamplingConfig, generate, generate_baseline, load_drafter, stream
from specdec.drafters.draft_model import DraftModel
from specdec.engine.metrics import AcceptanceStats
from specdec.targets.hf import HFTarget

PROMPT = [5, 6, 7, 8]


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


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_exactly_max_new_tokens_are_emitted(target, drafter, count):
    result = generate(target, drafter, [PROMPT], max_new_tokens=count)[0]
    assert result.tokens == plain_tokens(target, count)
    assert result.finish_reason == "length"


def test_under_the_match_rule_a_draft_model_that_is_the_target_draws_what_the_target_draws(target):
    twin = DraftModel(HFTarget(tiny_llama(), None), target.vocab_size, 4)
    configs = [SamplingConfig(temperature=1.0, seed=seed) for seed in range(3)]
    prompts = [PROMPT, [9] * 30, [1]]

    def share_accepted(rule):
        results = generate(target, twin, prompts, configs, max_new_tokens=41, rule=rule)
        counts = [(r.stats.num_accepted, r.stats.num_drafted) for r in results]
        return sum(count for count, _ in counts) / sum(count for _, count in counts)

    assert share_accepted("match") == share_accepted("token") == 1.0


def test_every_prompt_may_have_its_own_limit(target, drafter):
    results = generate(target, drafter, [PROMPT] * 3, max_new_tokens=[2, 9, 5])
    assert [len(result.tokens) for result in results] == [2, 9, 5]
    assert all(result.tokens == plain_tokens(target, 9)[: len(result.tokens)] for result in results)


def test_steps_give_all_tokens_and_the_last_says_why_it_ended(target, drafter):
    prompts = [PROMPT, [9] * 30, [1]]
    run = stream(target, drafter, prompts, max_new_tokens=12, batch_size=2)
    tokens = {0: [], 1: [], 2: []}
    ends = {}
    for chunks in run.steps():
        for chunk in chunks:
            assert chunk.index not in ends
            tokens[chunk.index] += chunk.tokens
            if chunk.finish_reason:
                ends[chunk.index] = chunk.finish_reason
    assert list(tokens.values()) == [result.tokens for result in run.results()]
    assert ends == {0: "length", 1: "length", 2: "length"}


def test_output_ends_with_the_first_end_of_sequence_token(target, drafter):
    tokens = plain_tokens(target, 20)
    eos = tokens[6]
    target.eos_token_ids = (eos,)
    try:
        result = generate(target, drafter, [PROMPT], max_new_tokens=20)[0]
    finally:
        target.eos_token_ids = ()
    assert result.tokens == tokens[: tokens.index(eos) + 1]
    assert result.finish_reason == "eos"


def test_text_ends_before_a_stop_string_that_spans_tokens(target, drafter):
    text = target.tokenizer.decode(plain_tokens(target, 20))
    stop = text[5:8]
    result = generate(target, drafter, [PROMPT], max_new_tokens=20, stop=[stop])[0]
    assert result.text == text[: text.index(stop)]
    assert result.finish_reason == "stop"


def test_streamed_pieces_add_up_to_the_text_and_never_show_a_stop_string(target, drafter):
    text = target.tokenizer.decode(plain_tokens(target, 20))
    stop = text[9:11]
    chunks = list(stream(target, drafter, [PROMPT], max_new_tokens=20, stop=[stop]))
    assert "".join(chunk.text for chunk in chunks) == text[: text.index(stop)]
    assert [chunk.finish_reason for chunk in chunks][-1] == "stop"
    assert all(chunk.finish_reason is None for chunk in chunks[:-1])


def test_rows_of_different_length_finish_at_different_steps_and_agree_with_single_runs(
    target, drafter
):
    prompts = [PROMPT, [9] * 30, [1], list(range(20, 60))]
    together = generate(target, drafter, prompts, max_new_tokens=30)
    for prompt, result in zip(prompts, together, strict=True):
        assert result.tokens == plain_tokens(target, 30, prompt)
    assert len({len(result.records) for result in together}) > 1


def test_batches_smaller_than_the_number_of_prompts_change_nothing(target, drafter):
    prompts = [PROMPT, [9] * 30, [1]]
    whole = generate(target, drafter, prompts, max_new_tokens=12)
    parts = generate(target, drafter, prompts, max_new_tokens=12, batch_size=2)
    assert [r.tokens for r in whole] == [r.tokens for r in parts]


def test_tokens_are_accepted_ones_plus_one_a_step_plus_the_first(target, drafter):
    result = generate(target, drafter, [PROMPT], max_new_tokens=33)[0]
    stats = result.stats
    assert len(result.tokens) == 1 + stats.num_accepted + stats.num_steps
    assert stats.accepted_length == pytest.approx(1 + sum(stats.acceptance_at_depth))
    for depth, share in enumerate(stats.conditional_acceptance_at_depth):
        assert share >= stats.acceptance_at_depth[depth]


def test_plain_decoding_has_an_accepted_length_of_one(target):
    stats = generate_baseline(target, [PROMPT], max_new_tokens=9)[0].stats
    assert stats == AcceptanceStats(8, 0, 0, (), ())
    assert stats.accepted_length == 1.0


def test_the_context_ends_a_row_and_drafts_never_reach_past_it(target, drafter):
    prompt = [5, 6, 7, 8] * 62 + [5]  # 249 of 256
    result = generate(target, drafter, [prompt], max_new_tokens=50)[0]
    assert len(result.tokens) == 256 - 249
    assert result.finish_reason == "length"
    assert result.tokens == plain_tokens(target, 50, prompt)


def test_sampling_repeats_with_its_seed_and_changes_with_another(target, drafter):
    def run(seed):
        config = SamplingConfig(temperature=1.0, seed=seed)
        return generate(target, drafter, [PROMPT], config, max_new_tokens=20)[0].tokens

    assert run(3) == run(3)
    assert run(3) != run(4)


def test_out_of_time_keeps_what_there_is(target, drafter):
    result = generate(target, drafter, [PROMPT], max_new_tokens=50, max_time_s=1e-9)[0]
    assert result.finish_reason == "time"
    assert result.tokens == plain_tokens(target, 1)


def test_an_interrupt_returns_what_there_is(target, drafter, monkeypatch):
    calls = []
    original = target.score

    def score(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(target, "score", score)
    results = generate(target, drafter, [PROMPT, [1]], max_new_tokens=50, batch_size=1)
    monkeypatch.undo()
    assert [result.finish_reason for result in results] == ["interrupted", "interrupted"]
    assert results[0].tokens == plain_tokens(target, len(results[0].tokens))
    assert len(results[0].tokens) >= 3
    assert results[1].tokens == []


def test_nan_logits_are_an_error_that_names_the_prompt(drafter):
    broken = tiny_target()
    with torch.no_grad():
        broken.model.lm_head.weight[3] = float("nan")
    with pytest.raises(FloatingPointError, match="prompt 0"):
        generate(broken, drafter, [PROMPT], max_new_tokens=5)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "prompts is empty"),
        ([[]], {}, "prompt 0 is empty"),
        ([""], {}, "prompt 0 is empty"),
        ([PROMPT, [1] * 256], {}, "prompt 1 has 256 tokens"),
        ([[1, 97]], {}, "token 97"),
        ([PROMPT], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([PROMPT], {"max_new_tokens": [3, 4]}, "max_new_tokens has 2 entries"),
        ([PROMPT], {"stop": [""]}, "empty string"),
        ([PROMPT], {"max_time_s": -1}, "max_time_s is -1"),
        ([PROMPT], {"batch_size": 0}, "batch_size is 0"),
        ([PROMPT], {"rule": "tokens"}, "tokens"),
        ([PROMPT], {"sampling": [SamplingConfig()] * 2}, "sampling has 2 entries"),
    ],
)
def test_bad_input_is_named(target, drafter, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(target, drafter, prompts, **options)


def test_a_chain_rule_refuses_a_drafter_of_trees(target):
    tree = DraftModel(HFTarget(tiny_llama(seed=1), None), target.vocab_size, 3, width=2)
    with pytest.raises(ValueError, match="block"):
        generate(target, tree, [PROMPT], rule="block")


def test_an_unknown_drafter_or_option_suggests_the_nearest_name(target):
    with pytest.raises(ValueError, match="did you mean 'ngram'"):
        load_drafter("ngramm", target)
    with pytest.raises(ValueError, match="did you mean 'max_ngram'"):
        load_drafter({"type": "ngram", "max_ngrams": 3}, target)


def test_prompts_that_wait_when_the_time_is_up_return_empty(target, drafter):
    results = generate(
        target, drafter, [PROMPT] * 3, max_new_tokens=50, max_time_s=1e-9, batch_size=1
    )
    assert [result.finish_reason for result in results] == ["time"] * 3
    assert [len(result.tokens) for result in results] == [1, 0, 0]


def test_the_parts_of_a_step_do_not_overlap(target, drafter):
    for record in generate(target, drafter, [PROMPT, [9] * 30], max_new_tokens=20)[0].records:
        parts = (record.draft_s, record.target_s, record.verify_s, record.commit_s)
        assert min(parts[1:]) > 0
        assert sum(parts) <= record.wall_s
