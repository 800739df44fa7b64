"""The rules by name, and `verify`, the one door to all of them."""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial

import torch
from torch import Tensor

from specdec.verify.checks import check_shapes, draft_faults, randomness_faults, refuse
from specdec.verify.draft import Draft, Verdict
from specdec.verify.path import choose, emit, match, plain, with_bonus
from specdec.verify.residual import draw, select_row, token_probs, work_dtype
from specdec.verify.token import judge_token
from specdec.verify.traversal import judge_block, judge_traversal
from specdec.verify.tree import node_paths

Judge = Callable[[Tensor, Draft, Tensor, Tensor], Verdict]


@dataclass(frozen=True)
class Rule:
    """A way to decide which draft tokens to keep.

    Attributes:
        name: its name in reports and in `verify(rule=...)`.
        judge: (target_probs, draft, uniforms, noise) -> Verdict, without checks, of a draft with
            nodes; None when the engine samples the tokens itself, as in `match`.
        lossless: emitted tokens have the target's joint distribution, provided that `Draft.probs`
            is the true distribution of every node given its path and its earlier siblings.
        supports_trees: branching drafts are allowed.
        needs_draft_probs: it reads `Draft.probs`. A sampled draft that does not report them is
            judged as a point mass, which is lossless but accepts less.
        needs_uniforms: the judge reads `uniforms`.
    """

    name: str
    judge: Judge | None
    lossless: bool = True
    supports_trees: bool = True
    needs_draft_probs: bool = True
    needs_uniforms: bool = True


def _judge_typical(
    target_probs: Tensor,
    draft: Draft,
    uniforms: Tensor,
    noise: Tensor,
    *,
    epsilon: float,
    alpha: float,
) -> Verdict:
    real = draft.real_nodes()
    tokens = draft.tokens.masked_fill(~real, 0)
    parents = draft.explicit_parents()
    own = token_probs(target_probs, parents + 1, tokens)
    entropy = torch.special.entr(target_probs.to(work_dtype(target_probs))).sum(2)
    thresholds = (alpha * torch.exp(-entropy)).clamp(max=epsilon)  # [B, N + 1]
    accepted = real & (own > thresholds.gather(1, parents + 1))

    paths = node_paths(parents, draft.depth)  # [B, N, D]
    on_path = paths >= 0
    steps = paths.clamp(min=0).flatten(1)  # [B, N * D]
    kept = (accepted.gather(1, steps).view_as(paths) | ~on_path).all(2)
    likelihood = own.log().gather(1, steps).view_as(paths).masked_fill(~on_path, 0).sum(2)

    length = on_path.sum(2).masked_fill(~kept, 0)
    num_accepted = length.amax(1)
    longest = kept & (length == num_accepted.unsqueeze(1))
    best = likelihood.masked_fill(~longest, float("-inf")).argmax(1)  # any node where none is kept
    batch = torch.arange(best.shape[0], device=best.device)
    path = paths[batch, best].masked_fill((num_accepted == 0).unsqueeze(1), -1)
    last = draw(select_row(target_probs, path.amax(1) + 1), noise)
    return emit(draft, path, num_accepted, last, real)


def typical(epsilon: float = 0.09, alpha: float = 0.3) -> Rule:
    """Build the typical rule with its two thresholds, Medusa's defaults. It is lossy.

    It accepts x where P(x) > min(epsilon, alpha exp(-entropy(P))) and follows the longest path;
    among the longest the likeliest wins. `uniforms` are not used: only the last token is drawn,
    from the target itself. `tested` marks every real node.

    Raises:
        ValueError: a threshold is not above 0.

    Source: Medusa, arXiv 2401.10774, section 2.3.1.
    """
    for name, value in (("epsilon", epsilon), ("alpha", alpha)):
        if not value > 0:
            raise ValueError(f"{name} is {value} but must be above 0 (rule 'typical')")
    judge = partial(_judge_typical, epsilon=epsilon, alpha=alpha)
    return Rule("typical", judge, lossless=False, needs_draft_probs=False, needs_uniforms=False)


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("token", judge_token),
        Rule("block", judge_block, supports_trees=False),
        Rule("traversal", judge_traversal),
        typical(),
        Rule("match", judge=None, needs_draft_probs=False),
    )
}


