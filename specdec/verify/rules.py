"""The rules by name, and `verify`, the one door to all of them."""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial

from torch import Tensor

from specdec.verify.block import judge_block
from specdec.verify.checks import check_shapes, check_unbranched, check_values
from specdec.verify.draft import Draft, Verdict
from specdec.verify.token import judge_token
from specdec.verify.traversal import judge_traversal
from specdec.verify.typical import judge_typical

Judge = Callable[[Tensor, Draft, Tensor | None, Tensor | None], Verdict]


@dataclass(frozen=True)
class Rule:
    """A way to decide which draft tokens to keep.

    Attributes:
        name: its name in reports and in `verify(rule=...)`.
        judge: (target_probs, draft, uniforms, noise) -> Verdict, without checks; None when the
            engine samples the tokens itself, as in `match`.
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


def typical(epsilon: float = 0.09, alpha: float = 0.3) -> Rule:
    """Build the typical rule with its two thresholds, Medusa's defaults.

    Raises:
        ValueError: a threshold is not above 0.

    Source: Medusa, arXiv 2401.10774, section 2.3.1.
    """
    for name, value in (("epsilon", epsilon), ("alpha", alpha)):
        if not value > 0:
            raise ValueError(f"{name} is {value} but must be above 0 (rule 'typical')")
    judge = partial(judge_typical, epsilon=epsilon, alpha=alpha)
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
            either is allowed only where every target row is one-hot (temperature 0).
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
    check_shapes(target_probs, draft, chosen.name, uniforms, noise)
    if check:
        check_values(
            target_probs, draft, chosen.name, uniforms, noise, needs_uniforms=chosen.needs_uniforms
        )
        if not chosen.supports_trees:
            check_unbranched(draft, chosen.name)
    return chosen.judge(target_probs, draft, uniforms, noise)
