"""What a draft of so many nodes is expected to be worth, from the steps so far.

Every step forgets a little of the ones before, so that the estimates follow the text.
"""

from collections.abc import Sequence
from math import log2

from specdec.metrics import StepRecord

# What is believed before anything was seen, and how many observations that is worth.
GUESS, GUESS_WEIGHT, MEASURED_WEIGHT = 0.6, 2.0, 8.0
# An estimate that has not been tested for long counts as so many observations: new ones prevail.
LEAST_WEIGHT = 3.0


class ChainAcceptance:
    """Acceptance by depth, each given that the depth above was accepted.

    A depth that is seldom tested leans on the estimate of the depth above.

    Args:
        max_nodes: longest chain.
        half_life: steps after which an observation counts half.
        acceptance: by depth, as a first belief; depths behind its end are like the last of it.
    """

    def __init__(
        self, max_nodes: int, half_life: float, acceptance: Sequence[float] | None = None
    ) -> None:
        known = list(acceptance or [GUESS])[:max_nodes]
        self._rates = known + [known[-1]] * (max_nodes - len(known))
        self._weights = [MEASURED_WEIGHT if acceptance else GUESS_WEIGHT] * max_nodes
        self._keep = 0.5 ** (1 / half_life)

    def expected(self) -> list[float]:
        """Accepted tokens of a chain of 0, 1, ... nodes."""
        totals, above, reached = [0.0], self._rates[0], 1.0
        for rate, weight in zip(self._rates, self._weights, strict=True):
            above = (weight * rate + LEAST_WEIGHT * above) / (weight + LEAST_WEIGHT)
            reached *= above
            totals.append(totals[-1] + reached)
        return totals

    def learn(self, records: Sequence[StepRecord], chosen: int) -> None:
        """Take in a step: depth d was tested where d - 1 were accepted and d drafted."""
        self._weights = [weight * self._keep for weight in self._weights]
        if not chosen:
            return
        for record in records:
            deepest = min(record.num_drafted, record.num_accepted + 1, len(self._rates))
            for depth in range(deepest):
                self._weights[depth] = max(self._weights[depth], LEAST_WEIGHT) + 1
                error = (record.num_accepted > depth) - self._rates[depth]
                self._rates[depth] += error / self._weights[depth]


class TreeAcceptance:
    """Accepted tokens by node budget, because a smaller tree is not the top of a larger one.

    A budget that was seldom tried leans on the others: accepted tokens grow about with the
    logarithm of a tree's size (Sequoia, arXiv 2402.12374).

    Args:
        budgets: numbers of nodes that may be asked for.
        half_life: steps after which an observation counts half.
        acceptance: by depth, as a first belief; its first entry sets the scale.
    """

    def __init__(
        self, budgets: Sequence[int], half_life: float, acceptance: Sequence[float] | None = None
    ) -> None:
        self._scale = (acceptance or [GUESS])[0]
        self._weights = dict.fromkeys(budgets, 0.0)
        self._means = {nodes: self._scale * log2(1 + nodes) for nodes in budgets}
        self._guess_weight = MEASURED_WEIGHT if acceptance else GUESS_WEIGHT
        self._keep = 0.5 ** (1 / half_life)

    def expected(self) -> list[float]:
        """Accepted tokens of trees of 0, 1, ... nodes; 0 for those that may not be asked for."""
        totals = [0.0] * (max(self._means) + 1)
        for nodes, mean in self._means.items():
            weight, usual = self._weights[nodes], self._scale * log2(1 + nodes)
            totals[nodes] = (weight * mean + LEAST_WEIGHT * usual) / (weight + LEAST_WEIGHT)
        return totals

    def learn(self, records: Sequence[StepRecord], chosen: int) -> None:
        """Take in a step that was asked for `chosen` nodes a row."""
        self._weights = {nodes: weight * self._keep for nodes, weight in self._weights.items()}
        self._guess_weight *= self._keep
        if not chosen:
            return
        for record in records:
            # A drafter that found fewer, or a row near its end, says little about this budget.
            if 2 * record.num_drafted < chosen:
                continue
            self._weights[chosen] += 1
            error = record.num_accepted - self._means[chosen]
            self._means[chosen] += error / max(self._weights[chosen], 1)
            self._guess_weight = max(self._guess_weight, LEAST_WEIGHT) + 1
            usual = self._scale * log2(1 + chosen)
            share = (record.num_accepted - usual) / self._guess_weight
            self._scale += share / log2(1 + chosen)
