"""Draft trees grown one node at a time from any function path -> {token: logit}."""

import math


def log_softmax(logits):
    highest = max(logits.values())
    total = math.log(sum(math.exp(value - highest) for value in logits.values())) + highest
    return {token: value - total for token, value in logits.items()}


def penalised(logits, context, penalty):
    """Repetition penalty (Keskar et al., arXiv 1909.05858) for the tokens of a context."""
    return {
        token: (value / penalty if value > 0 else value * penalty) if token in context else value
        for token, value in logits.items()
    }


def law(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The distribution {token: probability} that a sampler draws from."""
    ranked = sorted(logits, key=lambda token: -logits[token])
    if temperature == 0:
        return {ranked[0]: 1.0}
    logs = {token: logits[token] / temperature for token in ranked[: top_k or None]}
    probs = {token: math.exp(value) for token, value in log_softmax(logs).items()}
    kept, mass = {}, 0.0
    for token, prob in probs.items():
        if mass >= top_p:
            break
        kept[token] = prob
        mass += prob
    return {token: prob / mass for token, prob in kept.items()}


def static_tree(logits, choices, budget):
    """Nodes (path, log-probability) of a fixed shape, each the rank-th likeliest child.

    Source: Medusa, arXiv 2401.10774; EAGLE, arXiv 2401.15077.
    """
    made, nodes = {(): ((), 0.0)}, []
    for ranks in sorted(map(tuple, choices), key=lambda ranks: (len(ranks), ranks))[:budget]:
        above, score = made[ranks[:-1]]
        logs = log_softmax(logits(above))
        token = sorted(logs, key=lambda token: -logs[token])[ranks[-1]]
        made[ranks] = ((*above, token), score + logs[token])
        nodes.append(made[ranks])
    return nodes


def dynamic_tree(logits, depth, width, max_nodes):
    """Nodes (path, log-probability) of EAGLE-2's tree, in the order in which they were found.

    Each level: the children of every beam node are scored by the whole path's probability, and the
    best `width` of the level are the next beam. In the end the best of all that was ever scored
    are kept. Source: EAGLE-2, arXiv 2406.16858, sections 4.1 and 4.2.
    """
    beam, pool = [((), 0.0)], []
    for _ in range(depth):
        level = []
        for path, score in beam:
            logs = log_softmax(logits(path))
            best = sorted(logs, key=lambda token: -logs[token])[:width]
            level += [((*path, token), score + logs[token]) for token in best]
        pool += level
        beam = sorted(level, key=lambda node: -node[1])[:width]
    kept = sorted(range(len(pool)), key=lambda index: -pool[index][1])[:max_nodes]
    return [pool[index] for index in sorted(kept)]


def drafted_nodes(draft, row):
    """Nodes (path, confidence) of a row of a draft, in its own order."""
    count = int(draft.lengths[row])
    tokens, parents = draft.tokens[row].tolist(), draft.explicit_parents()[row].tolist()
    assert all(token == -1 for token in tokens[count:])
    paths = []
    for index in range(count):
        assert -1 <= parents[index] < index
        above = paths[parents[index]] if parents[index] >= 0 else ()
        paths.append((*above, tokens[index]))
        assert len(paths[-1]) <= draft.depth
    if draft.confidence is None:
        return [(path, None) for path in paths]
    return list(zip(paths, draft.confidence[row].tolist(), strict=False))


def expected_nodes(shape, logits, budget):
    """Nodes (path, log-probability) of any shape of chosen children."""
    if shape.choices is not None:
        return static_tree(logits, shape.choices, budget)
    if shape.width == 1:
        return static_tree(logits, [[0] * (level + 1) for level in range(shape.depth)], budget)
    return dynamic_tree(logits, shape.depth, shape.width, min(shape.max_nodes, budget))
