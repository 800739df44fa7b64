"""The cost of a step on this machine: small fits to all that was timed, with their residuals.

A step is an array of seconds in the drafter, in the target, and of everything else.
"""

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import nnls
from scipy.stats import trim_mean

from specdec.drafters.base import DraftShape
from specdec.planning import results
from specdec.planning.candidates import Candidate
from specdec.planning.measure import TimedRun
from specdec.planning.results import Array, bent

# Drafted nodes of a step and how often: {nodes: share}.
Sizes = Mapping[int, float]
# Steps of a drafter by shape and nodes drafted.
Groups = Mapping[tuple[DraftShape, int], list[Array]]

MAX_KNOTS = 4
SWEEPS = 50
# Share of the slowest and of the fastest steps that a mean leaves out: other programs' noise.
TRIMMED = 0.1
FEATURES = {
    "draft": ("step", "level", "fed_node", "drafted", "node", "root_of_nodes"),
    "target": ("forward", "step"),
    "other": ("step", "drafted", "level", "candidate", "node", "tree"),
}


class Costs:
    """All that was measured, as one function of drafter, shape and batch at a mean context.

    Attributes:
        measured: measurements and fits as a plan holds them.
        plain: the mean step of plain decoding by batch size.
    """

    def __init__(self, cells: Sequence[Mapping[str, Any]], context: float) -> None:
        points = _forward_points(cells)
        if not points:
            fix = "use a smaller target, dtype or batch"
            raise ValueError(f"no target forward was timed, nothing fitted into memory; {fix}")
        by_size = itertools.groupby(points, lambda point: point.batch_size)
        self.measured = results.MeasuredCosts(
            points=points,
            skipped=sorted({cell["skipped"] for cell in cells if "skipped" in cell}),
            forward={size: _fit_forward([*own]) for size, own in by_size},
            plain={},
            drafters=[],
        )
        self._context = context
        self.plain: dict[int, Array] = {}
        self._fits: dict[tuple[str, int], results.DrafterFit] = {}
        # Mean steps and their relative errors, by candidate and batch size.
        self._given: dict[tuple[str, int], tuple[Array, float]] = {}
        self._timed: dict[tuple[str, int], tuple[Array, float]] = {}

    def add(self, batch_size: int, runs: Sequence[TimedRun]) -> None:
        """Fit decodings of one batch size, of all drafters and plain ones.

        Their times are brought to a common plain step: each run is compared with the plain ones of
        its own moment.
        """
        plain = [run for run in runs if run.candidate is None]
        if not plain:
            fix = "give prompts and max_new_tokens that leave at least two tokens to decode"
            raise ValueError(f"no step of plain decoding could be timed; {fix}")
        moments = np.array([run.plain_s for run in plain])
        common_s = float(np.median(moments))
        mean = mean_step(np.concatenate([run.at(common_s) for run in plain]))
        ms = to_ms(mean)
        self.plain[batch_size] = mean
        self.measured.plain[batch_size] = results.PlainStep(
            **{f"{part}_ms": ms[part] for part in ("target", "other", "wall")},
            relative_error=float(moments.std() / moments.mean() / len(moments) ** 0.5),
        )
        # Steps by drafter, and of each by shape and nodes drafted.
        found: dict[str, Any] = defaultdict(lambda: defaultdict(list))
        drafting = [(run, run.candidate) for run in runs if run.candidate]
        for run, candidate in drafting:
            for step in run.at(common_s):
                found[candidate.drafter][candidate.shape, int(step[1])].append(step)
        for name, groups in found.items():
            self._fits[name, batch_size] = self._fit(name, batch_size, groups)
            self.measured.drafters.append(self._fits[name, batch_size])
        # Given configurations are known as they were timed, too, whatever each step drafted.
        for given in (candidate for _, candidate in drafting if candidate.is_given):
            own = [g for (shape, _), g in found[given.drafter].items() if shape == given.shape]
            mean = np.average([*map(mean_step, own)], 0, [*map(len, own)])
            error = self._fits[given.drafter, batch_size].residuals.rms
            self._given[given.key, batch_size] = mean, error

    def _fit(self, name: str, batch_size: int, groups: Groups) -> results.DrafterFit:
        counts = [*map(len, groups.values())]
        contexts = [float(np.mean([step[0] for step in steps])) for steps in groups.values()]
        times = np.array([*map(mean_step, groups.values())])
        walls = times.sum(1)
        rows = [
            self._features(shape, nodes, batch_size, context)
            for (shape, nodes), context in zip(groups, contexts, strict=True)
        ]
        fits = {
            part: fit_linear(names, [row[part] for row in rows], times[:, place], walls, counts)
            for place, (part, names) in enumerate(FEATURES.items())
        }
        fitted = np.array([[fit(row[part]) for part, fit in fits.items()] for row in rows])
        points = []
        for place, (shape, nodes) in enumerate(groups):
            ours, theirs = to_ms(times[place]), to_ms(fitted[place])
            point: dict[str, Any] = {"shape": shape, "nodes": nodes, "steps": counts[place]}
            point |= {p: {"measured_ms": ours[p], "fitted_ms": theirs[p]} for p in ours}
            points.append(results.StepPoint(context=round(contexts[place], 1), **point))
        isolated = np.array([row["target"][0] for row in rows])
        return results.DrafterFit(
            drafter=name,
            batch_size=batch_size,
            points=points,
            loop_over_isolated_forward=float(np.median(times[:, 1] / isolated)),
            **fits,
            residuals=results.Residuals.of(walls, fitted.sum(1), counts),
        )

    def time(self, batch_size: int, runs: Sequence[TimedRun]) -> None:
        """Take configurations' own times in place of those that follow from the fits.

        All runs, plain ones among them, are of the same rounds: a machine's speed moves, and what
        was timed at another moment cannot be compared within a few percent.
        """
        by_key: dict[str, list[TimedRun]] = defaultdict(list)
        for run in runs:
            by_key[run.candidate.key if run.candidate else ""].append(run)
        if len(by_key) < 2:
            return
        rounds = sorted({run.round for run in runs})
        table = np.array([[_log_wall(own, n) for own in by_key.values()] for n in rounds])
        effects, residuals = median_polish(table)
        ratios = np.exp(effects - effects[list(by_key).index("")])
        # Standard errors of the columns' medians, from the residuals' own medians.
        sigma = 1.4826 * np.nanmedian(np.abs(residuals), axis=0)
        errors = sigma * np.sqrt(np.pi / 2 / np.isfinite(residuals).sum(0))
        for place, (key, own) in enumerate(by_key.items()):
            mean = mean_step(np.concatenate([run.steps for run in own]))
            scale = ratios[place] * self.plain[batch_size].sum() / mean.sum()
            self._timed[key, batch_size] = scale * mean, float(errors[place])

    def is_timed(self, candidate: Candidate, batch_size: int) -> bool:
        return (candidate.key, batch_size) in self._timed

    def step(self, candidate: Candidate, batch_size: int, sizes: Sizes) -> tuple[Array, float]:
        """The mean step of a candidate whose drafts have these sizes: its own, if it was timed.

        With it comes its relative error against plain's step, one standard deviation.
        """
        key = (candidate.key, batch_size)
        own = self._timed.get(key) or self._given.get(key)
        step, error = own or self._fitted(candidate, batch_size, sizes)
        return step, float(np.hypot(error, self.measured.plain[batch_size].relative_error))

    def full_step(self, candidate: Candidate, batch_size: int) -> Array:
        """A step that drafts all the nodes of a candidate, by the fits wherever there are some.

        A finalist and its cuts are then timed by one ruler; and where drafts vary, what was timed
        is a mean over steps that mostly drafted fewer.
        """
        asked = (candidate, batch_size, {candidate.shape.nodes: 1.0})
        is_mean = candidate.varies or self.is_timed(candidate, batch_size)
        return (self._fitted(*asked) if is_mean else self.step(*asked))[0]

    def _fitted(self, candidate: Candidate, batch_size: int, sizes: Sizes) -> tuple[Array, float]:
        fit = self._fits[candidate.drafter, batch_size]
        step = np.zeros(3)
        for nodes, share in sizes.items():
            features = self._features(candidate.shape, nodes, batch_size, self._context)
            step += share * np.array([getattr(fit, part)(row) for part, row in features.items()])
        return step, fit.residuals.rms

    def _features(
        self, shape: DraftShape, nodes: int, batch_size: int, context: float
    ) -> dict[str, tuple[float, ...]]:
        """The features of each part of a step, as `FEATURES` names them."""
        # A chain that a threshold ends has looked one token further.
        levels = min(nodes + 1 if shape.threshold else nodes, shape.depth)
        drafted, is_tree = float(nodes > 0), shape.is_tree and nodes > 0
        draft: tuple[float, ...] = (1.0, 0.0, 0.0, drafted, nodes, nodes**0.5)
        if shape.depth:
            more = max(levels - 1, 0)
            draft = (float(levels > 0), more, more * shape.width, 0.0, 0.0, 0.0)
        forward = self._forward_s(batch_size, nodes + 1, context, is_tree)
        candidates = levels * shape.width * is_tree
        other = (1.0, drafted, levels, candidates, nodes, float(is_tree))
        return {"draft": draft, "target": (forward, 1.0), "other": other}

    def _forward_s(self, batch_size: int, new_tokens: int, context: float, is_tree: bool) -> float:
        """Seconds of a forward, between the measured batches by linear interpolation."""
        fits = self.measured.forward
        sizes, times = [*fits], [fit(new_tokens, context, is_tree) for fit in fits.values()]
        return float(np.interp(batch_size, sizes, times) * max(1.0, batch_size / sizes[-1]))


