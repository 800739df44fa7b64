"""Engine layouts: there and back, and the same verdicts."""

import pytest
import torch

from specdec.verify import (
    Draft,
    from_flat,
    from_retrieve,
    match,
    target_from_flat,
    to_flat,
    to_retrieve,
    verdict_to_retrieve,
    verify,
)

FLAT = torch.tensor([5, 6, 7, 8, 9, 4])
CUMULATIVE = torch.tensor([2, 2, 5, 6], dtype=torch.int32)


@pytest.mark.parametrize("max_len", [None, 3, 5])
def test_flat_chains_come_back_as_they_were(max_len):
    probs = torch.rand(6, 10)
    draft = from_flat(FLAT, CUMULATIVE, max_len=max_len, probs=probs)
    assert draft.tokens[:, :3].tolist() == [[5, 6, -1], [-1, -1, -1], [7, 8, 9], [4, -1, -1]]
    assert draft.lengths.tolist() == [2, 0, 3, 1]
    tokens, cumulative, flat_probs, index = to_flat(draft, total=None if max_len is None else 6)
    assert torch.equal(tokens, FLAT)
    assert torch.equal(cumulative, CUMULATIVE)
    assert torch.equal(flat_probs, probs)
    assert torch.equal(draft.tokens.flatten()[index], FLAT)


def test_flat_layout_without_tokens_is_empty():
    nothing = torch.empty(0, dtype=torch.long)
    draft = from_flat(nothing, torch.tensor([0, 0]), max_len=2)
    assert draft.tokens.tolist() == [[-1, -1], [-1, -1]]
    assert to_flat(draft, total=0)[0].tolist() == []


def test_flat_target_rows_land_behind_their_nodes():
    rows = torch.softmax(torch.randn(10, 10, generator=torch.Generator().manual_seed(0)), 1)
    padded = target_from_flat(rows, CUMULATIVE, 3)
    assert padded.shape == (4, 4, 10)
    assert torch.equal(padded[0, :3], rows[:3])
    assert torch.equal(padded[1, :1], rows[3:4])
    assert torch.equal(padded[2], rows[4:8])
    assert torch.equal(padded[3, :2], rows[8:])
    draft = from_flat(FLAT, CUMULATIVE, max_len=3)
    verdict = verify(padded, draft, uniforms=torch.zeros(4, 3), noise=torch.ones(4, 10))
    assert verdict.num_accepted.tolist() == [2, 0, 3, 1]


def test_a_tree_has_no_flat_layout():
    with pytest.raises(ValueError, match="parents"):
        to_flat(Draft.tree(torch.tensor([[1]]), torch.tensor([-1])))


def test_links_spell_first_children_and_next_siblings():
    draft = Draft(
        torch.tensor([[1, 2, 3, 4], [7, 8, -1, -1]]),
        torch.tensor([4, 2]),
        torch.tensor([[-1, -1, 0, 0], [-1, 0, -1, -1]]),
        None,
        2,
    )
    candidates, index, child, sibling = to_retrieve(draft, torch.tensor([9, 6]))
    assert candidates.tolist() == [[9, 1, 2, 3, 4], [6, 7, 8, -1, -1]]
    assert index.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert child.tolist() == [[1, 3, -1, -1, -1], [1, 2, -1, -1, -1]]
    assert sibling.tolist() == [[-1, 2, -1, 4, -1], [-1, -1, -1, -1, -1]]


@pytest.mark.parametrize("seed", range(20))
def test_trees_survive_the_way_through_links(seed):
    generator = torch.Generator().manual_seed(seed)
    fraction = torch.rand(3, 9, generator=generator)
    parents = (fraction * (torch.arange(9) + 1)).long() - 1
    tokens = torch.randint(0, 50, (3, 9), generator=generator)
    draft = Draft.tree(tokens, parents, depth=9)
    candidates, _, child, sibling = to_retrieve(draft, torch.zeros(3, dtype=torch.long))
    back = from_retrieve(candidates, child, sibling, depth=9)
    assert torch.equal(back.tokens, tokens)
    assert torch.equal(back.parents, parents)


def test_verdict_becomes_slots_and_following_tokens():
    draft = Draft.tree(torch.tensor([[1, 2, 3], [1, 2, 3]]), torch.tensor([-1, -1, 1]), depth=2)
    verdict = match(torch.tensor([[2, 0, 3, 8], [5, 0, 0, 0]]), draft)
    predicts, accept_index, counts = verdict_to_retrieve(verdict, draft)
    assert accept_index.tolist() == [[0, 2, 3], [4, -1, -1]]
    assert predicts.view(2, 4).tolist() == [[2, 0, 3, 8], [5, 0, 0, 0]]
    assert counts.tolist() == [2, 0]
