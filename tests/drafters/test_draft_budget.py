"""Costs of drafts for a small budget, for none, and after steps without one."""

import random

import pytest
import torch
from tiny_heads import tiny_head
from tiny_models import tiny_target

from specdec import generate
from specdec.drafters import feature_head
from specdec.drafters.draft_model import DraftModel
from specdec.drafters.eagle3 import Eagle3Drafter
from specdec.drafters.feature_head import merged
from specdec.drafters.medusa import MedusaDrafter
from specdec.drafters.tree_growth import TreeShape
from specdec.engine.draft_length import Schedule

PROMPT = [5, 6, 7, 8, 5, 6, 7]


def eagle3(target, **shape):
    """A drafter, and the shapes of the tokens [rows, n] of every forward of its head."""
    top, fed = target.config.num_hidden_layers, []
    head = tiny_head("eagle3", target, taps=[0, top // 2, top])
    head.register_forward_hook(lambda _, inputs, __: fed.append(list(inputs[0].shape)))
    return Eagle3Drafter(head, target.vocab_size, TreeShape(**shape)), fed


PROMPTS = [[5, 6, 7], [8, 9, 10, 11], [4] * 9]


def test_no_budget_costs_no_forward():
    target = tiny_target()
    drafter, fed = eagle3(target)
    draft_model = DraftModel(tiny_target(), target.vocab_size)
    draft_model.model.model.register_forward_hook(lambda *_: fed.append("draft model"))
    lengths = {"max_new_tokens": [6, 30, 20], "draft_length": Schedule({1: 0})}
    for each in (drafter, draft_model):
        generate(target, each, PROMPTS, batch_size=2, **lengths)
    assert fed == []


def test_prompts_of_late_drafts_are_fed_apart():
    target = tiny_target()
    drafter, fed = eagle3(target, width=1, depth=1)
    lengths = {"max_new_tokens": [6, 30, 20], "draft_length": Schedule({1: 1})}
    generate(target, drafter, PROMPTS, batch_size=2, **lengths)
    assert [shape for shape in fed if shape[1] > 2] == [[2, 4], [1, 9]]


def test_taps_of_prompts_wait_within_bounds(monkeypatch):
    monkeypatch.setattr(feature_head, "MAX_UNREAD", 12)
    target = tiny_target()
    drafter, fed = eagle3(target)
    lengths = {"max_new_tokens": [6, 30, 20], "draft_length": Schedule({1: 0})}
    generate(target, drafter, PROMPTS, batch_size=2, **lengths)
    assert fed == [[2, 9]]  # the second and the third wait together, which is too much


@pytest.mark.parametrize(("nodes", "forwards"), [(1, 1), (2, 2), (4, 4), (9, 5)])
def test_chain_feeds_no_level_beyond_budget(nodes, forwards):
    target = tiny_target()
    drafter, fed = eagle3(target, width=1, depth=5)
    schedule = Schedule({1: nodes})
    records = generate(target, drafter, [PROMPT], max_new_tokens=12, draft_length=schedule)[
        0
    ].records
    full = [record for record in records if record.num_drafted == min(nodes, 5)]
    assert len(full) >= 4
    assert len(fed) <= 1 + sum(min(record.num_drafted, 5) for record in records)
    assert len(fed) >= 1 + forwards * (len(full) - 1)


def test_medusa_asks_only_heads_within_budget():
    target = tiny_target()
    heads = tiny_head("medusa", target)
    drafter = MedusaDrafter(heads, target.vocab_size, TreeShape(choices=[[0], [0, 0], [0, 0, 0]]))
    asked, guess = [], heads.guess
    heads.guess = lambda head, feature: asked.append(head) or guess(head, feature)
    generate(target, drafter, [PROMPT], max_new_tokens=20, draft_length=Schedule({1: 2}))
    assert set(asked) == {0, 1}


@pytest.mark.parametrize("seed", range(8))
def test_merged_parts_keep_each_rows_order(seed):
    draw = random.Random(seed)
    parts, expected = [], [[], [], []]
    for part in range(draw.randrange(1, 7)):
        width = draw.randrange(1, 5)
        counts = [draw.randrange(width + 1) for _ in expected]
        tokens = 100 * part + torch.arange(3 * width).view(3, width)
        parts.append(([tokens, tokens.unsqueeze(2) + torch.tensor([0.25, 0.5])], counts))
        for row, count in enumerate(counts):
            expected[row] += tokens[row, :count].tolist()
    (tokens, tap), counts = merged(parts)
    assert counts == [len(row) for row in expected]
    for row, wanted in enumerate(expected):
        assert tokens[row, : len(wanted)].tolist() == wanted
        assert tap[row, : len(wanted), 1].tolist() == [token + 0.5 for token in wanted]