def mean_step(steps: Sequence[Array] | Array) -> Array:
    """The mean of steps as `TimedRun` has them, without the slowest and the fastest."""
    return np.asarray(trim_mean(np.array(steps)[:, 2:], TRIMMED))


def to_ms(step: Array) -> dict[str, float]:
    """Milliseconds of "draft", "target", "other" and "wall"."""
    draft, target, other = (1000 * step).tolist()
    return {"draft": draft, "target": target, "other": other, "wall": draft + target + other}


def _log_wall(runs: Sequence[TimedRun], number: int) -> float:
    """Logarithm of the mean step of a round's runs; nan if there is none."""
    means = [trim_mean(run.steps[:, 2:].sum(1), TRIMMED) for run in runs if run.round == number]
    return float(np.log(np.median(means))) if means else np.nan


def _forward_points(cells: Sequence[Mapping[str, Any]]) -> list[results.ForwardPoint]:
    """Medians over the repeats of cells as `Measurements.forwards` gives them."""
    found: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for cell, kind in itertools.product(cells, ("chain", "tree")):
        for count, seconds in cell.get(kind, {}).items():
            found[cell["batch"], int(count), cell["context"], kind == "tree"].append(seconds)
    points, names = [], ("batch_size", "new_tokens", "context", "is_tree")
    for key, times in sorted(found.items()):
        low, middle, high = np.quantile(times, [0.25, 0.5, 0.75]).tolist()
        measured = {"median_s": middle, "spread_s": high - low, "repeats": len(times)}
        points.append(results.ForwardPoint(**dict(zip(names, key, strict=True)), **measured))
    return points