def get_rule(rule: str | Rule) -> Rule:
    """Look a rule up by name; a `Rule` is returned as it is.

    Raises:
        ValueError: there is no rule of that name.
    """
    if isinstance(rule, Rule):
        return rule
    if not isinstance(rule, str) or rule not in RULES:
        close = get_close_matches(str(rule), RULES, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"rule is {rule!r}: {hint}the rules are {', '.join(RULES)}")
    return RULES[rule]


def verify(
    target_probs: Tensor,
    draft: Draft,
    *,
    rule: str | Rule = "token",
    uniforms: Tensor | None = None,
    noise: Tensor | None = None,
    bonus_tokens: Tensor | None = None,
    greedy: Tensor | None = None,
    check: bool = True,
) -> Verdict:
    """Decide which nodes of a draft the target keeps, and draw the token after them.

    Pure: no model, no cache, no global random state and, with `check=False`, no host
    synchronization.

    Args:
        target_probs: [B, N + 1, V] processed probabilities, float16, bfloat16, float32 or float64.
            Row 0 follows the root, row i + 1 follows node i. Penalties, temperature, top-k and so
            on are the engine's business. Rows past `draft.lengths` may hold anything.
        draft: the proposed nodes, and the distributions they were drawn from.
        rule: a name in `RULES`, or a `Rule`.
        uniforms: [B, N] i.i.d. uniform on [0, 1); node i is accepted iff uniforms[:, i] < a.
        noise: [B, V] i.i.d. Exp(1); the last token is argmax(residual / noise). None for
            either is allowed only where every row is greedy or one-hot (temperature 0).
        bonus_tokens: [B] int64 tokens that the engine sampled itself, to stand behind chains that
            are accepted whole. The target's rows there are not read.
        greedy: [B] bool rows at temperature 0: the argmax of their `target_probs`, which may be
            logits, is judged by `match`, as any lossless rule judges one-hot rows.
        check: also check values, which reads them back to the host. Shapes are always checked.

    Returns:
        The verdict; each rule's judge explains its `tested`.

    Raises:
        ValueError: names the argument, the row, the value and the rule.
        TypeError: a tensor has the wrong dtype.
    """
    chosen = get_rule(rule)
    if chosen.judge is None:
        raise ValueError(
            f"rule {chosen.name!r} judges tokens that the engine sampled itself: "
            "call specdec.verify.match(sampled, draft)"
        )
    shape, name = tuple(target_probs.shape), chosen.name
    if len(shape) != 3 or not shape[2]:
        raise ValueError(f"target_probs has shape {shape} but rule {name!r} needs [B, N + 1, V]")
    sizes = shape[0], shape[2], target_probs.device
    check_shapes(draft, name, *sizes, target_probs, uniforms, noise, bonus_tokens, greedy)
    if check:
        refuse(draft_faults(draft, shape[2], chosen.supports_trees), name)
        given = uniforms, noise, chosen.needs_uniforms, bonus_tokens, greedy
        refuse(randomness_faults(draft, target_probs, *given), name)
    if noise is None:  # rows are one-hot: any noise draws their token, and ...
        noise = torch.ones_like(target_probs[:, 0])
    if draft.num_nodes == 0 or draft.depth == 0:
        verdict = plain(draft, draw(target_probs[:, 0].to(work_dtype(target_probs)), noise))
    else:
        if uniforms is None:  # ... all acceptances are 0 or 1, and this is between them
            uniforms = torch.full_like(draft.tokens, 0.5, dtype=noise.dtype)
        verdict = chosen.judge(target_probs, draft, uniforms, noise)
    if greedy is not None:
        verdict = choose(greedy, match(target_probs.max(2).indices, draft), verdict)
    return verdict if bonus_tokens is None else with_bonus(verdict, draft, bonus_tokens)
