"""Arms: the same prompts, tokens and clock whoever decodes."""

import pytest
from tiny_models import perturbed, tiny_llama, tiny_target

from specdec.bench.arms import build_arms
from specdec.bench.config import ArmConfig, BenchConfig

PROMPTS = [[1, 2, 3], [5, 6, 7, 8, 9], [11]]


def arms_of(target, *arms, **settings):
    return build_arms(BenchConfig(arms=list(arms), max_new_tokens=16, **settings), target)


def test_transformers_and_our_loop_emit_the_same_tokens_over_ragged_rows_with_early_ends():
    target = tiny_target()
    whole = [run.tokens for run in arms_of(target)["plain"](PROMPTS, range(3))]
    early = next(t for t in whole[0][2:8] if t not in whole[1])
    target.eos_token_ids = (early,)
    arms = arms_of(target)
    ours, theirs = arms["plain"](PROMPTS, range(3)), arms["hf_generate"](PROMPTS, range(3))
    assert [run.tokens for run in ours] == [run.tokens for run in theirs]
    assert ours[0].tokens[-1] == early
    assert len(ours[0].tokens) < len(ours[1].tokens)
    # A row that ended early is not charged with the rest of its batch, in either arm.
    assert ours[0].decode_s < ours[1].decode_s
    assert theirs[0].decode_s < theirs[1].decode_s


def test_a_checkpoint_s_own_generation_defaults_do_not_change_the_baseline():
    target = tiny_target()
    target.model.generation_config.repetition_penalty = 1.9
    target.model.generation_config.no_repeat_ngram_size = 1
    arms = arms_of(target)
    ours, theirs = arms["plain"](PROMPTS, range(3)), arms["hf_generate"](PROMPTS, range(3))
    assert [run.tokens for run in ours] == [run.tokens for run in theirs]
    assert target.model.generation_config.repetition_penalty == 1.9


def test_a_sampled_arm_repeats_itself_and_leaves_the_global_generator_alone():
    import torch

    from specdec.bench.config import SamplingOptions

    sampling = SamplingOptions(temperature=0.9, top_k=20)
    arms = arms_of(tiny_target(), sampling=sampling)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    for name in ("plain", "hf_generate"):
        first, second = arms[name](PROMPTS, range(4, 7)), arms[name](PROMPTS, range(4, 7))
        assert [run.tokens for run in first] == [run.tokens for run in second]
    assert torch.equal(torch.rand(2), expected)


def test_bursts_of_assisted_generation_are_counted_once(tmp_path):
    target = tiny_target()
    perturbed(tiny_llama(), 0.05).save_pretrained(tmp_path)
    options = {"path": str(tmp_path), "num_draft_tokens": 3}
    arms = arms_of(target, ArmConfig("assisted", "hf_assisted", options))
    for prompt in PROMPTS:
        (plain,), (assisted,) = arms["plain"]([prompt], [0]), arms["assisted"]([prompt], [0])
        assert assisted.tokens == plain.tokens
        assert 1 <= assisted.num_first <= 4


def test_an_unknown_option_of_an_assisted_arm_is_named(tmp_path):
    perturbed(tiny_llama(), 0.05).save_pretrained(tmp_path)
    arm = ArmConfig("assisted", "hf_assisted", {"path": str(tmp_path), "num_tokens": 3})
    with pytest.raises(ValueError, match="no option 'num_tokens'"):
        arms_of(tiny_target(), arm)
