"""Sampling equals transformers' processors on chains, and every tree node equals its own chain."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.sampling.randomness import row_exponentials
from specdec.sampling.sampler import Sampler, SamplingConfig, sample, sample_without_replacement
from specdec.verify.draft import Draft

V, EOS = 24, (3, 5)
token_ids = st.integers(0, V - 1)


@st.composite
def configs(draw) -> SamplingConfig:
    return SamplingConfig(
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 1.7])),
        top_k=draw(st.sampled_from([0, 1, 4, 10, V, 2 * V])),
        top_p=draw(st.sampled_from([0.05, 0.5, 0.9, 1.0])),
        min_p=draw(st.sampled_from([0.0, 0.02, 0.3])),
        repetition_penalty=draw(st.sampled_from([0.7, 1.0, 1.3])),
        presence_penalty=draw(st.sampled_from([-0.5, 0.0, 0.9])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.4])),
        logit_bias=draw(st.dictionaries(token_ids, st.sampled_from([-3.0, 0.5, 2.0]), max_size=4)),
        bad_words=draw(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), max_size=6)),
        min_new_tokens=draw(st.integers(0, 6)),
        seed=draw(st.integers(0, 2**63 - 1)),
    )


def without_output_penalties(config: SamplingConfig) -> SamplingConfig:
    """Transformers has no presence and no frequency penalty."""
    return dataclasses.replace(config, presence_penalty=0.0, frequency_penalty=0.0)


def logits_for(*shape: int, seed: int) -> torch.Tensor:
    return 4 * torch.randn(*shape, V, generator=torch.Generator().manual_seed(seed))


def transformers_scores(config, prompt, output, logits) -> torch.Tensor:
    """Processed logits [V] by transformers' processors in transformers' order."""
    processors = hf.LogitsProcessorList()
    if config.logit_bias:
        bias = {(token,): value for token, value in config.logit_bias.items()}
        processors.append(hf.SequenceBiasLogitsProcessor(bias))
    if config.repetition_penalty != 1:
        processors.append(hf.RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    words = [list(word) for word in config.bad_words]
    if any(word not in [[eos] for eos in EOS] for word in words):
        processors.append(hf.NoBadWordsLogitsProcessor(words, list(EOS)))
    if config.min_new_tokens:
        processors.append(
            hf.MinNewTokensLengthLogitsProcessor(len(prompt), config.min_new_tokens, list(EOS))
        )
    return processors(torch.tensor([[*prompt, *output]]), logits[None].clone())[0]


def transformers_probs(config, scores) -> torch.Tensor:
    warpers = hf.LogitsProcessorList([hf.TemperatureLogitsWarper(float(config.temperature))])
    if config.top_k:
        warpers.append(hf.TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        warpers.append(hf.TopPLogitsWarper(config.top_p))
    if config.min_p:
        warpers.append(hf.MinPLogitsWarper(config.min_p))
    return warpers(None, scores[None]).softmax(-1)[0]


def sampler_for(rows: list[SamplingConfig], prompts, outputs=None) -> Sampler:
    sampler = Sampler(rows, V, "cpu", prompts, EOS)
    if outputs is not None:
        sampler.observe(padded(outputs))
    return sampler


def padded(rows) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows]).view(len(rows), width)


def path_of(parents: list[int], node: int) -> list[int]:
    """Node indices from the root's child down to `node`; none for -1, the root."""
    return [] if node < 0 else [*path_of(parents, parents[node]), node]


