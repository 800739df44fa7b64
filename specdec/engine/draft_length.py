"""How many nodes the next step may draft: by a schedule, or learned as decoding goes."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import ceil, log2
from typing import Protocol

from specdec.common.arguments import checked
from specdec.engine.metrics import StepRecord

# The belief before anything was seen, and the number of observations that it is worth.
GUESS, GUESS_WEIGHT, MEASURED_WEIGHT = 0.6, 2.0, 8.0
# An estimate that has not been tested for long counts as so many observations: new ones prevail.
LEAST_WEIGHT = 3.0
# A table of costs holds an entry for every number of nodes.
MOST_NODES = 4096
# Steps without a draft once drafting no longer pays; then they double from probe to probe.
FIRST_PAUSE = 4
# Plain steps that may be lost before anything is known.
FIRST_CREDIT = 0.8
# Factor of the probe share that the credit is filled with while drafting is on.
TRUSTED = 4


class DraftLength(Protocol):
    """Chooses before every step; it knows the past alone, so that the output stays lossless."""

    def choose(self, batch_size: int) -> int | None:
        """Return the most nodes of a row in the next step; 0 decodes plainly, None is no limit."""

    def learn(self, records: Sequence[StepRecord]) -> None:
        """Take in the step's records, one a row."""


class Schedule:
    """A fixed number of nodes for each batch size.

    Above temperature 0, which tokens are drawn then depends on the batch size, except under the
    rule "match"; their distribution does not.

    Args:
        nodes: most nodes a row by batch size; the entry of the largest key that is not above the
            batch size counts, so there must be one for 1. None is no limit.

    Raises:
        ValueError: an entry that cannot be, or none for 1.
    """

    @checked
    def __init__(self, nodes: Mapping[int, int | None]) -> None:
        if 1 not in nodes:
            raise ValueError(f"nodes is {nodes} but needs an entry for batch size 1; add it")
        for size, count in nodes.items():
            if size < 1 or (count or 0) < 0:
                raise ValueError(
                    f"nodes for batch size {size} is {count} but a batch size is at least 1, and "
                    "nodes at least 0 or None for no limit"
                )
        self._nodes = dict(nodes)

    def choose(self, batch_size: int) -> int | None:
        """Return the entry of the batch size."""
        return self._nodes[max(size for size in self._nodes if size <= batch_size)]

    def learn(self, records: Sequence[StepRecord]) -> None:
        """Learn nothing: the schedule is fixed."""


class ChainAcceptance:
    """Estimates acceptance by depth, each given that the depth above was accepted.

    A depth that is seldom tested leans on the estimate of the depth above.
    """

    def __init__(self, budgets: Sequence[int], keep: float, acceptance: Sequence[float]) -> None:
        longest = max(budgets)
        known = list(acceptance or [GUESS])[:longest]
        self._rates = known + [known[-1]] * (longest - len(known))
        self._weights = [MEASURED_WEIGHT if acceptance else GUESS_WEIGHT] * longest
        self._keep = keep  # share of an observation's weight that a step leaves

    def expected(self) -> list[float]:
        """Return the accepted tokens of a chain of 0, 1, ... nodes."""
        totals, above, reached = [0.0], self._rates[0], 1.0
        for rate, weight in zip(self._rates, self._weights, strict=True):
            above = (weight * rate + LEAST_WEIGHT * above) / (weight + LEAST_WEIGHT)
            reached *= above
            totals.append(totals[-1] + reached)
        return totals

    def learn(self, records: Sequence[StepRecord], chosen: int) -> None:
        """Take in a step: depth d was tested where d - 1 were accepted and d drafted."""
        self._weights = [weight * self._keep for weight in self._weights]
        for record in records if chosen else ():
            deepest = min(record.num_drafted, record.num_accepted + 1, len(self._rates))
            for depth in range(deepest):
                self._weights[depth] = max(self._weights[depth], LEAST_WEIGHT) + 1
                error = (record.num_accepted > depth) - self._rates[depth]
                self._rates[depth] += error / self._weights[depth]


