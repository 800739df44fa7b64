"""The conformance kit passes what is right and says in words what is wrong."""

from dataclasses import replace

import pytest
import torch

from specdec.verify import Draft, Verdict, verify
from specdec.verify.conformance import (
    ConformanceError,
    check_drafter,
    check_engine,
    check_rule,
)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("rule", ["token", "block", "traversal"])
def test_the_lossless_rules_conform(rule):
    report = check_rule(rule)
    assert report.passed, str(report)


def test_a_lossy_rule_is_noted_and_not_failed():
    report = check_rule("typical")
    assert report.passed
    assert "lossy by declaration: total variation up to 0." in str(report)


def _engine(spoil):
    def engine(target_probs, draft, *, uniforms, noise) -> Verdict:
        return spoil(target_probs, draft, uniforms, noise)

    return engine


def _misreads_draft_probs(target, draft, uniforms, noise):
    if draft.probs is not None:
        sharp = draft.probs**2
        draft = replace(draft, probs=sharp / sharp.sum(2, keepdim=True))
    return verify(target, draft, uniforms=uniforms, noise=noise, check=False)


def _draws_the_last_token_from_the_target(target, draft, uniforms, noise):
    verdict = verify(target, draft, uniforms=uniforms, noise=noise, check=False)
    last_row = verdict.path.amax(1) + 1
    row = target[torch.arange(len(last_row)), last_row]
    last = (row / noise).argmax(1)
    tokens = verdict.tokens.scatter(1, verdict.num_accepted[:, None], last[:, None])
    return replace(verdict, tokens=tokens)


def _accepts_at_equality(target, draft, uniforms, noise):
    return verify(target, draft, uniforms=uniforms * 0.9, noise=noise, check=False)


def _claims_to_be_token_but_is_typical(target, draft, uniforms, noise):
    return verify(target, draft, rule="typical", noise=noise, check=False)


@pytest.mark.parametrize(
    "spoil",
    [
        _misreads_draft_probs,
        _draws_the_last_token_from_the_target,
        _accepts_at_equality,
        _claims_to_be_token_but_is_typical,
    ],
)
def test_biased_engine_is_caught_with_its_bias(spoil):
    report = check_engine(_engine(spoil), dtype=torch.float64)
    assert any(finding.check == "losslessness" for finding in report.findings)
    with pytest.raises(ConformanceError, match="total variation to the target is 0"):
        report.raise_if_failed()


def _reads_its_neighbour(target, draft, uniforms, noise):
    return verify(target, draft, uniforms=uniforms.roll(1, 0), noise=noise, check=False)


def _reads_padding(target, draft, uniforms, noise):
    whole = replace(
        draft,
        tokens=draft.tokens.clamp(min=0),
        lengths=torch.full_like(draft.lengths, draft.num_nodes),
    )
    return verify(target, whole, uniforms=uniforms, noise=noise, check=False)


@pytest.mark.parametrize(
    ("spoil", "check"), [(_reads_its_neighbour, "neighbours"), (_reads_padding, "tested")]
)
def test_a_broken_contract_is_named(spoil, check):
    report = check_engine(_engine(spoil), dtype=torch.float64)
    assert check in {finding.check for finding in report.findings}


PROBS = torch.softmax(torch.tensor([[0.0, 0.5, 1.0, 1.5], [1.5, 0.0, 0.5, 0.5]]), 1)


def _sample(seed: int, probs: torch.Tensor = PROBS) -> torch.Tensor:
    return torch.multinomial(probs, 1, generator=torch.Generator().manual_seed(seed)).T


def test_an_honest_drafter_conforms():
    assert check_drafter(lambda seed: Draft.chain(_sample(seed), probs=PROBS[None]), 4).passed


def test_siblings_without_replacement_conform():
    def propose(seed: int) -> Draft:
        generator = torch.Generator().manual_seed(seed)
        first = int(torch.multinomial(PROBS[0], 1, generator=generator))
        left = PROBS[0].clone()
        left[first] = 0
        left = left / left.sum()
        second = int(torch.multinomial(left, 1, generator=generator))
        probs = torch.stack((PROBS[0], left))[None]
        parents = torch.tensor([-1, -1])
        return Draft.tree(torch.tensor([[first, second]]), parents, depth=1, probs=probs)

    assert check_drafter(propose, 4).passed


def test_argmax_reported_with_probabilities_is_caught():
    report = check_drafter(lambda seed: Draft.chain(PROBS.argmax(1)[None], probs=PROBS[None]), 4)
    assert "point masses: report probs=None" in str(report)
    with pytest.raises(ConformanceError):
        report.raise_if_failed()


def test_unreported_temperature_is_caught():
    sharp = PROBS**3 / (PROBS**3).sum(1, keepdim=True)
    report = check_drafter(lambda seed: Draft.chain(_sample(seed, sharp), probs=PROBS[None]), 4)
    assert "more likely under the reported probs" in str(report)


def test_tree_pruned_by_its_tokens_is_caught():
    def propose(seed: int) -> Draft:
        draft = Draft.chain(_sample(seed), probs=PROBS[None])
        likely = draft.probs.gather(2, draft.tokens[:, :, None])[0, :, 0] > 0.2
        return replace(draft, lengths=likely.long().cumprod(0).sum(0, keepdim=True))

    assert not check_drafter(propose, 4).passed


def test_sampled_tokens_without_probs_are_lossless_and_noted():
    report = check_drafter(lambda seed: Draft.chain(_sample(seed)), 4)
    assert report.passed
    assert "reporting probs would get more of them accepted" in str(report)


def test_sampled_draft_as_point_mass_is_lossless():
    def engine(target_probs, draft, *, uniforms, noise) -> Verdict:
        blind = replace(draft, probs=None)
        return verify(target_probs, blind, uniforms=uniforms, noise=noise, check=False)

    assert check_engine(engine, dtype=torch.float64).passed


def test_argmax_as_point_mass_conforms():
    assert check_drafter(lambda seed: Draft.chain(PROBS.argmax(1)[None]), 4).passed


def test_malformed_drafts_are_findings_and_not_crashes():
    report = check_drafter(lambda seed: Draft.chain(torch.tensor([[9]])), 4, num_drafts=2)
    assert "seed 0: tokens: row 0, entry 0 has 9" in str(report)