prompts_of = st.lists(token_ids, min_size=4, max_size=8)
outputs_of = st.lists(token_ids, min_size=1, max_size=5)
# Few different tokens, so that drafts repeat themselves, their prompts and bad words.
drafts_of = st.lists(st.integers(0, 5), min_size=0, max_size=5)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(configs(), prompts_of, outputs_of, drafts_of), min_size=1, max_size=3),
    st.integers(0, 99),
)
def test_ragged_chains_equal_transformers(rows, seed):
    rows = [(without_output_penalties(config), *rest) for config, *rest in rows]
    batch, prompts, outputs, drafts = zip(*rows, strict=True)
    draft = Draft.chain(padded(drafts), torch.tensor([len(d) for d in drafts]))
    logits = logits_for(len(rows), draft.num_nodes + 1, seed=seed)
    sampler = sampler_for(batch, prompts, outputs)
    scores = sampler.scores(logits, draft)
    probs = sampler.probs(scores)
    for b, (config, prompt, output, drafted) in enumerate(rows):
        for m in range(len(drafted) + 1):
            expected = transformers_scores(config, prompt, output + drafted[:m], logits[b, m])
            torch.testing.assert_close(scores[b, m], expected, rtol=1e-6, atol=1e-6)
            if config.temperature > 0:
                wanted = transformers_probs(config, expected)
                torch.testing.assert_close(probs[b, m], wanted, rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(probs[b, m], torch.eye(V)[expected.argmax()])


@st.composite
def trees(draw):
    tokens = draw(st.lists(st.integers(0, 5), min_size=1, max_size=9))
    parents = [draw(st.integers(-1, node - 1)) for node in range(len(tokens))]
    return tokens, parents


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(configs(), prompts_of, outputs_of, trees()), min_size=1, max_size=3),
    st.integers(0, 2),
    st.integers(0, 99),
)
def test_tree_node_equals_its_own_chain(rows, slack, seed):
    batch, prompts, outputs, drafts = zip(*rows, strict=True)
    tokens, parents = padded([d[0] for d in drafts]), padded([d[1] for d in drafts])
    depth = max(len(path_of(up, node)) for _, up in drafts for node in range(len(up)))
    lengths = torch.tensor([len(d[0]) for d in drafts])
    draft = Draft.tree(tokens, parents, lengths, depth + slack)
    logits = logits_for(len(rows), draft.num_nodes + 1, seed=seed)
    scores = sampler_for(batch, prompts, outputs).scores(logits, draft)
    for b, (config, prompt, output, (drafted, up)) in enumerate(rows):
        for node in range(-1, len(drafted)):
            path = [drafted[i] for i in path_of(up, node)]
            alone = sampler_for([config], [prompt], [output + path])
            assert torch.equal(
                scores[b, node + 1], alone.scores(logits[b : b + 1, [node + 1]])[0, 0]
            )


@settings(max_examples=40, deadline=None)
@given(configs(), prompts_of, outputs_of, trees(), st.data())
def test_scores_of_some_nodes_equal_the_whole(config, prompt, output, tree, data):
    tokens, parents = tree
    spelled = Draft.tree(torch.tensor([tokens]), torch.tensor([parents]))
    chain = Draft.chain(torch.tensor([tokens]))
    row = st.integers(0, len(tokens))
    nodes = torch.tensor([data.draw(st.lists(row, min_size=1, max_size=4))])
    logits = logits_for(1, len(tokens) + 1, seed=1)
    sampler = sampler_for([config], [prompt], [output])
    for draft in (spelled, chain):
        whole = sampler.scores(logits, draft)
        assert torch.equal(sampler.scores(logits[:, nodes[0]], draft, nodes), whole[:, nodes[0]])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(configs(), prompts_of, outputs_of, outputs_of), min_size=2, max_size=4),
    st.data(),
)
def test_kept_rows_do_not_depend_on_batch(rows, data):
    batch, prompts, first, second = zip(*rows, strict=True)
    order = data.draw(st.lists(st.sampled_from(range(len(rows))), unique=True, min_size=1))
    logits = logits_for(len(rows), 1, seed=5)
    sampler = sampler_for(batch, prompts, first)
    sampler.keep(torch.tensor(order))
    sampler.observe(padded([second[b] for b in order]))
    probs = sampler.probs(sampler.scores(logits[order]))
    for kept, b in enumerate(order):
        alone = sampler_for([batch[b]], [prompts[b]], [first[b] + second[b]])
        assert torch.equal(probs[kept], alone.probs(alone.scores(logits[b : b + 1]))[0])
    assert sampler.configs == tuple(batch[b] for b in order)
    assert sampler.seeds.tolist() == [batch[b].seed for b in order]
    assert sampler.is_plain == all(batch[b].is_plain for b in order)
    assert sampler.is_greedy == all(batch[b].is_greedy for b in order)


