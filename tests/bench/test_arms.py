"""Arms: the same prompts, tokens and clock whoever decodes."""

from functools import partial

import pytest
import torch
from tiny_models import perturbed, tiny_llama, tiny_target
from tiny_suites import Configuration, Plan

from specdec.bench import arms as arms_module
from specdec.bench.arms import HFArm, add_choice, build_arms, mode_of
from specdec.bench.config import ArmConfig, BenchConfig, SamplingOptions
from specdec.bench.workloads import Request

PROMPTS = [[1, 2, 3], [5, 6, 7, 8, 9], [11]]


def arms_of(target, *arms, batch_size=3, **settings):
    return build_arms(BenchConfig(arms=list(arms), batch_size=batch_size, **settings), target)


def decode(arm, prompts=PROMPTS, seed=0, num=16):
    """Runs of one call."""
    requests = [Request("", "", ids, num, seed + i, user=i) for i, ids in enumerate(prompts)]
    return arm(requests, lambda: None)


def tokens_of(arm, **options):
    return [run.tokens for run in decode(arm, **options)]


def both(target, **settings):
    """Runs of plain decoding, which transformers agrees with, and of transformers."""
    arms = arms_of(target, **settings)
    ours, theirs = decode(arms["plain"]), decode(arms["hf_generate"])
    assert [run.tokens for run in ours] == [run.tokens for run in theirs]
    return ours, theirs


def test_transformers_and_our_loop_emit_the_same_tokens():
    target = tiny_target()
    whole = tokens_of(arms_of(target)["plain"])
    early = next(t for t in whole[0][2:8] if t not in whole[1])
    target.eos_token_ids = (early,)
    ours, theirs = both(target)
    assert ours[0].tokens[-1] == early
    assert len(ours[0].tokens) < len(ours[1].tokens)
    # A row that ended early is not charged with the rest of its batch, in either arm.
    assert ours[0].decode_s < ours[1].decode_s
    assert theirs[0].decode_s < theirs[1].decode_s


@pytest.fixture
def quick_compiler(monkeypatch):
    """Traces what Inductor would compile, and runs it as it is."""
    quick = partial(arms_module.CompileConfig, backend="eager", mode="default")
    monkeypatch.setattr(arms_module, "CompileConfig", quick)
    torch._dynamo.reset()  # other tests compile the same shapes


def compiled_baseline(target, rows=3):
    target.compile_mode = "inductor"
    return HFArm(BenchConfig(batch_size=rows), target, {}, {rows: 40})


def num_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_compiled_baseline_emits_the_same_tokens(quick_compiler):
    target = tiny_target()
    before, num_before = dict(vars(target.model)), num_graphs()
    plain, baseline = arms_of(target)["plain"], compiled_baseline(target)
    whole = tokens_of(plain)
    assert tokens_of(baseline) == whole
    assert (baseline.compile_mode, num_graphs()) == ("inductor", num_before + 1)
    # Other lengths and ends need nothing new; another size of a batch is decoded eagerly.
    target.eos_token_ids = (whole[0][4],)
    for prompts in ([[7] * 20, [3], [5, 6]], PROMPTS):
        assert tokens_of(baseline, prompts=prompts) == tokens_of(plain, prompts=prompts)
    assert baseline.compile_mode == "inductor"
    assert tokens_of(baseline, prompts=PROMPTS[:2]) == tokens_of(plain, prompts=PROMPTS[:2])
    assert (baseline.compile_mode, num_graphs()) == ("eager", num_before + 1)
    assert vars(target.model) == before


def test_early_end_leaves_nothing_to_compile(quick_compiler):
    target = tiny_target()
    (first,) = tokens_of(arms_of(target)["plain"], prompts=PROMPTS[:1], num=1)
    target.eos_token_ids = tuple(first)
    baseline = compiled_baseline(target, 1)
    assert tokens_of(baseline, prompts=PROMPTS[:1]) == [first]
    target.eos_token_ids, num_before = (), num_graphs()
    tokens_of(baseline, prompts=PROMPTS[:1])
    assert num_graphs() == num_before


def test_many_shapes_stay_compiled(quick_compiler):
    target, num_before = tiny_target(num_layers=1), num_graphs()
    plain = tokens_of(arms_of(target)["plain"], num=2)
    target.compile_mode = "inductor"
    for cache_len in range(40, 49):  # one more than torch compiles of a function by default
        baseline = HFArm(BenchConfig(batch_size=3), target, {}, {3: cache_len})
        assert tokens_of(baseline, num=2) == plain
    assert num_graphs() == num_before + 9


@pytest.mark.parametrize("fault", ["raises", "does nothing"])
def test_baseline_that_cannot_compile_runs_eagerly(monkeypatch, fault):
    def refuse(self, config):
        if fault == "raises":
            raise RuntimeError("no compiler here")
        return self.__call__

    target = tiny_target()
    monkeypatch.setattr(type(target.model), "get_compiled_call", refuse)
    baseline = compiled_baseline(target)
    with pytest.warns(UserWarning, match="measured eagerly: (no compiler here|it does not)"):
        assert tokens_of(baseline) == tokens_of(arms_of(target)["plain"])
    assert baseline.compile_mode == "eager"


