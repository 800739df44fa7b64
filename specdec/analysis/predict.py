"""The steps that any drafter would take along texts, from one pass or from a replay."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from specdec.analysis.expected import Expected, expect
from specdec.analysis.replay import Watch, replay
from specdec.analysis.teacher_forced import Evidence, gather_evidence
from specdec.analysis.texts import Text, check_texts
from specdec.drafters.base import FixedShape, is_forced
from specdec.engine.interfaces import Target
from specdec.registry import load_drafter
from specdec.sampling.config import SamplingConfig
from specdec.verify import get_rule

# A pass looks at least this deep and wide, so that one serves many shapes.
MIN_DEPTH, MIN_SIBLINGS = 10, 4


class Predictor:
    """Predicts acceptance along texts.

    A drafter with what `Forced` asks for, and a draft of a fixed shape, is looked at once: other
    shapes of it cost no model at all. Every other drafter is replayed.

    Args:
        target: whose texts these are.
        texts: its own answers at these settings, or others.
        sampling: without penalties.
        seed: text i is sampled with seed + i; matters to a replay of a drafter that looks at it.
        rule: verification rule of the loop.

    Raises:
        ValueError: bad texts, settings that depend on the context, or a rule whose acceptance
            cannot be worked out.
    """

    def __init__(
        self,
        target: Target,
        texts: Sequence[Text],
        sampling: SamplingConfig,
        seed: int = 0,
        rule: str = "token",
    ) -> None:
        check_texts(texts, target)
        check_settings(sampling, rule)
        self.target, self.texts = target, list(texts)
        prompts: dict[tuple[int, ...], int] = {}
        self.prompt_of = [prompts.setdefault(tuple(t.prompt), len(prompts)) for t in texts]
        self.sampling, self.seed, self.rule = sampling, seed, rule
        self._passes: dict[str, Evidence] = {}

    def predict(self, options: Mapping[str, Any]) -> Expected:
        """The expected steps of a drafter.

        Args:
            options: options of `load_drafter`.

        Raises:
            ValueError: options that cannot be used, or a sampled draft that cannot be worked out.
            FloatingPointError: NaN in anyone's logits.
        """
        drafter: Any = load_drafter(options, self.target)
        shape = drafter.fixed_shape if is_forced(drafter) else None
        if shape is None:
            return self.replayed(drafter)
        return self.expect(options, drafter, shape)

    def expect(self, options: Mapping[str, Any], drafter: Any, shape: FixedShape) -> Expected:
        """The expected steps of a drafter with what `Forced` asks for, in any fixed shape.

        Nothing is accepted of what the drafter does not draft.

        Args:
            options: that the drafter was loaded with.
            drafter: the drafter.
            shape: any.

        Raises:
            ValueError: a sampled draft that cannot be worked out.
        """
        reason = self.why_unknown(shape)
        if reason is not None:
            raise ValueError(reason)
        evidence = self.evidence(options, drafter, shape)
        found = expect(evidence, shape, sampled=self.is_sampled(shape))
        return replace(found, prompt_of=self.prompt_of)

    def replayed(self, drafter: Any, watch: Watch = lambda *step: None) -> Expected:
        """The certain steps of a fresh drafter along the texts."""
        rows = replay(self.target, drafter, self.texts, self.sampling, self.seed, watch)
        return replace(Expected.from_records(rows), prompt_of=self.prompt_of)

    def is_sampled(self, shape: FixedShape) -> bool:
        """Tell if a draft's tokens are drawn from a distribution, at these settings."""
        return not self.sampling.is_greedy and shape.children != "top"

    def why_unknown(self, shape: FixedShape) -> str | None:
        """The reason why a shape's acceptance is not worked out at these settings, or None."""
        if not self.is_sampled(shape):
            return None
        if self.rule != "token":
            return (
                f"rule is {self.rule!r}: above temperature 0 the acceptance of sampled drafts is "
                "worked out for rule 'token' only; use it, or drafts of chosen tokens"
            )
        if shape.children == "without_replacement" and shape.tree.ranks.max() > 0:
            return (
                "children is 'without_replacement': above temperature 0 the acceptance of such "
                "siblings depends on what was drawn, so it is not worked out; use "
                "children=with_replacement or top, or measure it with specdec bench"
            )
        return None

    def evidence(
        self, options: Mapping[str, Any], drafter: Any, shape: FixedShape | None = None
    ) -> Evidence:
        """The pass behind the predictions of a drafter and of all its shapes.

        Args:
            options: that the drafter was loaded with.
            drafter: with what `Forced` asks for.
            shape: one that must be covered; None asks for no more than one pass always covers.
        """
        same = {k: v for k, v in options.items() if k not in drafter.shape_options.all}
        key = json.dumps(same, sort_keys=True, default=str)
        known = self._passes.get(key)
        depth, num_siblings = MIN_DEPTH, 1
        if shape is not None and self.why_unknown(shape) is None:
            depth = max(depth, shape.tree.depth)
            if self.is_sampled(shape):
                num_siblings = int(shape.tree.ranks.max()) + 1
        # A drafter that is bound to fewer levels answers with all it has.
        looked = 0 if known is None else max(known.depth, MIN_DEPTH)
        if known is None or depth > looked or num_siblings > known.num_siblings:
            if not self.sampling.is_greedy:
                num_siblings = max(num_siblings, MIN_SIBLINGS)
            self._passes[key] = gather_evidence(
                self.target, drafter, self.texts, self.sampling, max(depth, looked), num_siblings
            )
        return self._passes[key]


def check_settings(sampling: SamplingConfig, rule: str) -> None:
    """Refuse penalties and the like, and above temperature 0 rules that are not worked out."""
    if not sampling.is_plain:
        raise ValueError(
            "sampling has penalties, a bias, bad words or min_new_tokens: with them the "
            "distributions depend on what was emitted, and acceptance is not worked out; leave "
            "them out, or measure with specdec bench"
        )
    chosen = get_rule(rule)
    if not sampling.is_greedy and chosen.name not in ("token", "match"):
        raise ValueError(
            f"rule is {rule!r}: above temperature 0 acceptance is worked out for rule 'token' (and "
            "'match' with drafts of chosen tokens); use it, or measure with specdec bench"
        )
