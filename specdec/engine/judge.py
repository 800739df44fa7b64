"""From the target's logits to a verdict, and to the figures of it that the host is told."""

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from specdec.common.compile import NODES, ROWS, WIDTH, Piece, compile_piece
from specdec.sampling.randomness import row_exponentials, row_uniforms
from specdec.sampling.sampler import Sampler, sample
from specdec.verify import Draft, Rule, Verdict, match, verify
from specdec.verify.path import plain

# Streams of the per-row randomness; drafters take theirs from 16 upwards.
UNIFORM_STREAM, NOISE_STREAM = 0, 1
# A verdict, and for the host [B, 5 + D] int64: draft tokens accepted, nodes drafted, the deepest
# level tested, whether the row's logits are finite, and the verdict's tokens.
Judgment = tuple[Verdict, Tensor]


class Judge:
    """Judges drafts by a rule; beside a compiled target, greedy chains by compiled code."""

    def __init__(self, rule: Rule, is_compiled: bool) -> None:
        self._rule, self._is_compiled = rule, is_compiled

    def __call__(
        self, sampler: Sampler, logits: Tensor, draft: Draft, counters: Tensor
    ) -> Judgment:
        """Judge drafts by logits [B, N + 1, V]; `counters` [B] are the committed tokens."""
        scores = sampler.scores(logits, draft)
        best, likeliest = scores.max(-1)  # [B, N + 1]; a NaN wins the maximum
        if sampler.is_greedy:
            if not self._is_compiled or draft.parents is not None or draft.num_nodes == 0:
                return _judge_greedy(draft, best, likeliest)
            # A drafter of the user's own may hand out views, which the piece would misread.
            tokens, lengths = draft.tokens.contiguous(), draft.lengths.contiguous()
            *verdict, figures = _piece(scores.device)([tokens, lengths, best.float(), likeliest])
            return Verdict(*verdict), figures
        given = sampler.probs(scores), _are_finite(best, draft.lengths), sampler.seeds, counters
        if self._rule.judge is None:
            return _judge_drawn(draft, *given)
        return _judge_sampled(self._rule, draft, *given)


@cache
def _piece(device: torch.device) -> Piece:
    """Compile the greedy judge of chains.

    It begins behind the argmax: Inductor's own may name a column behind the last one, where a
    vocabulary does not fill its vectors.
    """

    def run(tokens: Tensor, lengths: Tensor, best: Tensor, likeliest: Tensor) -> list[Tensor]:
        verdict, figures = _judge_greedy(Draft.chain(tokens, lengths), best, likeliest)
        return [*vars(verdict).values(), figures]

    tokens = torch.ones(2, 3, dtype=torch.long, device=device)
    rows = torch.ones(2, 4, dtype=torch.long, device=device)
    names: list[list[str | None]] = [[ROWS, NODES], [ROWS], [ROWS, WIDTH], [ROWS, WIDTH]]
    return compile_piece(run, [tokens, tokens[:, 0].clone(), rows.float(), rows.clone()], names)


def _judge_greedy(draft: Draft, best: Tensor, likeliest: Tensor) -> Judgment:
    if draft.num_nodes == 0:
        return _with_figures(plain(draft, likeliest[:, 0]), draft, best[:, 0].isfinite())
    return _with_figures(match(likeliest, draft), draft, _are_finite(best, draft.lengths))


def _judge_sampled(
    rule: Rule, draft: Draft, probs: Tensor, is_finite: Tensor, seeds: Tensor, counters: Tensor
) -> Judgment:
    uniforms = row_uniforms(seeds, counters, UNIFORM_STREAM, draft.num_nodes)
    noise = row_exponentials(seeds, counters, NOISE_STREAM, probs.shape[2])
    verdict = verify(probs, draft, rule=rule, uniforms=uniforms, noise=noise, check=False)
    return _with_figures(verdict, draft, is_finite)


def _judge_drawn(
    draft: Draft, probs: Tensor, is_finite: Tensor, seeds: Tensor, counters: Tensor
) -> Judgment:
    """Draw every token, with noise by position, so that its draw ignores the draft."""
    positions = counters.unsqueeze(1) + pad(draft.depths, (1, 0))
    rows = seeds.unsqueeze(1).expand_as(positions).flatten()
    noise = row_exponentials(rows, positions.flatten(), NOISE_STREAM, probs.shape[2])
    return _with_figures(match(sample(probs, noise.view_as(probs)), draft), draft, is_finite)


def _are_finite(best: Tensor, lengths: Tensor) -> Tensor:
    """Tell the rows [B] whose best scores [B, N + 1] are finite, padding left aside."""
    rows = torch.arange(best.shape[1], device=best.device)
    return ((best.abs() < torch.inf) | (rows > lengths.unsqueeze(1))).all(1)


def _with_figures(verdict: Verdict, draft: Draft, is_finite: Tensor) -> Judgment:
    depth_tested = verdict.tested.sum(1)
    if draft.parents is not None and draft.num_nodes:
        depth_tested = (draft.depths * verdict.tested).amax(1)
    figures = torch.stack([verdict.num_accepted, draft.lengths, depth_tested, is_finite], 1)
    return verdict, torch.cat([figures, verdict.tokens], 1)