@pytest.mark.slow
def test_inductor_s_baseline_emits_the_same_tokens():
    target = tiny_target()
    plain, baseline = arms_of(target)["plain"], compiled_baseline(target)
    assert tokens_of(baseline) == tokens_of(plain)
    assert baseline.compile_mode == "inductor"


def test_drafter_compiled_alone_is_told():
    arm = ArmConfig(name="a", type="ngram")
    arms = [arm, arm.model_copy(update={"options": {"compile": True}})]
    assert [mode_of(tiny_target(), each) for each in arms] == ["eager", "inductor"]


def test_checkpoint_s_defaults_do_not_change_the_baseline():
    target = tiny_target()
    target.model.generation_config.repetition_penalty = 1.9
    target.model.generation_config.no_repeat_ngram_size = 1
    both(target)
    assert target.model.generation_config.repetition_penalty == 1.9


def test_sampled_arm_leaves_the_global_generator_alone():
    sampling = SamplingOptions(temperature=0.9, top_k=20)
    arms = arms_of(tiny_target(), sampling=sampling)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    for name in ("plain", "hf_generate"):
        assert tokens_of(arms[name], seed=4) == tokens_of(arms[name], seed=4)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(
    "sampling", [{}, {"presence_penalty": 2.0, "frequency_penalty": 1.0, "min_new_tokens": 5}]
)
def test_assistant_stays_lossless_and_its_bursts_count_once(tmp_path, sampling):
    perturbed(tiny_llama(), 0.05).save_pretrained(tmp_path)
    options = {"path": str(tmp_path), "num_draft_tokens": 3}
    assisted = ArmConfig(name="assisted", type="hf_assisted", options=options)
    arms = arms_of(tiny_target(), assisted, sampling=SamplingOptions(**sampling), batch_size=1)
    for prompt in PROMPTS:
        (plain,), (assisted,) = (decode(arms[name], [prompt]) for name in ("plain", "assisted"))
        assert assisted.tokens == plain.tokens
        assert 1 <= assisted.num_first <= 4


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
    target = tiny_target()
    greedy = tokens_of(arms_of(target)["plain"])
    target.eos_token_ids = (greedy[0][3],)
    unset = tokens_of(arms_of(target)["plain"])
    ours, _ = both(target, sampling=SamplingOptions(**sampling))
    if sampling.keys() & {"min_new_tokens", "repetition_penalty", "presence_penalty"}:
        assert [run.tokens for run in ours] != unset


def test_both_arms_draw_from_the_same_distribution():
    target = tiny_target()
    sampling = SamplingOptions(temperature=1.5, top_k=5, top_p=0.9)
    arms = arms_of(target, sampling=sampling, batch_size=400)
    counts = {}
    for name in ("plain", "hf_generate"):
        tokens = [run.tokens[0] for run in decode(arms[name], [[1, 2, 3]] * 400, num=1)]
        counts[name] = {token: tokens.count(token) / 400 for token in set(tokens)}
    assert set(counts["plain"]) == set(counts["hf_generate"])
    for token, share in counts["plain"].items():
        assert abs(share - counts["hf_generate"][token]) < 0.12


def ngram(name, draft_length=None, **options):
    return ArmConfig(name=name, type="ngram", options=options, draft_length=draft_length)


FIVE = Configuration(name="five", options={"num_draft_tokens": 5})
PLAIN = Configuration(name="plain", type="plain")
OWN = ngram("five", num_draft_tokens=5)
PLANNED = ngram("five (planned)", num_draft_tokens=5)


@pytest.mark.parametrize(
    ("choice", "given", "known", "arms"),
    [
        # The choice is a given arm: it is measured once.
        (FIVE, [OWN], ["five", "other"], [OWN]),
        # It has another name: it comes first.
        (FIVE, [ngram("six")], ["five", "other"], [OWN, ngram("six")]),
        # It has the name of another configuration: it is renamed until it has none.
        *(
            (FIVE, [other], ["five (planned)", "other"], [PLANNED, other])
            for other in (
                ngram("five", num_draft_tokens=4),
                ArmConfig(name="five", type="suffix", options={"num_draft_tokens": 5}),
                ngram("five", {1: 2}, num_draft_tokens=5),
            )
        ),
        (
            FIVE,
            [ngram("five"), ngram("five (planned)")],
            ["five (planned) (planned)", "other"],
            [
                ngram("five (planned) (planned)", num_draft_tokens=5),
                *(ngram("five"), ngram("five (planned)")),
            ],
        ),
        # One that was not chosen does not pass for an arm; plain decoding adds none.
        (
            FIVE,
            [ngram("other", min_ngram=2)],
            ["five", "other (planned)"],
            [OWN, ngram("other", min_ngram=2)],
        ),
        (PLAIN, [OWN], ["plain", "other"], [OWN]),
    ],
)
def test_choice_is_measured_beside_the_arms(choice, given, known, arms):
    plan = Plan(choice=choice, configurations=[choice, Configuration(name="other")])
    found, measured = add_choice(plan, given)
    assert measured == arms
    assert [each.name for each in found.configurations] == known
    assert found.choice.name == known[0]
