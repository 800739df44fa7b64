"""Hybrids: trees merged as sets of paths, the likeliest kept, and confidence that is learned."""

import random
from functools import reduce

import pytest
import torch
from lookup_steps import paths
from tiny_models import perturbed, tiny_llama, tiny_target

from specdec import generate
from specdec.drafters.base import BaseDrafter
from specdec.drafters.draft_model import DraftModel
from specdec.drafters.hybrid import PRIOR_WEIGHT, Calibration, HybridDrafter, join, pool_of
from specdec.drafters.lookup import pack_rows
from specdec.drafters.ngram import NgramDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.targets.hf import HFTarget

CPU = torch.device("cpu")


def random_row(draw):
    """A random tree without twins among siblings, and a confidence for each node."""
    nodes = []
    for _ in range(draw.randrange(9)):
        parent, token = draw.randrange(-1, len(nodes)), draw.randrange(4)
        if (parent, token) not in [node[:2] for node in nodes]:
            above = nodes[parent][2] if parent >= 0 else 1.0
            nodes.append((parent, token, above * draw.choice([0.25, 0.5, 1.0])))
    return nodes


def random_draft(draw, num_rows=4):
    return pack_rows([random_row(draw) for _ in range(num_rows)], CPU, as_chain=False)


def confidence_of(draft):
    """Row by row: path -> confidence."""
    return [
        dict(zip(row, values, strict=False))
        for row, values in zip(paths(draft), draft.confidence.tolist(), strict=True)
    ]


def paths_in(pool, row):
    """Path -> place of the real candidates of a row."""
    found = {}
    for place in range(pool.tokens.shape[1]):
        if pool.real[row, place]:
            path, at = (), place
            while at >= 0:
                path, at = (int(pool.tokens[row, at]), *path), int(pool.parents[row, at])
            assert path not in found, "a path stands in the pool twice"
            found[path] = place
    return found


@pytest.mark.parametrize("seed", range(20))
def test_merged_pool_holds_every_path_once(seed):
    draw = random.Random(seed)
    drafts = [random_draft(draw) for _ in range(3)]
    drafts = [draft for draft in drafts if draft.num_nodes] or [random_draft(random.Random(1))]
    pool = reduce(join, map(pool_of, drafts))
    wanted = [confidence_of(draft) for draft in drafts]
    for row in range(4):
        found = paths_in(pool, row)
        assert set(found) == {path for source in wanted for path in source[row]}
        for path, place in found.items():
            assert int(pool.parents[row, place]) == (found[path[:-1]] if path[1:] else -1)
            for source, confidences in enumerate(wanted):
                assert pool.confidence[source, row, place] == confidences[row].get(path, 0.0)


class Scripted(BaseDrafter):
    """Proposes a given draft, never changes its mind, and counts how often it is asked."""

    makes_trees, max_nodes = True, 99

    def __init__(self, nodes, expected=()):
        self.nodes, self.expected, self.times = nodes, expected, 0

    def propose(self, root, budget, sampler):
        self.times += 1
        return pack_rows([self.nodes[:limit] for limit in budget], root.device, as_chain=False)


def proposal(hybrid, budgets):
    root = torch.zeros(len(budgets), dtype=torch.long)
    return hybrid.propose(root, budgets, None)


def test_hybrid_keeps_likeliest_nodes_within_budget():
    first = Scripted([(-1, 1, 0.9), (0, 2, 0.3), (1, 3, 0.2)])
    second = Scripted([(-1, 1, 0.6), (-1, 4, 0.4), (0, 2, 0.5), (0, 5, 0.05)])
    hybrid = HybridDrafter([first, second], max_nodes=4, calibrate=False)
    draft = proposal(hybrid, [9, 3, 0])
    # (1, 2): 0.9 from the first, times 0.5 / 0.6 from the second.
    assert paths(draft) == [[(1,), (1, 2), (1, 2, 3), (4,)], [(1,), (1, 2), (1, 2, 3)], []]
    assert draft.probs is None
    nobody = HybridDrafter([Scripted([]), Scripted([])])
    assert proposal(nobody, [5, 5]).num_nodes == 0