def test_presence_and_frequency_penalise_output_tokens_only():
    config = SamplingConfig(temperature=1, presence_penalty=0.7, frequency_penalty=0.3)
    prompt, output, drafted = [1, 1, 2], [2, 4, 4], [4, 6, 6]
    logits = logits_for(1, 4, seed=2)
    draft = Draft.chain(torch.tensor([drafted]))
    scores = sampler_for([config], [prompt], [output]).scores(logits, draft)
    for m in range(4):
        counts = np.bincount(output + drafted[:m], minlength=V)
        expected = logits[0, m].numpy() - 0.3 * counts - 0.7 * (counts > 0)
        np.testing.assert_allclose(scores[0, m].numpy(), expected, rtol=1e-6)


def test_context_in_steps_equals_context_at_once():
    config = SamplingConfig(
        repetition_penalty=1.3, frequency_penalty=0.2, bad_words=[[7, 8, 9, 1]], min_new_tokens=5
    )
    logits = logits_for(1, 1, seed=3)
    stepwise = sampler_for([config], [[1, 7]])
    for tokens in ([[8]], [[9, -1]], [[-1, -1]]):
        stepwise.observe(torch.tensor(tokens))
    scores = stepwise.scores(logits)
    assert torch.equal(scores, sampler_for([config], [[1, 7]], [[8, 9]]).scores(logits))
    assert scores[0, 0, 1] == -torch.inf  # 7 8 9 would be completed, across prompt and output


@pytest.mark.parametrize("step", [1, -1])
def test_bad_words_with_one_end_are_all_banned(step):
    words = [[1, 9], [2, 9], [4, 1, 9], [9, 9, 9, 9, 9, 9, 9, 9]][::step]
    sampler = sampler_for([SamplingConfig(bad_words=words)], [[4, 1]])
    assert sampler.scores(logits_for(1, 1, seed=0))[0, 0, 9] == -torch.inf


def test_inputs_are_never_changed_nor_copied_in_vain():
    config = SamplingConfig(
        temperature=1, top_k=5, top_p=0.5, min_p=0.1, logit_bias={1: 2}, repetition_penalty=2
    )
    logits = logits_for(1, 1, seed=0)
    sampler = sampler_for([config], [[1]])
    before, scores = logits.clone(), sampler.scores(logits)
    scored = scores.clone()
    sampler.probs(scores)
    assert torch.equal(logits, before)
    assert torch.equal(scores, scored)
    plain = sampler_for([SamplingConfig(temperature=0.5, top_k=3)], [[1]], [[2]])
    assert plain.is_plain
    assert plain.scores(logits) is logits


def test_low_precision_logits_are_processed_in_float32():
    config = SamplingConfig(temperature=1, frequency_penalty=0.001)
    logits = logits_for(1, 1, seed=0).bfloat16()
    sampler = sampler_for([config], [[1]], [[2]])
    scores = sampler.scores(logits)
    assert scores.dtype == sampler.probs(logits).dtype == torch.float32
    assert scores[0, 0, 2] == logits[0, 0, 2].float() - 0.001


def test_top_p_splits_ties_as_transformers_does():
    config = SamplingConfig(temperature=1.0, top_p=0.5)
    logits = torch.zeros(1, 1, V)
    probs = sampler_for([config], [[1]]).probs(logits)[0, 0]
    assert torch.equal(probs, transformers_probs(config, logits[0, 0]))
    assert (probs > 0).sum() == V // 2


def test_tokens_past_the_vocabulary_do_no_harm():
    config = SamplingConfig(repetition_penalty=2.0, frequency_penalty=1.0)
    logits = logits_for(1, 2, seed=0)
    draft = Draft.chain(torch.tensor([[V + 1]]))
    assert torch.equal(sampler_for([config], [[V + 3]], [[V]]).scores(logits, draft), logits)