class TreeAcceptance:
    """Estimates accepted tokens by node budget: a smaller tree is not the top of a larger one.

    A budget that was seldom tried leans on the others: accepted tokens grow about with the
    logarithm of a tree's size (Sequoia, arXiv 2402.12374). Of the first belief, which is by depth,
    the first entry sets the scale.
    """

    def __init__(self, budgets: Sequence[int], keep: float, acceptance: Sequence[float]) -> None:
        self._scale = (acceptance or [GUESS])[0]
        self._scale_weight = MEASURED_WEIGHT if acceptance else GUESS_WEIGHT
        self._weights = dict.fromkeys(budgets, 0.0)
        self._means = {nodes: self._usual(nodes) for nodes in budgets}
        self._keep = keep

    def _usual(self, nodes: int) -> float:
        return self._scale * log2(1 + nodes)

    def expected(self) -> list[float]:
        """Return the accepted tokens of trees of 0, 1, ... nodes; 0 where none may be asked for."""
        totals = [0.0] * (max(self._means) + 1)
        for nodes, mean in self._means.items():
            weight, lean = self._weights[nodes], LEAST_WEIGHT * self._usual(nodes)
            totals[nodes] = (weight * mean + lean) / (weight + LEAST_WEIGHT)
        return totals

    def learn(self, records: Sequence[StepRecord], chosen: int) -> None:
        """Take in a step that was asked for `chosen` nodes a row."""
        self._weights = {nodes: weight * self._keep for nodes, weight in self._weights.items()}
        self._scale_weight *= self._keep
        for record in records:
            # A drafter that found fewer, or a row near its end, says little about this budget.
            if not chosen or 2 * record.num_drafted < chosen:
                continue
            self._weights[chosen] += 1
            error = record.num_accepted - self._means[chosen]
            self._means[chosen] += error / max(self._weights[chosen], 1)
            self._scale_weight = max(self._scale_weight, LEAST_WEIGHT) + 1
            error = record.num_accepted - self._usual(chosen)
            self._scale += error / self._scale_weight / log2(1 + chosen)


