"""What a rule is: a name, what it promises, and the function that judges."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from specdec.verify.draft import Draft, Verdict

Judge = Callable[[Tensor, Draft, Tensor | None, Tensor | None], Verdict]


@dataclass(frozen=True)
class Rule:
    """A way to decide which draft tokens to keep.

    Attributes:
        name: what reports and `verify(rule=...)` call it.
        lossless: emitted tokens have the target's joint distribution, provided that `Draft.probs`
            is the true law of every node given its path and its earlier siblings.
        supports_trees: branching drafts are allowed.
        needs_draft_probs: reads `Draft.probs`. A sampled draft that does not report them is judged
            as a point mass, which is lossless but accepts less.
        judge: (target_probs, draft, uniforms, noise) -> Verdict, without checks; None when the
            engine samples the tokens itself, as in `match`.
        needs_uniforms: the judge reads `uniforms`.
    """

    name: str
    lossless: bool
    supports_trees: bool
    needs_draft_probs: bool
    judge: Judge | None
    needs_uniforms: bool = True
