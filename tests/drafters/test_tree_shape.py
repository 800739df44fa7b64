"""Options of drafted trees: what they make, and what is refused in which words."""

import pytest
from scripted import (
    DRAFTERS,
    PROMPTS,
    VOCAB,
    ScriptedDecoding,
    lively_head,
    slow_guesses,
    small_target,
)
from slow_trees import check_drafts, drafted_nodes
from tiny_heads import save_tiny_head

from specdec.drafters.medusa import MedusaDrafter
from specdec.drafters.tree_growth import TreeShape

DRAFT_TOKENS = [0, 1, 2, 4, 5, 7, 8, 11, 12, 16]


def first_draft(kind, shape, target=None, **options):
    target = target or small_target()
    drafter = DRAFTERS[kind](lively_head(kind, target, **options), target.vocab_size, shape)
    decoding = ScriptedDecoding(target, drafter, PROMPTS)
    decoding.step()
    return drafter, decoding.steps[0].draft


@pytest.mark.parametrize("children", ["top", "without_replacement", "with_replacement"])
def test_wide_tree_holds_whole_draft_vocabulary(children):
    shape = TreeShape(depth=2, width=50, max_nodes=40, children=children)
    drafter, draft = first_draft("eagle3", shape, draft_tokens=DRAFT_TOKENS)
    assert drafter.max_nodes == 40
    for row in range(len(PROMPTS)):
        paths = [path for path, _ in drafted_nodes(draft, row)]
        assert {path[0] for path in paths} <= set(DRAFT_TOKENS)
        assert len(paths) == 40
    if children == "top":
        target = small_target()
        head = lively_head("eagle3", target, draft_tokens=DRAFT_TOKENS)
        decoding = ScriptedDecoding(target, DRAFTERS["eagle3"](head, VOCAB, shape), PROMPTS)
        decoding.step()
        check_drafts(
            decoding.steps,
            shape,
            lambda committed: slow_guesses("eagle3", head, target, committed).logits,
        )


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
@pytest.mark.parametrize("children", ["top", "without_replacement"])
@pytest.mark.parametrize("width", [1, 3])
def test_tree_keeps_budget_and_depth(kind, children, width):
    shape = TreeShape(depth=5, width=width, max_nodes=3, children=children)
    drafter, draft = first_draft(kind, shape)
    assert drafter.max_nodes == 3
    assert draft.lengths.tolist() == [3] * len(PROMPTS)
    shape = TreeShape(depth=2, width=width, max_nodes=30, children=children)
    drafter, draft = first_draft(kind, shape)
    sizes = {1: 2, 3: 12}
    assert draft.lengths.tolist() == [sizes[width]] * len(PROMPTS)
    longest = max(len(path) for path, _ in drafted_nodes(draft, 0))
    assert longest == 2


def test_medusa_tree_is_best_for_acceptance(tmp_path):
    target = small_target()
    path = save_tiny_head(tmp_path, "medusa", target)
    drafter = MedusaDrafter.load(target, path, acceptance=[[0.5, 0.4], [0.9, 0.05]], max_nodes=4)
    decoding = ScriptedDecoding(target, drafter, PROMPTS)
    decoding.step()
    shape = TreeShape(choices=[[0], [1], [0, 0], [1, 0]])
    head = drafter.head
    check_drafts(
        decoding.steps,
        shape,
        lambda committed: slow_guesses("medusa", head, target, committed).logits,
    )
