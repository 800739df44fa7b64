"""Whether a drafter draws its tokens from the distributions it reports.

No rule can be lossless without it, and nothing inside a rule can notice.
"""

import math
from collections.abc import Callable, Sequence

import torch

from specdec.verify.checks import check_values
from specdec.verify.draft import Draft
from specdec.verify.report import Finding, Report


def check_drafter(
    propose: Callable[[int], Draft],
    vocab_size: int,
    num_drafts: int = 400,
    subject: str = "drafter",
    false_alarm: float = 1e-6,
) -> Report:
    """Check that the `probs` a drafter reports are the law of the tokens it draws.

    A token drawn from q has, given everything before it, E[1(x = v)] = q(v) for every v and
    E[q(x)] = sum of q^2. Both differences are summed over drafts and nodes and must be zero within
    chance. An argmax reported with full probabilities fails the second; a tree pruned after its
    tokens were seen, or a temperature that was left out, fails one of the two.

    Args:
        propose: draws a draft for one fixed context; only the seed differs between calls. A drafter
            that samples but reports no probs is noted: lossless, but accepted less than it could.
        vocab_size: V.
        num_drafts: seeds 0 .. num_drafts - 1.
        subject: what the report calls it.
        false_alarm: probability that an honest drafter is refused.
    """
    drafts = [propose(seed) for seed in range(num_drafts)]
    findings = _check_proposals(drafts, vocab_size)
    notes: tuple[str, ...] = ()
    if not findings and all(draft.probs is None for draft in drafts):
        notes = _note_sampled_point_mass(drafts)
    elif not findings:
        findings = _check_reported_probs(drafts, vocab_size, false_alarm)
    return Report(subject, num_drafts, tuple(findings), notes)


def _check_proposals(drafts: Sequence[Draft], vocab_size: int) -> list[Finding]:
    """Check every draft's own values, with the checks of `verify`."""
    for seed, draft in enumerate(drafts):
        if (draft.probs is None) != (drafts[0].probs is None):
            return [Finding("probs", f"seed {seed} and seed 0 disagree on reporting probs")]
        target = torch.zeros(draft.batch_size, draft.num_nodes + 1, vocab_size)
        target[:, :, 0] = 1
        try:
            check_values(target.to(draft.tokens.device), draft, "any", None, None)
        except (ValueError, RuntimeError) as error:
            return [Finding("draft", f"seed {seed}: {error}")]
    return []


def _note_sampled_point_mass(drafts: Sequence[Draft]) -> tuple[str, ...]:
    first = drafts[0]
    for seed, draft in enumerate(drafts):
        same = draft.tokens.shape == first.tokens.shape and torch.equal(draft.tokens, first.tokens)
        if not same:
            cost = "lossless, but reporting probs would get more of them accepted"
            return (f"seeds 0 and {seed} drew other tokens and no probs are reported: {cost}",)
    return ()


def _check_reported_probs(
    drafts: Sequence[Draft], vocab_size: int, false_alarm: float
) -> list[Finding]:
    num_tests = vocab_size + 1
    # Bernstein's inequality for martingales: increments are at most 1.
    budget = math.log(2 * num_tests / false_alarm)
    counts = torch.zeros(vocab_size, dtype=torch.float64)
    count_variance = torch.zeros_like(counts)
    match_sum, match_variance, num_drawn = 0.0, 0.0, 0
    for draft in drafts:
        assert draft.probs is not None
        real = draft.real_nodes()
        probs = draft.probs[real].double().cpu()  # [R, V]
        drawn = torch.nn.functional.one_hot(draft.tokens[real].cpu(), vocab_size).double()
        counts += (drawn - probs).sum(0)
        count_variance += (probs * (1 - probs)).sum(0)
        expected = (probs * probs).sum(1)
        match_sum += ((drawn * probs).sum(1) - expected).sum().item()
        match_variance += ((probs**3).sum(1) - expected**2).sum().item()
        num_drawn += probs.shape[0]

    findings = []
    if abs(match_sum) > _chance(match_variance, budget):
        direction = "more" if match_sum > 0 else "less"
        findings.append(
            Finding(
                "reported probs",
                f"drawn tokens are {direction} likely under the reported probs than draws from "
                f"them would be, by {abs(match_sum) / max(num_drawn, 1):.2g} a token over "
                f"{num_drawn} tokens. Argmax and top-k are point masses: report probs=None",
            )
        )
    limits = torch.tensor([_chance(variance, budget) for variance in count_variance.tolist()])
    excess = counts.abs() - limits
    if num_drawn and excess.max() > 0:
        token = int(excess.argmax())
        findings.append(
            Finding(
                "reported probs",
                f"token {token} was drawn {counts[token]:+.0f} times against what the reported "
                f"probs say, over {num_drawn} tokens; chance explains {limits[token]:.0f}",
            )
        )
    return findings


def _chance(variance: float, budget: float) -> float:
    """Bound a sum of zero-mean increments of at most 1 with this variance, by Bernstein."""
    return budget / 3 + math.sqrt(budget * budget / 9 + 2 * budget * variance)
