"""Drives a drafter that needs no model: begin, propose and observe on token ids alone."""

import torch

from specdec.verify import Draft


def begin(drafter, prompts, join=False):
    """Start rows; the last token of every prompt is its root."""
    drafter.begin(prompts, None, None, join=join)
    return drafter


def propose(drafter, budget):
    return drafter.propose(torch.zeros(len(budget), dtype=torch.long), budget, None)


def observe(drafter, committed):
    drafter.observe(None, committed, {})


def drafted(drafter, budget):
    """The chain every row drafts, as lists of tokens."""
    return chains(propose(drafter, budget))


def chains(draft: Draft) -> list[list[int]]:
    assert draft.is_chain
    rows = zip(draft.tokens.tolist(), draft.lengths.tolist(), strict=True)
    return [tokens[:length] for tokens, length in rows]


def paths(draft: Draft) -> list[list[tuple[int, ...]]]:
    """The tokens from the root down to every real node, row by row, in node order."""
    found = []
    for row, length in enumerate(draft.lengths.tolist()):
        above: list[tuple[int, ...]] = []
        parents = draft.explicit_parents()[row].tolist()
        for token, parent in zip(draft.tokens[row].tolist()[:length], parents, strict=False):
            above.append((*(above[parent] if parent >= 0 else ()), token))
        found.append(above)
    return found
