"""Drafts for a small budget, for none, and after steps without one."""

import random

import pytest
import torch
from tiny_heads import tiny_head
from tiny_models import perturbed, tiny_llama, tiny_target

from specdec import generate
from specdec.drafters.draft_model import DraftModel
from specdec.drafters.eagle3 import Eagle3Drafter
from specdec.drafters.feature_head import Pending
from specdec.drafters.medusa import MedusaDrafter
from specdec.drafters.tree_growth import TreeShape
from specdec.engine.draft_length import Schedule
from specdec.targets.hf import HFTarget

PROMPTS = [[5, 6, 7, 8, 5, 6, 7], [3] * 12, [60]]


class OffFor:
    """No draft for so many steps, then drafts of any length."""

    def __init__(self, num_steps):
        self.left = num_steps

    def choose(self, batch_size):
        self.left -= 1
        return 0 if self.left >= 0 else None

    def learn(self, records):
        pass


def eagle3(target, **shape):
    top = target.config.num_hidden_layers
    head = tiny_head("eagle3", target, taps=[0, top // 2, top])
    return Eagle3Drafter(head, target.vocab_size, TreeShape(**shape))


def draft_model(target):
    return DraftModel(HFTarget(perturbed(tiny_llama(), 0.15), None), target.vocab_size, 4)


def count_forwards(drafter):
    """A list that grows with every forward of the head."""
    calls = []
    drafter.head.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_no_budget_costs_no_forward():
    target = tiny_target()
    drafter = eagle3(target)
    calls = count_forwards(drafter)
    generate(target, drafter, [PROMPTS[0]], max_new_tokens=40, draft_length=Schedule({1: 0}))
    assert len(calls) == 1


@pytest.mark.parametrize(("nodes", "forwards"), [(1, 1), (2, 2), (4, 4), (9, 5)])
def test_chain_feeds_no_level_beyond_budget(nodes, forwards):
    target = tiny_target()
    drafter = eagle3(target, width=1, depth=5)
    calls = count_forwards(drafter)
    schedule = Schedule({1: nodes})
    results = generate(target, drafter, [PROMPTS[0]], max_new_tokens=12, draft_length=schedule)
    full = [r for r in results[0].records if r.num_drafted == min(nodes, 5)]
    assert len(full) >= 4
    first = 1 + sum(min(r.num_drafted, 5) for r in results[0].records)
    assert len(calls) <= first
    assert len(calls) >= 1 + forwards * (len(full) - 1)


def test_medusa_asks_only_heads_within_budget():
    target = tiny_target()
    heads = tiny_head("medusa", target)
    drafter = MedusaDrafter(heads, target.vocab_size, TreeShape(choices=[[0], [0, 0], [0, 0, 0]]))
    asked = []
    guess = heads.guess
    heads.guess = lambda head, feature: asked.append(head) or guess(head, feature)
    generate(target, drafter, [PROMPTS[0]], max_new_tokens=20, draft_length=Schedule({1: 2}))
    assert set(asked) == {0, 1}


def drafts_of(drafter):
    """A list of all that a drafter proposes to a single row from now on."""
    proposed = []
    propose = drafter.propose

    def listen(root, budget, sampler):
        draft = propose(root, budget, sampler)
        if max(budget):
            proposed.append((root.tolist(), draft.tokens.tolist()))
        return draft

    drafter.propose = listen
    return proposed


@pytest.mark.parametrize("build", [eagle3, draft_model])
@pytest.mark.parametrize("pause", [1, 3, 70, 150])
def test_pause_changes_no_draft(build, pause):
    target = tiny_target()
    drafter = build(target)
    proposed = drafts_of(drafter)
    for prompt in PROMPTS:
        lengths = OffFor(pause)
        paused = generate(
            target, drafter, [prompt], max_new_tokens=pause + 30, draft_length=lengths
        )[0]
        after = proposed.copy()
        proposed.clear()
        fresh = generate(target, drafter, [[*prompt, *paused.tokens[:pause]]], max_new_tokens=30)
        assert fresh[0].tokens == paused.tokens[pause:]
        assert len(after) > 5
        assert after == proposed
        proposed.clear()


@pytest.mark.parametrize("seed", range(5))
def test_pending_parts_keep_order(seed):
    rng = random.Random(seed)
    pending, expected = Pending(), [[], [], []]
    for part in range(rng.randrange(1, 7)):
        width = rng.randrange(1, 5)
        counts = [rng.randrange(width + 1) for _ in expected]
        tokens = 100 * part + torch.arange(3 * width).view(3, width)
        pending.add([tokens, tokens.unsqueeze(2) + torch.tensor([0.25, 0.5])], counts.copy())
        for row, count in enumerate(counts):
            expected[row] += tokens[row, :count].tolist()
        if rng.random() < 0.3:
            pending.reorder(torch.tensor([2, 0, 1]))
            expected = [expected[2], expected[0], expected[1]]
    (tokens, tap), counts = pending.take()
    assert counts == [len(row) for row in expected]
    for row, wanted in enumerate(expected):
        assert tokens[row, : len(wanted)].tolist() == wanted
        assert tap[row, : len(wanted), 1].tolist() == [token + 0.5 for token in wanted]
    assert pending.num_columns == 0


@pytest.mark.parametrize("seed", range(3))
def test_rows_that_join_have_nothing_waiting(seed):
    torch.manual_seed(seed)
    pending, tokens = Pending(), torch.randint(9, (2, 4))
    pending.join(3)
    assert pending.num_columns == 0
    pending.add([tokens, tokens.unsqueeze(2).float()], [4, 1 + seed])
    pending.join(2)
    (taken, tap), counts = pending.take()
    assert counts == [4, 1 + seed, 0, 0]
    assert torch.equal(taken[:2], tokens)
    assert tap.shape == (4, 4, 1)


def test_joining_prompt_is_fed_alone():
    target = tiny_target()
    drafter = eagle3(target)
    fed = []
    drafter.head.register_forward_hook(lambda _, inputs, __: fed.append(list(inputs[0].shape)))
    prompts = [[5, 6, 7], [8, 9, 10, 11], [4] * 9]
    generate(
        target, drafter, prompts, max_new_tokens=[6, 30, 20], batch_size=2, draft_length=OffFor(99)
    )
    assert fed == [[2, 4], [1, 9]]  # rows, and tokens of the longest prompt


@pytest.mark.parametrize("build", [eagle3, draft_model])
def test_joined_rows_draft_as_if_alone(build):
    target = tiny_target()
    drafter = build(target)
    prompts, proposed = [[9, 8], [5, 6, 7, 8, 5, 6], [3] * 12], []
    propose = drafter.propose

    def listen(root, budget, sampler):
        draft = propose(root, budget, sampler)
        if max(budget):
            proposed.append(list(zip(root.tolist(), draft.tokens.tolist(), strict=True)))
        return draft

    drafter.propose = listen
    together = generate(
        target, drafter, prompts, max_new_tokens=[12, 80, 80], batch_size=2, draft_length=OffFor(20)
    )
    seen = proposed[:5]
    for place, (prompt, row) in enumerate(zip(prompts[1:], together[1:], strict=True)):
        proposed.clear()
        pause = sum(record.num_drafted == 0 for record in row.records[:20])
        generate(target, drafter, [prompt], max_new_tokens=80, draft_length=OffFor(pause))
        assert [drafts[place] for drafts in seen] == [drafts[0] for drafts in proposed[:5]]


def test_rows_that_join_late_keep_texts():
    target = tiny_target()
    drafter = draft_model(target)
    long = [list(torch.arange(100).remainder(90)), [7, 8, 9]]
    paused = generate(
        target, drafter, [*long, [4] * 80], max_new_tokens=[12, 130, 60], batch_size=2,
        draft_length=OffFor(80),
    )  # fmt: skip
    alone = [
        generate(target, drafter, [p], max_new_tokens=n)[0]
        for p, n in zip([*long, [4] * 80], [12, 130, 60], strict=True)
    ]
    assert [r.tokens for r in paused] == [r.tokens for r in alone]
