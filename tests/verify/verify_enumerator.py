"""The rules in plain Python floats, straight from their papers, with the randomness summed out.

Shares no code with the package. A law is a dict: emitted tokens -> probability.
"""

from collections import defaultdict

Law = dict[tuple[int, ...], float]


def enumerate_law(rule: str, target: list, draft_probs: list | None, tokens, parents) -> Law:
    """Sum over everything a rule can do with one draft row of rows `target[0..N]`."""
    laws = draft_probs or [_one_hot(token, len(target[0])) for token in tokens]
    out: Law = defaultdict(float)
    if rule == "token":
        _token(out, target, laws, tokens, parents, -1, (), 1.0)
    elif rule == "traversal":
        reach = _traverse(out, target, laws, tokens, parents, -1, (), 1.0, 1.0)
        assert reach == 0.0
    else:
        _block(out, target, laws, tokens)
    return dict(out)


def _one_hot(token: int, size: int) -> list[float]:
    return [float(i == token) for i in range(size)]


def _minus(first: list[float], second: list[float]) -> list[float]:
    return [max(a - b, 0.0) for a, b in zip(first, second, strict=True)]


def _emit(out: Law, prefix: tuple[int, ...], row: list[float], weight: float) -> None:
    for token, prob in enumerate(row):
        if weight * prob > 0:
            out[(*prefix, token)] += weight * prob


def _token(out, target, laws, tokens, parents, node, prefix, weight) -> None:
    residual, left = target[node + 1], weight
    for child in [i for i, parent in enumerate(parents) if parent == node]:
        x = tokens[child]
        accept = min(1.0, residual[x] / laws[child][x])
        if accept > 0:
            _token(out, target, laws, tokens, parents, child, (*prefix, x), left * accept)
        left *= 1 - accept
        rest = _minus(residual, laws[child])
        if sum(rest) == 0:
            break
        residual = [value / sum(rest) for value in rest]
    _emit(out, prefix, residual, left)


def _traverse(out, target, laws, tokens, parents, node, prefix, a, reach) -> float:
    row = target[node + 1]
    for child in [i for i, parent in enumerate(parents) if parent == node]:
        x = tokens[child]
        a_child = min(1.0, a * row[x] / laws[child][x])
        reach = _traverse(out, target, laws, tokens, parents, child, (*prefix, x), a_child, reach)
        rest = _minus([a * value for value in row], laws[child])
        mass = sum(rest)
        if mass + (1 - a) == 0:  # nothing left, and nothing to reject
            continue
        if mass > 0:
            row = [value / mass for value in rest]
        a = mass / (mass + (1 - a))
    accept = 1.0 if node < 0 else a
    _emit(out, prefix, row, reach * accept)
    return reach * (1 - accept)


def _block(out, target, laws, tokens) -> None:
    """Sun et al., Algorithm 2: tau is the largest i with eta_i < h_i."""
    count = len(tokens)
    p = [1.0]
    for i, x in enumerate(tokens):
        p.append(min(1.0, p[-1] * target[i][x] / laws[i][x]))
    reach = 1.0
    for i in range(count, -1, -1):
        if i == count:
            h, row = p[i], target[i]
        else:
            rest = _minus([p[i] * value for value in target[i]], laws[i])
            mass = sum(rest)
            h = 1.0 if mass + (1 - p[i]) == 0 else mass / (mass + (1 - p[i]))
            row = [value / mass for value in rest] if mass > 0 else target[i]
        if i == 0:
            h = 1.0
        _emit(out, tuple(tokens[:i]), row, reach * h)
        reach *= 1 - h
