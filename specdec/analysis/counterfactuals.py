"""The same drafter in other shapes: what each would have accepted along the same texts."""

from collections.abc import Mapping
from typing import Any

from specdec.analysis.coverage import coverage
from specdec.analysis.evidence import Evidence
from specdec.analysis.expected import Expected
from specdec.analysis.predict import Predictor
from specdec.drafters.forced import FixedShape
from specdec.verify.tree import best_static_tree, from_choices

CHAINS = range(1, 11)
TREE_SIZES = (2, 4, 8, 12, 16, 24, 32, 48)
THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class Counterfactuals:
    """Works out the shapes of one drafter.

    Args:
        predictor: with the texts.
        options: that the drafter was loaded with.
        drafter: with what `Forced` asks for.
    """

    def __init__(self, predictor: Predictor, options: Mapping[str, Any], drafter: Any) -> None:
        self._predictor, self._options, self._drafter = predictor, options, drafter
        self._evidence: Evidence = predictor.evidence(options, drafter)
        self._depth = min(self._evidence.depth, max(CHAINS))

    def all(self) -> dict[str, list[dict[str, Any]]]:
        """{chains, trees, thresholds}; a list is empty where the drafter has no such shape.

        So it is where the acceptance of its chains is not worked out.
        """
        known = self._drafter.shape_options
        drawn = FixedShape(from_choices(_chain(1)), self._drafter.children)
        has_chains = self._predictor.why_unknown(drawn) is None
        return {
            "chains": self._chains() if has_chains else [],
            "trees": self._trees() if "choices" in known else [],
            "thresholds": self._thresholds()
            if has_chains and "confidence_threshold" in known
            else [],
        }

    def _chains(self) -> list[dict[str, Any]]:
        rows = []
        for length in range(1, self._depth + 1):
            found = self._expect(_chain(length), self._drafter.children)
            rows.append({"length": length, "children": self._children, **figures(found)})
        return rows

    @property
    def _children(self) -> str:
        greedy = self._predictor.sampling.is_greedy
        return "top" if greedy else str(self._drafter.children)

    def _trees(self) -> list[dict[str, Any]]:
        """The best trees of chosen tokens for what these texts took."""
        table, rows = coverage(self._evidence), []
        for num_nodes in TREE_SIZES:
            choices = best_static_tree(table, num_nodes) if table else []
            if len(choices) < num_nodes:
                break
            found = self._expect(choices, "top")
            rows.append(
                {
                    "nodes": num_nodes,
                    "depth": max(map(len, choices)),
                    "choices": [list(path) for path in choices],
                    "children": "top",
                    **figures(found),
                }
            )
        return rows

    def _thresholds(self) -> list[dict[str, Any]]:
        rows = []
        for threshold in THRESHOLDS:
            found = self._expect(_chain(self._depth), self._drafter.children, threshold)
            rows.append({"threshold": threshold, "length": self._depth, **figures(found)})
        return rows

    def _expect(
        self, choices: list[tuple[int, ...]], children: str, threshold: float = 0.0
    ) -> Expected:
        shape = FixedShape(from_choices(choices), children, threshold)
        return self._predictor.expect(self._options, self._drafter, shape)


def _chain(length: int) -> list[tuple[int, ...]]:
    return [(0,) * (level + 1) for level in range(length)]


def figures(expected: Expected) -> dict[str, Any]:
    """What a JSON file says of an expectation."""
    interval = expected.tau_interval()
    return {
        "tau": expected.tau,
        "tau_ci": None if interval is None else list(interval),
        "nodes_per_step": expected.nodes_per_step,
        "nodes_are_exact": expected.drafted_is_exact,
    }
