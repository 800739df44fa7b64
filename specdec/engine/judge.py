"""From the target's logits to a verdict, and to the figures of it that the host is told."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from specdec.common.compile import NODES, ROWS, WIDTH, CannotCompileError, Piece, compile_piece
from specdec.sampling.randomness import row_exponentials, row_uniforms
from specdec.sampling.sampler import Sampler, sample
from specdec.verify import Draft, Rule, Verdict, match, verify
from specdec.verify.path import plain
from specdec.verify.tree import node_depths

# Streams of the per-row randomness; drafters take theirs from 16 upwards.
UNIFORM_STREAM, NOISE_STREAM = 0, 1
# A verdict, and for the host [B, 5 + D] int64: draft tokens accepted, nodes drafted, the deepest
# level tested, whether the row's logits are finite, and the verdict's tokens.
Judgment = tuple[Verdict, Tensor]


class Judge:
    """Judges drafts by a rule.

    Beside a compiled target a chain is judged by one compiled piece: from the logits on at
    temperature 0, and from the processed probabilities on elsewhere.
    """

    def __init__(self, rule: Rule, is_compiled: bool) -> None:
        self._rule, self._is_compiled = rule, is_compiled

    def __call__(
        self, sampler: Sampler, logits: Tensor, draft: Draft, counters: Tensor
    ) -> Judgment:
        """Judge drafts by logits [B, N + 1, V]; `counters` [B] are the committed tokens."""
        scores = sampler.scores(logits, draft)
        if sampler.is_greedy:
            return self._run(_judge_greedy, draft, scores)
        is_finite = _are_finite(scores.amax(-1), draft.lengths)
        given = sampler.probs(scores), is_finite, sampler.seeds, counters
        if self._rule.judge:
            return self._run(partial(_judge_sampled, self._rule), draft, *given)
        return _judge_drawn(draft, *given)

    def _run(self, judge: Callable[..., Judgment], draft: Draft, *given: Tensor) -> Judgment:
        """Run a judge, of a chain beside a compiled target as compiled code."""
        if not self._is_compiled or draft.parents is not None or draft.num_nodes == 0:
            return judge(draft, *given)
        drawn = () if draft.probs is None else (draft.probs,)
        inputs = [draft.tokens, draft.lengths, *given, *drawn]
        piece = _piece(judge, len(given), inputs)
        if piece is None:
            return judge(draft, *given)
        *verdict, figures = piece([each.contiguous() for each in inputs])
        return Verdict(*verdict), figures


_PIECES: dict[object, Piece | None] = {}


def _piece(judge: Callable[..., Judgment], num_given: int, inputs: list[Tensor]) -> Piece | None:
    """Compile a judge of chains, once in a process; None where that is not possible."""
    first = inputs[2]  # logits or probabilities
    rule = judge.args[0].name if isinstance(judge, partial) else "greedy"
    key = rule, len(inputs), first.shape[2], first.dtype, first.device
    if key in _PIECES:
        return _PIECES[key]

    def run(tokens: Tensor, lengths: Tensor, *rest: Tensor) -> list[Tensor]:
        draft = Draft.chain(tokens, lengths, *rest[num_given:])
        verdict, figures = judge(draft, *rest[:num_given])
        return [*vars(verdict).values(), figures]

    each_ndim: dict[int, list[str | None]] = {
        1: [ROWS],
        2: [ROWS, NODES],
        3: [ROWS, WIDTH, None],
    }
    names = [each_ndim[each.ndim] for each in inputs]
    if len(inputs) > 2 + num_given:
        names[-1] = [ROWS, NODES, None]  # distributions that the nodes were drawn from
    sizes = {ROWS: 2, NODES: 3, WIDTH: 4, None: first.shape[2]}
    examples = [
        each.new_ones([sizes[name] for name in own])
        for own, each in zip(names, inputs, strict=True)
    ]
    try:
        _PIECES[key] = compile_piece(run, examples, names)
    except CannotCompileError:
        _PIECES[key] = None
    return _PIECES[key]


def _judge_greedy(draft: Draft, scores: Tensor) -> Judgment:
    best, likeliest = scores.max(-1)  # [B, N + 1]; a NaN wins the maximum
    if draft.num_nodes == 0:
        return _told(plain(draft, likeliest[:, 0]), draft, best[:, 0].isfinite())
    return _told(match(likeliest, draft), draft, _are_finite(best, draft.lengths))


def _judge_sampled(
    rule: Rule, draft: Draft, probs: Tensor, is_finite: Tensor, seeds: Tensor, counters: Tensor
) -> Judgment:
    uniforms = row_uniforms(seeds, counters, UNIFORM_STREAM, draft.num_nodes)
    noise = row_exponentials(seeds, counters, NOISE_STREAM, probs.shape[2])
    if draft.num_nodes == 0 or rule.judge is None:
        verdict = verify(probs, draft, rule=rule, uniforms=uniforms, noise=noise, check=False)
    else:  # without the checks of shapes, which compiled code has no numbers for
        verdict = rule.judge(probs, draft, uniforms, noise)
    return _told(verdict, draft, is_finite)


def _judge_drawn(
    draft: Draft, probs: Tensor, is_finite: Tensor, seeds: Tensor, counters: Tensor
) -> Judgment:
    """Draw every token, with noise by position, so that its draw ignores the draft."""
    if draft.parents is None:
        depths = torch.arange(1, draft.num_nodes + 1, device=probs.device)
        depths = depths.expand(draft.batch_size, -1)
    else:
        depths = node_depths(draft.explicit_parents(), draft.depth)
    positions = counters.unsqueeze(1) + pad(depths, (1, 0))
    rows = seeds.unsqueeze(1).expand_as(positions).flatten()
    noise = row_exponentials(rows, positions.flatten(), NOISE_STREAM, probs.shape[2])
    return _told(match(sample(probs, noise.view_as(probs)), draft), draft, is_finite)


def _are_finite(best: Tensor, lengths: Tensor) -> Tensor:
    """Tell the rows [B] whose best scores [B, N + 1] are finite, padding left aside."""
    rows = torch.arange(best.shape[1], device=best.device)
    return ((best.abs() < torch.inf) | (rows > lengths.unsqueeze(1))).all(1)


def _told(verdict: Verdict, draft: Draft, is_finite: Tensor) -> Judgment:
    depth_tested = verdict.tested.sum(1)
    if draft.parents is not None and draft.num_nodes:
        depth_tested = (node_depths(draft.parents, draft.depth) * verdict.tested).amax(1)
    figures = torch.stack([verdict.num_accepted, draft.lengths, depth_tested, is_finite], 1)
    return verdict, torch.cat([figures, verdict.tokens], 1)
