"""Properties of every rule over random ragged trees."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.verify import Draft, Verdict, match, verify

RULES = ("token", "block", "traversal", "typical")
FAST = settings(max_examples=40, deadline=None)


@st.composite
def problems(draw, rule: str):
    """Draw a ragged batch: draft, target rows and randomness."""
    batch_size, vocab_size = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    num_nodes = draw(st.integers(0, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def rows(count: int) -> torch.Tensor:
        logits = torch.randn(batch_size, count, vocab_size, generator=generator)
        return torch.softmax(2 * logits, 2)

    lengths = torch.randint(0, num_nodes + 1, (batch_size,), generator=generator)
    tokens = torch.randint(0, vocab_size, (batch_size, num_nodes), generator=generator)
    real = torch.arange(num_nodes) < lengths[:, None]
    parents = None
    if rule != "block" and draw(st.booleans()):
        upper = torch.arange(num_nodes) + 1
        fraction = torch.rand(batch_size, num_nodes, generator=generator)
        parents = ((fraction * upper).long() - 1).masked_fill(~real, -1)
    probs = rows(num_nodes) if draw(st.booleans()) else None
    draft = Draft(tokens.masked_fill(~real, -1), lengths, parents, probs, num_nodes)
    uniforms = torch.rand(batch_size, num_nodes, generator=generator)
    noise = torch.empty(batch_size, vocab_size).exponential_(generator=generator)
    return draft, rows(num_nodes + 1), uniforms, noise


def same(first: Verdict, second: Verdict) -> bool:
    return all(map(torch.equal, vars(first).values(), vars(second).values()))


@pytest.mark.parametrize("rule", RULES)
@FAST
@given(data=st.data())
def test_padding_never_leaks(rule, data):
    draft, target, uniforms, noise = data.draw(problems(rule))
    clean = verify(target, draft, rule=rule, uniforms=uniforms, noise=noise)
    padding = ~draft.real_nodes()
    target = target.clone()
    target[:, 1:][padding] = torch.nan
    dirt = {"tokens": draft.tokens.masked_fill(padding, 99)}
    if draft.parents is not None:
        dirt["parents"] = draft.parents.masked_fill(padding, 77)
    if draft.probs is not None:
        dirt["probs"] = draft.probs.masked_fill(padding[:, :, None], torch.nan)
    dirty = verify(
        target,
        replace(draft, **dirt),
        rule=rule,
        uniforms=uniforms.masked_fill(padding, torch.nan),
        noise=noise,
    )
    assert same(clean, dirty)


@pytest.mark.parametrize("rule", RULES)
@FAST
@given(data=st.data())
def test_verdict_does_not_depend_on_neighbors(rule, data):
    draft, target, uniforms, noise = data.draw(problems(rule))
    together = verify(target, draft, rule=rule, uniforms=uniforms, noise=noise)
    for row in range(draft.batch_size):
        one = slice(row, row + 1)
        alone = draft.map_rows(lambda tensor, one=one: tensor[one])
        verdict = verify(target[one], alone, rule=rule, uniforms=uniforms[one], noise=noise[one])
        assert same(verdict, Verdict(*(tensor[one] for tensor in vars(together).values())))


@pytest.mark.parametrize("rule", RULES)
@FAST
@given(data=st.data())
def test_outputs_agree_with_each_other(rule, data):
    draft, target, uniforms, noise = data.draw(problems(rule))
    verdict = verify(target, draft, rule=rule, uniforms=uniforms, noise=noise)
    parents, real = draft.explicit_parents(), draft.real_nodes()
    for row in range(draft.batch_size):
        count = verdict.num_accepted[row].item()
        path = verdict.path[row].tolist()
        assert path[count:] == [-1] * (draft.depth - count)
        assert [parents[row, node].item() for node in path[:count]] == [-1, *path[:count]][:count]
        tokens = verdict.tokens[row].tolist()
        assert tokens[:count] == [draft.tokens[row, node].item() for node in path[:count]]
        assert 0 <= tokens[count] < target.shape[2]
        assert tokens[count + 1 :] == [-1] * (draft.depth - count)
        assert all(verdict.tested[row, node] for node in path[:count])
    assert not (verdict.tested & ~real).any()


@pytest.mark.parametrize("rule", ["token", "block", "traversal"])
@FAST
@given(data=st.data())
def test_draft_from_target_is_accepted_whole(rule, data):
    draft, target, uniforms, noise = data.draw(problems(rule))
    chain = Draft.chain(draft.tokens, draft.lengths, target[:, :-1])
    verdict = verify(target, chain, rule=rule, uniforms=uniforms, noise=noise)
    assert torch.equal(verdict.num_accepted, draft.lengths)


@FAST
@given(data=st.data())
def test_match_emits_the_engines_samples_along_the_path(data):
    draft, target, *_ = data.draw(problems("token"))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    sampled = torch.randint(0, target.shape[2], target.shape[:2], generator=generator)
    verdict = match(sampled, draft)
    parents, lengths = draft.explicit_parents().tolist(), draft.lengths.tolist()
    for row in range(draft.batch_size):
        node, emitted = -1, []
        while True:
            token = sampled[row, node + 1].item()
            emitted.append(token)
            children = [i for i in range(lengths[row]) if parents[row][i] == node]
            agreeing = [i for i in children if draft.tokens[row, i] == token]
            if not agreeing:
                break
            node = agreeing[0]
        assert verdict.tokens[row].tolist() == emitted + [-1] * (draft.depth + 1 - len(emitted))


@FAST
@given(data=st.data())
def test_token_rule_on_one_hot_is_match(data):
    draft, target, *_ = data.draw(problems("token"))
    sampled = target.argmax(2)
    greedy = torch.nn.functional.one_hot(sampled, target.shape[2]).float()
    assert same(verify(greedy, replace(draft, probs=None)), match(sampled, draft))