def _fit_forward(points: Sequence[results.ForwardPoint]) -> results.ForwardFit:
    chains, trees = (
        [(p.new_tokens, p.context, p.median_s) for p in points if p.is_tree == is_tree]
        for is_tree in (False, True)
    )
    chain, tree = fit_piecewise(*zip(*chains, strict=True)), None
    if trees:
        rows = [(1.0, tokens) for tokens, _, _ in trees]
        extra = [seconds - chain(tokens, context) for tokens, context, seconds in trees]
        tree = fit_linear(("tree", "token"), rows, extra, [seconds for *_, seconds in trees])
    return results.ForwardFit(chain=chain, tree_extra=tree)


def fit_piecewise(
    new_tokens: Sequence[float], context: Sequence[float], seconds: Sequence[float]
) -> results.PiecewiseLinear:
    """Fit relative errors by least squares; knots join one at a time while BIC says they pay."""
    tokens, cached, times = (np.array(x, float) for x in (new_tokens, context, seconds))

    def solve(knots: list[float]) -> tuple[float, list[float], Array]:
        """BIC, knots and coefficients."""
        features = bent(tokens, cached, knots) / times[:, None]
        found = np.linalg.lstsq(features, np.ones_like(times), rcond=None)[0]
        if len(times) <= features.shape[1] and knots:
            return np.inf, knots, found
        # Errors below a tenth of a per cent are no reason for another knot.
        variance = max(float(np.mean((features @ found - 1) ** 2)), 1e-6)
        # A knot is two parameters: its place was chosen as well.
        num_parameters = features.shape[1] + len(knots)
        bic = len(times) * np.log(variance) + num_parameters * np.log(len(times))
        return float(bic), knots, found

    # Between the first and the last number of tokens that was measured.
    places = set(sorted(set(tokens.tolist()))[1:-1])
    best: tuple[float, list[float], Array] = (np.inf, [], tokens)
    found = solve([])
    while found[0] < best[0]:
        best = found
        more = sorted(places.difference(best[1])) if len(best[1]) < MAX_KNOTS else []
        tried = [solve(sorted([*best[1], each])) for each in more]
        found = min(tried, key=lambda each: each[0], default=best)
    _, knots, coefficients = best
    linear = coefficients[:4].tolist()
    return results.PiecewiseLinear(
        **dict(zip(results.LINEAR, linear, strict=True)),
        knots=knots,
        slope_changes=coefficients[4:].tolist(),
        residuals=results.Residuals.of(times, bent(tokens, cached, knots) @ coefficients),
    )