class OnlineController:
    """Drafts as many nodes as have paid best so far, and none where drafting does not pay.

    It knows what a step costs and learns from every step what a draft is worth, for all rows and
    calls together. Drafting is paid from a credit that what it saves fills up, besides a small
    share of all decoding: so it starts with short drafts, and on a text that cannot be guessed it
    costs that share and about one plain step. Where drafting is off, a short draft probes after
    pauses that double.

    It never reads a clock: it takes its time from `step_s`, so that what it does follows from the
    records alone. An object learns from one loop at a time. The tokens drawn above temperature 0
    depend on the other rows then, as with `Schedule`.

    Args:
        step_s: seconds of a whole step by batch size and by nodes a row, 0 nodes (plain decoding)
            included; nodes in between are interpolated, the nearest batch size counts. It must not
            hold more nodes than the drafter drafts.
        acceptance: conditional acceptance by depth, measured before, to begin with.
        trees: the drafter makes trees. Chains are judged by depth; of trees it learns how many
            tokens each budget in `step_s` gave.
        margin: share by which drafting must be expected to be faster for it to be turned on.
        half_life: steps after which an observation counts half.
        probe_share: share of the decoding time that may be lost on drafts that do not pay.

    Raises:
        ValueError: a table that cannot be, or an option out of its range.
    """

    @checked
    def __init__(
        self,
        step_s: Mapping[int, Mapping[int, float]],
        acceptance: Sequence[float] | None = None,
        *,
        trees: bool = False,
        margin: float = 0.03,
        half_life: float = 30.0,
        probe_share: float = 0.005,
    ) -> None:
        if not step_s:
            raise ValueError("step_s is empty but needs the costs of at least one batch size")
        if acceptance is not None and not (acceptance and all(0 <= x <= 1 for x in acceptance)):
            raise ValueError(
                f"acceptance is {list(acceptance)} but must be one share in [0, 1] a depth, or None"
            )
        if margin < 0 or half_life <= 0 or not 0 < probe_share < 1:
            raise ValueError(
                f"margin is {margin} but must be at least 0, half_life {half_life} but must be "
                f"positive, or probe_share {probe_share} but must be in (0, 1)"
            )
        # In units of a plain step of the same batch size: batch sizes then share one account.
        self._ratios = {size: _ratios(size, costs) for size, costs in step_s.items()}
        self._budgets = {
            size: sorted(set(costs) - {0}) if trees else list(range(1, max(costs) + 1))
            for size, costs in step_s.items()
        }
        self._margin, self._probe_share = margin, probe_share
        every = sorted({nodes for budgets in self._budgets.values() for nodes in budgets})
        estimator = TreeAcceptance if trees else ChainAcceptance
        self._acceptance = estimator(every, 0.5 ** (1 / half_life), acceptance or [])
        # Drafting is on at these sizes; and the drafts there had been when each size was judged.
        self._is_on = dict.fromkeys(step_s, False)
        self._judged_at = dict.fromkeys(step_s, -1)
        self._credit = FIRST_CREDIT
        self._most_credit = 2 * max(max(ratios) for ratios in self._ratios.values())
        # Shared by all batch sizes: a probe learns how texts are accepted.
        self._pause = 1  # steps until the next probe
        self._waited = 0
        self._size, self._chosen, self._is_probe = min(step_s), 0, False
        self._num_drafts = 0
        self._found_some = False  # the last draft that was asked for held a node

    def choose(self, batch_size: int) -> int:
        """Return the nodes that pay best, a probe, or 0."""
        # Of two equally near sizes the larger one, at which drafting pays less.
        size = self._size = min(self._ratios, key=lambda size: (abs(size - batch_size), -size))
        self._is_probe, self._chosen = False, 0
        # Without a draft nothing was learned since: a step that is off costs next to nothing.
        if self._is_on[size] or self._judged_at[size] != self._num_drafts:
            self._chosen = self._best(size)
        if not self._is_on[size]:
            self._chosen = self._probe(size)
        return self._chosen

    def _best(self, size: int) -> int:
        """Return the nodes with the most tokens per second that the credit can pay for, or 0."""
        expected, ratios = self._acceptance.expected(), self._ratios[size]
        speeds = {nodes: (1 + expected[nodes]) / ratios[nodes] for nodes in self._budgets[size]}
        was_on, self._judged_at[size] = self._is_on[size], self._num_drafts
        self._is_on[size] = max(speeds.values()) > (1.0 if was_on else 1 + self._margin)
        if not self._is_on[size]:
            if was_on:
                self._pause, self._waited = FIRST_PAUSE, 0
            return 0
        affordable = [n for n, speed in speeds.items() if speed > 1 and self._can_pay(size, n)]
        return max(affordable, key=lambda nodes: speeds[nodes], default=0)

    def _probe(self, size: int) -> int:
        """Return the nodes of a short draft where one is due, or 0."""
        ratios, budgets = self._ratios[size], self._budgets[size]
        could_pay = any(1 + nodes > (1 + self._margin) * ratios[nodes] for nodes in budgets)
        shortest = budgets[0]
        self._waited += 1
        if not could_pay or self._waited < self._pause or not self._can_pay(size, shortest):
            return 0
        longest_pause = ceil((ratios[shortest] - 1) / self._probe_share)
        self._pause = max(FIRST_PAUSE, min(2 * self._pause, longest_pause))
        self._waited, self._is_probe = 0, True
        return shortest

    def _can_pay(self, size: int, nodes: int) -> bool:
        """Tell if the credit covers a draft of which nothing is accepted."""
        return self._ratios[size][nodes] - 1 <= self._credit

    def learn(self, records: Sequence[StepRecord]) -> None:
        """Take in the step's records, and book what its draft saved or cost."""
        self._acceptance.learn(records, self._chosen)
        # While drafting is believed to pay, bad luck must not keep it off for long.
        is_trusted = self._is_on[self._size] and self._found_some
        earned = self._probe_share * (TRUSTED if is_trusted else 1)
        if self._chosen:
            # A drafter that found nothing may have searched for it as long as for one node.
            most = max(record.num_drafted for record in records)
            drafted, self._found_some = max(1, min(self._chosen, most)), most > 0
            num_tokens = sum(record.num_emitted for record in records) / len(records)
            ratio = self._ratios[self._size][drafted]
            earned += num_tokens - ratio
            self._num_drafts += 1
            if self._is_probe and num_tokens > (1 + self._margin) * ratio:
                self._pause = 1  # it paid: look again at once
        self._credit = min(self._most_credit, self._credit + earned)


def _ratios(size: int, costs: Mapping[int, float]) -> list[float]:
    """Return the cost of a step of 0, 1, ... nodes over that of a plain step, interpolated."""
    if size < 1 or 0 not in costs or not 0 <= min(costs) < max(costs) <= MOST_NODES:
        raise ValueError(
            f"step_s[{size}] has the nodes {sorted(costs)} but must hold 0 (plain decoding) and at "
            f"least one draft of up to {MOST_NODES} nodes, for a batch size of at least 1"
        )
    if min(costs.values()) <= 0:
        raise ValueError(f"step_s[{size}] is {dict(costs)} but seconds must be positive")
    ratios = [1.0]
    for low, high in pairwise(sorted(costs)):
        slope = (costs[high] - costs[low]) / (high - low)
        ratios += [(costs[low] + slope * (n - low)) / costs[0] for n in range(low + 1, high + 1)]
    return ratios
