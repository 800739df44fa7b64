"""A window: the head drafts as if the text began that many pairs before the root."""

import pytest
from scripted import DRAFTERS, VOCAB, ScriptedDecoding, lively_head, slow_guesses, small_target
from slow_trees import check_drafts

from specdec.drafters import feature_head as feature_drafter
from specdec.drafters.tree_growth import TreeShape

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], [8], [7, 7, 7]]
SHAPES = {
    "dynamic": TreeShape(depth=3, width=4, max_nodes=12),
    "static": TreeShape(choices=[[0], [2], [0, 0], [2, 1], [2, 1, 0]]),
    "chain": TreeShape(depth=4, width=1),
}


def decoded(kind, head, target, shape, window):
    drafter = DRAFTERS[kind](head, VOCAB, shape, window)
    decoding = ScriptedDecoding(target, drafter, PROMPTS)
    for _ in range(4):
        decoding.step()
    return decoding


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [1, 2, 5])
def test_window_shows_last_pairs_only(kind, shape, window):
    target = small_target()
    head = lively_head(kind, target)
    decoding = decoded(kind, head, target, SHAPES[shape], window)
    check_drafts(
        decoding.steps,
        SHAPES[shape],
        lambda committed: slow_guesses(kind, head, target, committed, window).logits,
    )
    with pytest.raises(AssertionError):
        check_drafts(
            decoding.steps,
            SHAPES[shape],
            lambda committed: slow_guesses(kind, head, target, committed).logits,
        )


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_long_window_changes_nothing(kind):
    target, shape = small_target(), SHAPES["dynamic"]
    head = lively_head(kind, target)
    check_drafts(
        decoded(kind, head, target, shape, 1000).steps,
        shape,
        lambda committed: slow_guesses(kind, head, target, committed).logits,
    )


def test_window_reaches_across_chunks(monkeypatch):
    monkeypatch.setattr(feature_drafter, "CHUNK", 2)
    target, shape = small_target(), SHAPES["static"]
    head = lively_head("eagle3", target)
    check_drafts(
        decoded("eagle3", head, target, shape, 5).steps,
        shape,
        lambda committed: slow_guesses("eagle3", head, target, committed, 5).logits,
    )
