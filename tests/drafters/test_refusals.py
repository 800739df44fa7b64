"""Options of drafters that cannot be meant are refused by name, value and rule."""

from functools import partial

import pytest
from scripted import DRAFTERS, VOCAB, lively_head, small_target
from tiny_heads import save_tiny_head

from specdec.drafters.draft_model import DraftModel
from specdec.drafters.hybrid import HybridDrafter
from specdec.drafters.medusa import MedusaDrafter
from specdec.drafters.ngram import NgramDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.drafters.tree_growth import TreeShape

DEEP = [[0], [0, 0], [0, 0, 0]]


def draft_model(**options):
    return DraftModel(small_target(), VOCAB, **options)


def head_drafter(kind="eagle", window=None, draft_tokens=None, **shape):
    head = lively_head(kind, small_target(), draft_tokens=draft_tokens)
    more = (window,) if window is not None else ()
    return DRAFTERS[kind](head, VOCAB, TreeShape(**shape), *more)


def hybrid(*others, **options):
    return HybridDrafter([NgramDrafter(), *(build() for build in others)], **options)


def delayed(*sizes):
    return dict(zip(("stem", "branches", "depth"), sizes, strict=True))


medusa = partial(head_drafter, "medusa")
reduced = partial(head_drafter, "eagle3", draft_tokens=[0, 1, 2, 4])
NO_TREES = [
    ([[]], r"choices has \(\): a node is a non-empty tuple"),
    ([[0], [-1]], r"choices has \(-1,\).*ranks >= 0"),
    ([[0], [0]], "names a node twice"),
    ([[0], [1, 0]], r"choices has \(1, 0\) but not its parent \(1,\)"),
    ([[0], [0, 0, 0]], r"choices has \(0, 0, 0\) but not its parent \(0, 0\)"),
    ([[0], [VOCAB]], f"rank {VOCAB} but the drafter has {VOCAB} tokens"),
]


@pytest.mark.parametrize(
    ("build", "options", "message"),
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
        (TreeShape, {"choices": {"stem": 1}}, "must hold stem, branches and depth, or be a list"),
        (TreeShape, {"choices": delayed(-1, 2, 3)}, "stem is -1 but must be an int of at least 0"),
        (TreeShape, {"choices": delayed(1, 0, 3)}, "branches is 0 but must be an int of at least"),
        (TreeShape, {"choices": delayed(2, 2, 2)}, "depth is 2 but must be an int above the stem"),
        (TreeShape, {"choices": delayed(0, 2, "3")}, "depth is '3' but must be an int above"),
        (draft_model, {"num_draft_tokens": 0}, "num_draft_tokens is 0 but must be at least 1"),
        (draft_model, {"width": 0}, "width is 0 but must be at least 1"),
        (draft_model, {"width": 2, "max_nodes": 0}, "max_nodes is 0 but must be at least 1"),
        (draft_model, {"confidence_threshold": 1.0}, r"threshold is 1.0 but must be in \[0, 1\)"),
        (draft_model, {"confidence_threshold": -0.1}, r"threshold is -0.1 but must be in \[0, 1\)"),
        *((head_drafter, {"choices": choices}, message) for choices, message in NO_TREES),
        *((medusa, {"choices": choices}, message) for choices, message in NO_TREES),
        (reduced, {"choices": [[0], [4]]}, "rank 4 but .* 4 tokens; use ranks below 4"),
        (head_drafter, {"window": 0}, "window is 0 but must be at least 1"),
        (head_drafter, {"window": -1}, "window is -1 but must be at least 1"),
        (hybrid, {}, "drafters holds 1 but a hybrid merges at least two"),
        (partial(hybrid, NgramDrafter), {"max_nodes": 0}, "max_nodes is 0"),
        (partial(hybrid, draft_model), {}, "use width=2 or more"),
        (
            partial(hybrid, partial(head_drafter, children="without_replacement")),
            {},
            "children='without_replacement'",
        ),
    ],
)
def test_impossible_option_is_refused(build, options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_ranks_are_those_of_the_draft_vocabulary():
    assert reduced(choices=[[0], [3]]).max_nodes == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_nodes": 0}, "num_nodes is 0 but must be at least 1"),
        ({"acceptance": []}, "acceptance is empty"),
        ({"choices": []}, r"choices is \[\]"),
        ({"choices": DEEP}, "the tree has 3 levels but the head drafts 2"),
        ({"acceptance": [[0.9]] * 3, "max_nodes": 3}, "has 3 levels but the head drafts 2"),
        ({"width": 0}, "width is 0 but must be at least 1"),
        ({"width": 4, "choices": DEEP[:1]}, "width is 4, for a dynamic tree, but choices or acc"),
    ],
)
def test_medusa_refuses_tree_without_nodes_or_heads(tmp_path, options, message):
    target = small_target()
    path = save_tiny_head(tmp_path, "medusa", target, num_heads=2)
    with pytest.raises(ValueError, match=message):
        MedusaDrafter.load(target, path, **options)
    assert MedusaDrafter.load(target, path, choices=DEEP[:2]).max_nodes == 2
    dynamic = MedusaDrafter(lively_head("medusa", target, num_heads=2), VOCAB, TreeShape(depth=3))
    assert dynamic.shape.depth == 2
