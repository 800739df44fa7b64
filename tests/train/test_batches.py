"""Which rows make a step, and what they look like as tensors."""

import random

import torch
from tiny_models import tiny_target

from specdec.data.answers import AnswerRow
from specdec.train.data import StepPlan, collate, view

LENGTHS = random.Random(0).choices(range(5, 300), k=103)


def epoch(plan, number=0):
    """Batches of all steps of an epoch."""
    first = number * plan.steps_per_epoch
    return [plan.batches(step) for step in range(first, first + plan.steps_per_epoch)]


def test_every_epoch_holds_every_row_once():
    plan = StepPlan(LENGTHS, batch_size=8, batches_per_step=3)
    for number in range(2):
        rows = [row for step in epoch(plan, number) for batch in step for row in batch]
        assert sorted(rows) == list(range(103))
    assert epoch(plan, 0) != epoch(plan, 1)


def test_a_step_takes_its_batches_and_the_last_one_what_is_left():
    steps = epoch(StepPlan(LENGTHS, batch_size=8, batches_per_step=6))
    assert [len(step) for step in steps] == [6, 6, 1]


def test_a_step_depends_on_the_seed_and_its_number_alone():
    plan = StepPlan(LENGTHS, 8)
    forth = [plan.batches(step) for step in range(30)]
    back = [StepPlan(LENGTHS, 8).batches(step) for step in reversed(range(30))]
    assert forth == back[::-1]
    assert StepPlan(LENGTHS, 8, seed=1).batches(0) != forth[0]


def test_rows_of_a_batch_are_of_like_length():
    batches = [batch for step in epoch(StepPlan(LENGTHS, 8)) for batch in step]
    padded = sum(max(LENGTHS[row] for row in batch) * len(batch) for batch in batches)
    assert padded < 1.1 * sum(LENGTHS)
    assert batches != sorted(batches, key=lambda batch: LENGTHS[batch[0]])


ROWS = [AnswerRow((5, 6, 7, 8, 9), ((1, 3), (4, 5))), AnswerRow((9, 8, 7), ((2, 3),))]


def test_the_mask_is_the_answers_and_never_padding():
    batch = collate(ROWS)
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9], [9, 8, 7, 0, 0]]
    assert batch.loss_mask.int().tolist() == [[0, 1, 1, 0, 1], [0, 0, 1, 0, 0]]


def test_the_last_tap_is_what_the_vocabulary_projection_reads():
    target = tiny_target()
    seen = view(target, (0, 1, 2), collate(ROWS), torch.float32)
    projected = target.model.get_output_embeddings()(seen.hidden[2])
    assert torch.equal(projected, seen.target_logits)
    embedded = target.model.get_input_embeddings()(seen.tokens)
    assert torch.equal(embedded, seen.hidden[0])
    assert not seen.target_logits.requires_grad


def test_padding_changes_nothing_that_is_read():
    target = tiny_target()
    together = view(target, (1, 2), collate(ROWS), torch.float32)
    for place, row in enumerate(ROWS):
        alone = view(target, (1, 2), collate([row]), torch.float32)
        length = len(row.tokens)
        torch.testing.assert_close(together.target_logits[place, :length], alone.target_logits[0])
        for tap in (1, 2):
            torch.testing.assert_close(together.hidden[tap][place, :length], alone.hidden[tap][0])
