"""Options of drafters that cannot be meant are refused by name, value and rule."""

import pytest
from scripted import DRAFTERS, VOCAB, lively_head, small_target
from tiny_heads import save_tiny_head

from specdec.drafters.draft_model import DraftModel
from specdec.drafters.eagle import EagleDrafter
from specdec.drafters.hybrid import HybridDrafter
from specdec.drafters.medusa import MedusaDrafter
from specdec.drafters.ngram import NgramDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.drafters.tree_growth import TreeShape

DEEP = [[0], [0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("drafter", "options", "message"),
    [
        (NgramDrafter, {"num_draft_tokens": 0}, "num_draft_tokens is 0 but must be at least 1"),
        (NgramDrafter, {"num_continuations": -1}, "num_continuations is -1 but must be at least"),
        (NgramDrafter, {"num_continuations": 2, "max_nodes": 0}, "max_nodes is 0 but must be at"),
        (NgramDrafter, {"min_ngram": 0}, "min_ngram is 0 .* 1 <= min_ngram <= max_ngram"),
        (NgramDrafter, {"min_ngram": 5, "max_ngram": 4}, "min_ngram is 5 and max_ngram 4"),
        (SuffixDrafter, {"max_nodes": 0}, "max_nodes is 0 but must be at least 1"),
        (SuffixDrafter, {"max_match": 0}, "max_match is 0 but must be at least 1"),
        (SuffixDrafter, {"min_match": 0}, "min_match is 0 but must be at least 1"),
        (SuffixDrafter, {"width": -2}, "width is -2 but must be at least 1"),
        (SuffixDrafter, {"min_match": 9, "max_match": 8}, "min_match is 9 and max_match 8"),
        (SuffixDrafter, {"min_probability": 1.5}, r"min_probability is 1.5 but must be in \[0, 1"),
        (SuffixDrafter, {"factor": 0}, "factor is 0 .* positive"),
        (SuffixDrafter, {"num_remembered": -1}, "num_remembered -1.* at least 0"),
        (TreeShape, {"depth": 0}, "depth is 0 but must be"),
        (TreeShape, {"width": -1}, "width is -1 but must be"),
        (TreeShape, {"max_nodes": 0}, "max_nodes is 0 but must be"),
        (TreeShape, {"depth": 2.5}, "depth is 2.5 but must be"),
        (TreeShape, {"max_nodes": "24"}, "max_nodes is '24' but must be"),
        (TreeShape, {"children": "best"}, "children is 'best' but must be one of top, without_rep"),
        (TreeShape, {"choices": []}, r"choices is \[\].*at least one"),
    ],
)
def test_impossible_option_is_refused(drafter, options, message):
    with pytest.raises(ValueError, match=message):
        drafter(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_draft_tokens": 0}, "num_draft_tokens is 0 but must be at least 1"),
        ({"width": 0}, "width is 0 but must be at least 1"),
        ({"width": 2, "max_nodes": 0}, "max_nodes is 0 but must be at least 1"),
        ({"confidence_threshold": 1.0}, r"confidence_threshold is 1.0 but must be in \[0, 1\)"),
        ({"confidence_threshold": -0.1}, r"confidence_threshold is -0.1 but must be in \[0, 1\)"),
    ],
)
def test_draft_model_refuses_impossible_option(options, message):
    with pytest.raises(ValueError, match=message):
        DraftModel(small_target(), VOCAB, **options)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([[]], r"choices has \(\): a node is a non-empty tuple"),
        ([[0], [-1]], r"choices has \(-1,\).*ranks >= 0"),
        ([[0], [0]], "names a node twice"),
        ([[0], [1, 0]], r"choices has \(1, 0\) but not its parent \(1,\)"),
        ([[0], [0, 0, 0]], r"choices has \(0, 0, 0\) but not its parent \(0, 0\)"),
        ([[0], [VOCAB]], f"rank {VOCAB} but the drafter has {VOCAB} tokens"),
    ],
)
@pytest.mark.parametrize("kind", ["eagle", "medusa"])
def test_choices_without_a_tree_are_refused(kind, choices, message):
    with pytest.raises(ValueError, match=message):
        DRAFTERS[kind](lively_head(kind, small_target()), VOCAB, TreeShape(choices=choices))


def test_ranks_are_those_of_the_draft_vocabulary():
    head = lively_head("eagle3", small_target(), draft_tokens=[0, 1, 2, 4])
    assert DRAFTERS["eagle3"](head, VOCAB, TreeShape(choices=[[0], [3]])).max_nodes == 2
    with pytest.raises(ValueError, match="rank 4 but the drafter has 4 tokens; use ranks below 4"):
        DRAFTERS["eagle3"](head, VOCAB, TreeShape(choices=[[0], [4]]))


@pytest.mark.parametrize("window", [0, -1])
def test_empty_window_is_refused(window):
    with pytest.raises(ValueError, match=rf"window is {window} but must be at least 1"):
        EagleDrafter(lively_head("eagle", small_target()), VOCAB, TreeShape(), window)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_nodes": 0}, "num_nodes is 0 but must be at least 1"),
        ({"acceptance": []}, "acceptance is empty"),
        ({"choices": []}, r"choices is \[\]"),
        ({"choices": DEEP}, "the tree has 3 levels but there are 2 heads"),
        ({"acceptance": [[0.9]] * 3, "max_nodes": 3}, "has 3 levels but there are 2 heads"),
    ],
)
def test_medusa_refuses_tree_without_nodes_or_heads(tmp_path, options, message):
    target = small_target()
    path = save_tiny_head(tmp_path, "medusa", target, num_heads=2)
    with pytest.raises(ValueError, match=message):
        MedusaDrafter.load(target, path, **options)
    assert MedusaDrafter.load(target, path, choices=DEEP[:2]).max_nodes == 2


def test_hybrid_refuses_what_cannot_be_merged():
    target, lookup = small_target(), NgramDrafter()
    with pytest.raises(ValueError, match="drafters holds 1 but a hybrid merges at least two"):
        HybridDrafter([lookup])
    with pytest.raises(ValueError, match="max_nodes is 0"):
        HybridDrafter([lookup, NgramDrafter()], max_nodes=0)
    with pytest.raises(ValueError, match="use width=2 or more"):
        HybridDrafter([lookup, DraftModel(target, VOCAB)])
    shape = TreeShape(children="without_replacement")
    sampled = EagleDrafter(lively_head("eagle", target), VOCAB, shape)
    with pytest.raises(ValueError, match="children='without_replacement'"):
        HybridDrafter([lookup, sampled])