def fit_linear(
    names: Sequence[str],
    features: Sequence[Sequence[float]],
    seconds: Any,
    scale: Any,
    counts: Any = 1,
) -> results.LinearCost:
    """Fit seconds [points] by features [points, features].

    Errors count against `scale`, the seconds of the whole step, so that a part that hardly matters
    does not decide; `counts` are the measurements that each point is the mean of.
    """
    rows, times, whole = (np.array(x, float) for x in (features, seconds, scale))
    number = np.broadcast_to(np.array(counts, float), whole.shape)
    weights = number**0.5 / whole
    # Columns of very different size would stop the solver early.
    size = np.maximum(np.abs(rows).max(0), 1e-12)
    coefficients = nnls(rows / size * weights[:, None], times * weights)[0] / size
    return results.LinearCost(
        coefficients=dict(zip(names, coefficients.tolist(), strict=True)),
        residuals=results.Residuals.of(whole, whole + rows @ coefficients - times, number),
    )


def median_polish(table: Array) -> tuple[Array, Array]:
    """Split a table into effects of its rows and columns; give the columns' and the residuals.

    A busy moment moves nothing but its own cell; one that was not measured is nan.

    Source: Tukey 1977, Exploratory Data Analysis.
    """
    columns = np.zeros(table.shape[1])
    for _ in range(SWEEPS):
        rows = np.nanmedian(table - columns, axis=1, keepdims=True)
        columns = np.nanmedian(table - rows, axis=0)
    return columns, table - rows - columns
