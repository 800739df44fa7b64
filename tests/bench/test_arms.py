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


@pytest.mark.parametrize(
    "sampling",
    [
        {"repetition_penalty": 1.7},
        {"presence_penalty": 4.0, "frequency_penalty": 1.5},
        {"presence_penalty": -3.0, "repetition_penalty": 1.2},
        {"min_new_tokens": 12},
        # A single token survives, so that sampling must give it in both arms.
        {"temperature": 0.8, "top_k": 1},
        {"temperature": 0.8, "top_p": 1e-6},
        {"temperature": 0.8, "min_p": 1.0, "frequency_penalty": 2.0},
        {"temperature": 0.8, "top_k": 1, "min_new_tokens": 9, "repetition_penalty": 1.4},
    ],
)
def test_sampling_settings_mean_the_same_in_both_arms(sampling):
    from specdec.bench.config import SamplingOptions

    target = tiny_target()
    greedy = [run.tokens for run in arms_of(target)["plain"](PROMPTS, range(3))]
    target.eos_token_ids = (greedy[0][3],)
    unset = [run.tokens for run in arms_of(target)["plain"](PROMPTS, range(3))]
    arms = arms_of(target, sampling=SamplingOptions(**sampling))
    ours, theirs = arms["plain"](PROMPTS, range(3)), arms["hf_generate"](PROMPTS, range(3))
    assert [run.tokens for run in ours] == [run.tokens for run in theirs]
    if sampling.keys() & {"min_new_tokens", "repetition_penalty", "presence_penalty"}:
        assert [run.tokens for run in ours] != unset


def test_both_arms_draw_from_the_same_distribution():
    from specdec.bench.config import SamplingOptions

    target = tiny_target()
    sampling = SamplingOptions(temperature=1.5, top_k=5, top_p=0.9)
    config = BenchConfig(max_new_tokens=1, sampling=sampling)
    arms = build_arms(config, target)
    prompts = [[1, 2, 3]] * 400
    counts = {}
    for name in ("plain", "hf_generate"):
        tokens = [run.tokens[0] for run in arms[name](prompts, range(400))]
        counts[name] = {token: tokens.count(token) / 400 for token in set(tokens)}
    assert set(counts["plain"]) == set(counts["hf_generate"])
    for token, share in counts["plain"].items():
        assert abs(share - counts["hf_generate"][token]) < 0.12


def test_a_nearly_full_context_ends_all_arms_at_the_same_place():
    target = tiny_target()
    prompts = [[1] * (target.max_context_len - 5), [5, 6, 7]]
    arms = arms_of(target)
    ours, theirs = arms["plain"](prompts, range(2)), arms["hf_generate"](prompts, range(2))
    assert [run.tokens for run in ours] == [run.tokens for run in theirs]
    assert [len(run.tokens) for run in ours] == [5, 5]


def test_an_assistant_with_penalties_stays_lossless(tmp_path):
    from specdec.bench.config import SamplingOptions

    perturbed(tiny_llama(), 0.05).save_pretrained(tmp_path)
    options = {"path": str(tmp_path), "num_draft_tokens": 3}
    sampling = SamplingOptions(presence_penalty=2.0, frequency_penalty=1.0, min_new_tokens=5)
    arms = arms_of(tiny_target(), ArmConfig("assisted", "hf_assisted", options), sampling=sampling)
    for prompt in PROMPTS:
        (plain,), (assisted,) = arms["plain"]([prompt], [0]), arms["assisted"]([prompt], [0])
        assert assisted.tokens == plain.tokens