def test_draws_follow_the_probabilities_and_what_is_left_of_them():
    probs, n = torch.tensor([0.5, 0.25, 0.0, 0.2, 0.05]), 40_000
    noise = row_exponentials(torch.arange(n), torch.zeros(n, dtype=torch.long), 0, 5)
    pairs = sample_without_replacement(probs, noise, 2)
    assert torch.equal(pairs[:, 0], sample(probs, noise))
    seen = torch.bincount(pairs[:, 0] * 5 + pairs[:, 1], minlength=25).view(5, 5) / n
    left = probs / (1 - probs).unsqueeze(1)
    assert ((seen.sum(1) - probs).abs() < 4 * 0.5 / n**0.5).all()
    expected = (probs.unsqueeze(1) * left).fill_diagonal_(0)
    assert ((seen - expected).abs() < 4 * 0.5 / n**0.5).all()
    assert seen[2].sum() == seen[:, 2].sum() == 0


def test_impossible_tokens_are_never_drawn():
    probs, noise = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.0, 1.0, 30.0])
    assert sample(probs, noise) == sample(probs, torch.zeros(3)) == 2
    assert sample_without_replacement(probs, noise, 3).tolist() == [2, -1, -1]


REFUSED = {
    "temperature": (-1, 1e-9, float("nan"), float("inf"), "1", True),
    "top_k": (-1, 1.5, True),
    "top_p": (0, 1.1, float("nan")),
    "min_p": (-0.1, 1.1),
    "repetition_penalty": (0, -1, float("inf")),
    "presence_penalty": (float("nan"),),
    "frequency_penalty": (None,),
    "logit_bias": ([1], {-1: 1.0}, {1: float("inf")}, {1: "x"}),
    "bad_words": ([[]], [[-1]], [3], "ab", ["ab"]),
    "min_new_tokens": (-1, 2.0),
    "seed": (-1, 2**63),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_value_is_refused_with_its_rule(name):
    for value in REFUSED[name]:
        with pytest.raises(ValueError, match=f"{name} is .* but must be .*; use "):
            SamplingConfig(**{name: value})


PAIR = Draft.chain(torch.tensor([[1, 2]]))
ONE = SamplingConfig()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: sampler_for([ONE, SamplingConfig(logit_bias={V: 1.0})], [[1], [1]]),
            "logit_bias of row 1 has token 24",
        ),
        (
            lambda: sampler_for([SamplingConfig(bad_words=[[1, 99]])], [[1]]),
            "bad_words of row 0 has token 99",
        ),
        (lambda: sampler_for([ONE], [[1], [2]]), "configs has 1 rows and prompts 2"),
        (
            lambda: sampler_for([ONE], [[1]]).scores(logits_for(1, 2, seed=0), PAIR),
            "logits has shape",
        ),
        (
            lambda: sampler_for([ONE], [[1]]).scores(
                logits_for(1, 1, seed=0), PAIR, torch.tensor([[1], [1]])
            ),
            "nodes has shape",
        ),
        (lambda: sample_without_replacement(torch.ones(3), torch.ones(3), 0), "k is 0"),
    ],
)
def test_wrong_shapes_and_foreign_tokens_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.gpu
def test_gpu_step_never_waits_for_host():
    config = SamplingConfig(
        temperature=0.8, top_k=9, top_p=0.8, min_p=0.1, repetition_penalty=1.2,
        frequency_penalty=0.2, logit_bias={1: 1.0}, bad_words=[[1, 2], [3]], min_new_tokens=4,
    )  # fmt: skip
    rows = [config, SamplingConfig()]
    draft = Draft.tree(torch.tensor([[1, 2, 4]] * 2).cuda(), torch.tensor([-1, 0, 0]).cuda())
    sampler = Sampler(rows, V, "cuda", [[1], [2]], EOS)
    logits, tokens = logits_for(2, 4, seed=0).cuda(), torch.tensor([[1, 2], [3, -1]]).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampler.observe(tokens)
        sampler.probs(sampler.scores(logits, draft))
    finally:
        torch.cuda.set_sync_debug_mode("default")