def test_calibration_moves_toward_acceptance():
    calibration = Calibration(2, CPU)
    confidence = torch.tensor([[[0.95, 0.0]], [[0.05, 0.55]]])  # [S, B, K]
    expected = torch.tensor([[[0.95, 0.05]], [[0.05, 0.55]]])
    torch.testing.assert_close(calibration.acceptance(confidence), expected)
    counted = torch.tensor([[[True, False]], [[True, True]]])
    for _ in range(30):
        calibration.add(confidence, counted, torch.tensor([[False, True]]))
    first = PRIOR_WEIGHT * 0.95 / (PRIOR_WEIGHT + 30)
    third = (PRIOR_WEIGHT * 0.55 + 30) / (PRIOR_WEIGHT + 30)
    learned = torch.tensor([[[first, 0.05]], [[PRIOR_WEIGHT * 0.05 / (PRIOR_WEIGHT + 30), third]]])
    torch.testing.assert_close(calibration.acceptance(confidence), learned)
    assert calibration.acceptance(torch.ones(2, 1, 1)).shape == (2, 1, 1)


def test_hybrid_learns_to_drop_wrong_drafter():
    target = tiny_target()
    liar = Scripted([(-1, 96, 1.0), (0, 96, 1.0), (1, 96, 1.0)])
    truth = DraftModel(HFTarget(target.model), 97, num_draft_tokens=3, width=2, max_nodes=6)
    hybrid = HybridDrafter([liar, truth], max_nodes=3)
    results = generate(target, hybrid, [[1, 2, 3]], max_new_tokens=120)
    records = results[0].records
    early = sum(r.num_accepted for r in records[:5]) / 5
    late = sum(r.num_accepted for r in records[-5:-1]) / 4
    assert late > early
    assert late == 3, "the draft model is the target itself, so all of its nodes fit"


def test_hybrid_accepts_more_than_either_drafter():
    target = tiny_target()
    draft = HFTarget(perturbed(tiny_llama(), 0.15))

    def drafters():
        model = DraftModel(draft, 97, num_draft_tokens=4, width=2, max_nodes=8)
        return [SuffixDrafter(min_match=1, num_remembered=0), model]

    def steps(drafter):
        prompts = [[5, 6, 7, 8] * 3, [9], [3] * 6]
        results = generate(target, drafter, prompts, max_new_tokens=60)
        return sum(result.stats.num_steps for result in results)

    both = HybridDrafter(drafters(), max_nodes=16)
    assert steps(both) < min(map(steps, drafters()))


def test_sure_lookup_spares_later_drafters():
    lookup, neural = Scripted([(-1, 1, 0.9)], [5.0, 4.0]), Scripted([(-1, 2, 0.9)])
    hybrid = HybridDrafter([lookup, neural], enough=4.5)
    proposal(hybrid, [9, 9])
    assert (lookup.times, neural.times) == (1, 1), "the second row does not expect enough"
    draft = proposal(hybrid, [9, 0])
    assert (lookup.times, neural.times) == (2, 1), "a row without a budget wants nothing"
    assert paths(draft) == [[(1,)], []]
    hybrid.enough = None
    proposal(hybrid, [9, 0])
    assert neural.times == 2


def test_single_draft_is_taken_as_is():
    chain = NgramDrafter(min_ngram=1)
    hybrid = HybridDrafter([Scripted([]), chain], max_nodes=8)
    hybrid.begin([[1, 2, 1]], None, None)
    assert proposal(hybrid, [8]).is_chain
    # Too many nodes for the budget are cut to the likeliest.
    hybrid.max_nodes = 1
    assert paths(proposal(hybrid, [8])) == [[(2,)]]
