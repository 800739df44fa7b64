"""A row that was decoded for a while is where a fresh prefill of its committed tokens would be.

What a drafter drafts, and every committed entry of its caches and the target's, is compared with
that of a new drafter that begins with all committed tokens as its prompt. Any key or feature that
is wrong, stale or misplaced after accepting, refusing, leaving or joining shows as a difference.
"""

import pytest
import torch
from lookup_steps import paths
from scripted import ScriptedDecoding
from test_lossless import VARIANTS, resolved, with_heads
from tiny_models import tiny_target

from specdec import SamplingConfig, load_drafter
from specdec.registry import DRAFTERS
from specdec.targets.hf import HFTarget

PROMPTS = [[5, 6, 7, 8, 5, 6, 7], [3] * 12, [11]]
NUM_TOKENS = 13  # so few that lookups find something in a scripted text
TREE = {"depth": 3, "width": 4, "max_nodes": 10}
CHOICES = [[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0]]
FEATURE_TREES = [
    TREE,
    {"choices": CHOICES},
    {"width": 1, "depth": 3},
    {**TREE, "window": 5},
    {"choices": CHOICES, "children": "without_replacement"},
    {"choices": CHOICES, "children": "with_replacement"},
]
OPTIONS = {
    **VARIANTS,
    "eagle": FEATURE_TREES,
    "eagle3": FEATURE_TREES,
    "mixture_of_attentions": FEATURE_TREES,
    "mtp": [*FEATURE_TREES, *({**each, "num_modules": 3} for each in FEATURE_TREES)],
    "dflash": FEATURE_TREES,
    "peagle": FEATURE_TREES,
    "hybrid": [
        {
            "drafters": [
                {"type": "ngram", "min_ngram": 1},
                {"type": "eagle", **TREE},
                {"type": "draft_model", "width": 3, "max_nodes": 8},
            ],
            "calibrate": False,
        }
    ],
    "medusa": [
        {"choices": CHOICES},
        {"choices": CHOICES, "children": "without_replacement"},
        {"width": 4, "max_nodes": 10},
    ],
    "suffix": [{"num_remembered": 0, "width": width, "min_match": 1} for width in (1, 3)],
}
CASES = [
    pytest.param(name, options, id=f"{name}-{index}")
    for name in DRAFTERS
    for index, options in enumerate(OPTIONS.get(name, [{}]))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return with_heads(tmp_path_factory.mktemp("drafts"), tiny_target(), num_layers=2)


def caches(drafter):
    """The drafter's KV caches."""
    found = [getattr(drafter, "cache", None)]
    found.append(getattr(getattr(drafter, "model", None), "cache", None))
    for inner in getattr(drafter, "drafters", ()):
        found += caches(inner)
    return [cache for cache in found if cache is not None]


def compare_caches(ours, fresh, rows):
    """All entries but the root's, which only some caches hold."""
    for index, committed in enumerate(rows):
        length = len(committed) - 1
        assert min(ours.lengths[index], fresh.lengths[index]) >= length
        here, there = (
            [
                states[index, :, :length].clone()
                for layer in cache.layers
                for states in (layer.keys, layer.values)
            ]
            for cache in (ours, fresh)
        )
        torch.testing.assert_close(here, there, atol=1e-4, rtol=1e-4)


def compare_drafts(ours, fresh):
    assert paths(ours) == paths(fresh)
    real = ours.real_nodes()[:, : int(ours.lengths.max())]
    for name in ("probs", "confidence"):
        here, there = getattr(ours, name), getattr(fresh, name)
        assert (here is None) == (there is None)
        if here is not None:
            here, there = (each[:, : real.shape[1]][real] for each in (here, there))
            torch.testing.assert_close(here, there, atol=1e-5, rtol=1e-3)


def step_beside_a_fresh_start(decoding, name, options, folder, budget=None):
    """Draft and commit, comparing with a target and a drafter that begin here."""
    rows, sampler = decoding.rows, decoding.sampler
    target = HFTarget(decoding.target.model)
    drafter = load_drafter(resolved(name, options, folder, target), target)
    with torch.inference_mode():
        output = target.prefill([row[:-1] for row in rows], drafter.taps)
        drafter.begin([list(row) for row in rows], output, sampler)
        limits = budget or [drafter.max_nodes] * len(rows)
        fresh = drafter.propose(torch.tensor([row[-1] for row in rows]), limits, sampler)
    assert decoding.target.lengths == [len(row) - 1 for row in rows]
    compare_caches(decoding.target.cache, target.cache, rows)
    draft = decoding.propose(budget)
    compare_drafts(draft, fresh)
    for ours, theirs in zip(caches(decoding.drafter), caches(drafter), strict=True):
        compare_caches(ours, theirs, rows)
    decoding.commit(draft)
    return draft.num_nodes


@pytest.mark.parametrize(("name", "options"), CASES)
def test_decoding_and_fresh_prefill_draft_alike(name, options, folder):
    target = tiny_target()
    drafter = load_drafter(resolved(name, options, folder, target), target)
    sampling = [SamplingConfig(temperature=0.8), SamplingConfig(repetition_penalty=1.1)]
    decoding = ScriptedDecoding(target, drafter, PROMPTS, sampling, num_tokens=NUM_TOKENS)
    drafted = 0

    def check(budget=None):
        nonlocal drafted
        drafted += step_beside_a_fresh_start(decoding, name, options, folder, budget)

    check()
    decoding.step()
    decoding.step([0, 0, 0])
    check()
    decoding.keep([2, 1])
    check([0, 4])
    decoding.join([[9, 8, 9, 8, 9], [4] * 20])
    check()
    decoding.step([3, 0, 9, 9])
    decoding.keep([3, 1, 2])
    decoding.join([[1, 2]])
    check()
    decoding.step()
    decoding.keep([0])
    check()
    assert drafted
    assert len(set(decoding.num_accepted)) > 1


@pytest.mark.parametrize(
    ("name", "options"), [("eagle3", {}), ("draft_model", {}), ("mtp", {"num_modules": 3})]
)
@pytest.mark.parametrize("pause", [3, 70, 150])  # within a part of what is fed late, and beyond
def test_pause_and_late_joins_change_no_draft(name, options, pause, folder):
    target = tiny_target()
    drafter = load_drafter(resolved(name, options, folder, target), target)
    decoding = ScriptedDecoding(target, drafter, PROMPTS, num_tokens=NUM_TOKENS)
    for _ in range(pause):
        decoding.step([0] * 3)
    decoding.join([[9, 8, 9]])
    decoding.step([0] * 4)
    decoding.keep([3, 0, 2])  # while several parts wait
    for _ in range(2):
        assert step_beside_a_fresh_start(decoding, name, options, folder)
        decoding.step([0] * 3)


@pytest.mark.parametrize("name", ["eagle", "eagle3"])
@pytest.mark.parametrize("options", FEATURE_TREES[:4], ids=["tree", "static", "chain", "window"])
def test_drafted_nodes_never_enter_the_draft_cache(name, options, folder):
    target = tiny_target()
    drafter = load_drafter(resolved(name, options, folder, target), target)
    decoding = ScriptedDecoding(target, drafter, PROMPTS, num_tokens=NUM_TOKENS)
    for _ in range(4):
        draft = decoding.propose()
        assert draft.num_nodes
        # Entry i pairs token i + 1 with feature i: one entry a committed token but the first.
        assert drafter.cache.lengths == [len(row) - 1 for row in decoding.rows]
        decoding.commit(draft)
