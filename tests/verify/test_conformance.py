"""The conformance kit passes what is right and says in words what is wrong."""

from dataclasses import replace

import pytest
import torch

from specdec.verify import Draft, verify
from specdec.verify.conformance import ConformanceError, check_drafter, check_engine, check_rule

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("rule", ["token", "block", "traversal", "typical"])
def test_every_rule_conforms_and_a_lossy_one_is_noted(rule):
    report = check_rule(rule)
    assert report.passed, str(report)
    note = "lossy by declaration: total variation up to 0."
    assert (note in str(report)) is (rule == "typical")


def judge(target, draft, uniforms, noise, rule="token"):
    return verify(target, draft, rule=rule, uniforms=uniforms, noise=noise, check=False)


def misreads_draft_probs(target, draft, uniforms, noise):
    if draft.probs is not None:
        sharp = draft.probs**2
        draft = replace(draft, probs=sharp / sharp.sum(2, keepdim=True))
    return judge(target, draft, uniforms, noise)


def draws_the_last_token_from_the_target(target, draft, uniforms, noise):
    verdict = judge(target, draft, uniforms, noise)
    last_row = verdict.path.amax(1) + 1
    last = (target[torch.arange(len(last_row)), last_row] / noise).argmax(1)
    tokens = verdict.tokens.scatter(1, verdict.num_accepted[:, None], last[:, None])
    return replace(verdict, tokens=tokens)


def accepts_at_equality(target, draft, uniforms, noise):
    return judge(target, draft, uniforms * 0.9, noise)


def claims_to_be_token_but_is_typical(target, draft, uniforms, noise):
    return judge(target, draft, uniforms, noise, "typical")


def reads_its_neighbor(target, draft, uniforms, noise):
    return judge(target, draft, uniforms.roll(1, 0), noise)


def reads_padding(target, draft, uniforms, noise):
    lengths = torch.full_like(draft.lengths, draft.num_nodes)
    draft = replace(draft, tokens=draft.tokens.clamp(min=0), lengths=lengths)
    return judge(target, draft, uniforms, noise)


@pytest.mark.parametrize(
    ("spoiled", "check", "message"),
    [
        (misreads_draft_probs, "losslessness", "total variation to the target is 0"),
        (draws_the_last_token_from_the_target, "losslessness", "variation to the target is 0"),
        (accepts_at_equality, "losslessness", "total variation to the target is 0"),
        (claims_to_be_token_but_is_typical, "losslessness", "total variation to the target is 0"),
        (reads_its_neighbor, "neighbors", "other rows in the batch change row"),
        (reads_padding, "tested", "path, tested and real nodes are not nested"),
    ],
)
def test_broken_engine_is_caught_and_the_promise_named(spoiled, check, message):
    report = check_engine(lambda t, d, **random: spoiled(t, d, **random), dtype=torch.float64)
    assert check in {finding.check for finding in report.findings}
    with pytest.raises(ConformanceError, match=message):
        report.raise_if_failed()


def test_sampled_draft_as_point_mass_is_lossless():
    def engine(target, draft, **randomness):
        return judge(target, replace(draft, probs=None), **randomness)

    assert check_engine(engine, dtype=torch.float64).passed


PROBS = torch.softmax(torch.tensor([[0.0, 0.5, 1.0, 1.5], [1.5, 0.0, 0.5, 0.5]]), 1)
SHARP = PROBS**3 / (PROBS**3).sum(1, keepdim=True)


def sampled(seed, probs=PROBS, reported=PROBS[None]):
    generator = torch.Generator().manual_seed(seed)
    return Draft.chain(torch.multinomial(probs, 1, generator=generator).T, probs=reported)


def without_replacement(seed):
    generator = torch.Generator().manual_seed(seed)
    first = torch.multinomial(PROBS[0], 1, generator=generator)
    left = PROBS[0].index_fill(0, first, 0)
    left = left / left.sum()
    tokens = torch.cat((first, torch.multinomial(left, 1, generator=generator)))[None]
    probs = torch.stack((PROBS[0], left))[None]
    return Draft.tree(tokens, torch.tensor([-1, -1]), depth=1, probs=probs)


def pruned_by_its_tokens(seed):
    draft = sampled(seed)
    likely = draft.probs.gather(2, draft.tokens[:, :, None])[0, :, 0] > 0.2
    return replace(draft, lengths=likely.long().cumprod(0).sum(0, keepdim=True))


ARGMAX = PROBS.argmax(1)[None]
DRAFTERS = {
    "honest": (sampled, True, ""),
    "siblings without replacement": (without_replacement, True, ""),
    "argmax as point mass": (lambda seed: Draft.chain(ARGMAX), True, ""),
    "sampled, not reported": (lambda seed: sampled(seed, reported=None), True, "get more of them"),
    "argmax with probabilities": (
        lambda seed: Draft.chain(ARGMAX, probs=PROBS[None]),
        *(False, "point masses: report probs=None"),
    ),
    "unreported temperature": (
        lambda seed: sampled(seed, SHARP),
        *(False, "more likely under the reported probs"),
    ),
    "pruned by its tokens": (pruned_by_its_tokens, False, "reported probs"),
    "no token": (
        lambda seed: Draft.chain(torch.tensor([[9]])),
        *(False, "seed 0: tokens: row 0, entry 0 has 9"),
    ),
    "reports now and then": (
        lambda seed: sampled(seed, reported=None if seed == 3 else PROBS[None]),
        *(False, "seed 3 and seed 0 disagree"),
    ),
}


@pytest.mark.parametrize("name", DRAFTERS)
def test_drafter_that_misreports_is_caught(name):
    propose, passes, message = DRAFTERS[name]
    report = check_drafter(propose, 4)
    assert report.passed == passes
    assert message in str(report)
