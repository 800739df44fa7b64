"""Rows of a run: read, cut and split, planned into steps, and laid out as tensors."""

import json
import random

import pytest
import torch
from tiny_models import tiny_target
from tiny_training import write_rows

from specdec.data.answers import AnswerRow, read_rows
from specdec.train.config import DataConfig
from specdec.train.data import OnlineSource, Split, StepPlan, choose_vocabulary, load_split


def row(tokens=range(8), answers=((2, 4), (5, 8)), **more):
    return {"tokens": list(tokens), "answers": [list(span) for span in answers], **more}


def test_rows_come_back_as_written(tmp_path):
    named = {"id": "q7", "domain": "maths", "temperature": 0.8, "finish_reason": "stop"}
    path = write_rows(tmp_path / "a.jsonl", [row(), row(range(3), [(1, 3)], **named)])
    rows = list(read_rows(path, vocab_size=8))
    assert rows == [
        AnswerRow(tuple(range(8)), ((2, 4), (5, 8)), "line 1"),
        AnswerRow((0, 1, 2), ((1, 3),), "q7", "maths", 0.8),
    ]
    assert rows[0].num_answer_tokens == 5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (row(answers=[]), "answers is .* at least 1"),
        (row([1, 2, 97], [(0, 2)]), "token id 97 is outside the target's vocabulary of 97"),
        (row([1, -1], [(0, 2)]), "token id -1"),
        (row([1, "a"], [(0, 2)]), "tokens.1 is 'a' but must be a whole number"),
        (row(answers=[(2, 9)]), "within the row's 8 tokens"),
        (row(answers=[(2, 2)]), "non-empty span"),
        (row(answers=[(4, 6), (5, 7)]), "behind the one before"),
        (row(answers=[(1, 2, 3)]), "answers.0 is .* at most 2"),
        ({"tokens": [1]}, "answers is missing"),
        ([1], "must be a mapping"),
        ('{"tokens": [1, 2', ""),
    ],
)
def test_wrong_row_is_named_by_file_and_line(tmp_path, wrong, message):
    path = write_rows(tmp_path / "a.jsonl", [row(), row()])
    text = wrong if isinstance(wrong, str) else json.dumps(wrong)
    path.write_text(path.read_text() + text)
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 3: .*{message}"):
        list(read_rows(path, vocab_size=97))


def test_cut_row_keeps_the_start_of_its_answers():
    long = AnswerRow(tuple(range(8)), ((2, 4), (5, 8)))
    assert long.cut(6) == AnswerRow(tuple(range(6)), ((2, 4), (5, 6)))
    assert long.cut(5) == AnswerRow(tuple(range(5)), ((2, 4),))
    assert long.cut(9) == long


def split(tmp_path, rows, max_len=100, **settings):
    path = write_rows(tmp_path / "a.jsonl", rows)
    return load_split(DataConfig(**{"path": str(path), **settings}), 97, max_len)


@pytest.mark.parametrize(
    ("settings", "held_out"),
    [
        ({"num_validation": 3}, [7, 8, 9]),
        ({"validation_fraction": 0.3}, [7, 8, 9]),
        ({"max_rows": 4, "num_validation": 1}, [3]),
    ],
)
def test_last_rows_are_held_out(tmp_path, settings, held_out):
    found = split(tmp_path, [row([first, *range(7)]) for first in range(10)], **settings)
    assert [each.tokens[0] for each in found.validation] == held_out
    assert [each.tokens[0] for each in found.training] == list(range(held_out[0]))


def test_rows_without_an_answer_are_counted(tmp_path):
    found = split(tmp_path, [row(), row(answers=[(5, 8)]), row(answers=[(2, 3)])], max_len=6)
    assert (len(found.training), found.num_dropped) == (1, 2)


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([], {}, "nothing to train on: none of its 0 rows"),
        ([row()], {"max_len": 3}, r"none of its 1 rows .* max_len 3; raise data.max_len"),
        ([row(), row()], {"num_validation": 2}, r"holds 2 rows .* and 2 of them"),
        ([row()], {"path": "none.jsonl"}, "neither a folder .* nor a JSONL file"),
    ],
)
def test_too_few_rows_are_refused(tmp_path, rows, settings, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        split(tmp_path, rows, **settings)


def test_fingerprint_follows_the_content(tmp_path):
    marks = [split(tmp_path, rows).fingerprint for rows in ([row()], [row()], [row(range(1, 9))])]
    assert marks[0] == marks[1] != marks[2]


LENGTHS = random.Random(0).choices(range(5, 300), k=103)
TEXTS = [AnswerRow((0,) * n, ((1, n),), str(number)) for number, n in enumerate(LENGTHS)]


def epoch(plan, number=0):
    """Batches of all steps of an epoch."""
    first = number * plan.steps_per_epoch
    return [plan.batches(step) for step in range(first, first + plan.steps_per_epoch)]


def test_epoch_holds_every_row_once():
    plan = StepPlan(TEXTS, batch_size=8, batches_per_step=3)
    for number in range(2):
        rows = [row.id for step in epoch(plan, number) for batch in step for row in batch]
        assert sorted(rows, key=int) == [str(n) for n in range(103)]
    assert epoch(plan, 0) != epoch(plan, 1)


def test_step_depends_on_seed_and_number_alone():
    plan = StepPlan(TEXTS, 8)
    forth = [plan.batches(step) for step in range(30)]
    back = [StepPlan(TEXTS, 8).batches(step) for step in reversed(range(30))]
    assert forth == back[::-1]
    assert StepPlan(TEXTS, 8, seed=1).batches(0) != forth[0]


def test_batch_holds_rows_of_like_length():
    batches = [batch for step in epoch(StepPlan(TEXTS, 8)) for batch in step]
    padded = sum(max(len(row.tokens) for row in batch) * len(batch) for batch in batches)
    assert padded < 1.1 * sum(LENGTHS)
    assert batches != sorted(batches, key=lambda batch: len(batch[0].tokens))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_the_batches_of_a_step(world):
    plans = [StepPlan(TEXTS, 8, 6, rank=rank, world=world) for rank in range(world)]
    shared = [batch for plan in plans for batch in plan]
    assert len({len(list(plan)) for plan in plans}) == 1
    for step, batches in enumerate(epoch(plans[0])):
        found = {each.place: each for each in shared if each.step == step and each.weight}
        assert [found[place].rows for place in sorted(found)] == batches
        assert sum(each.weight for each in found.values()) == pytest.approx(1)
    assert [len(batches) for batches in epoch(plans[0])] == [6, 6, 1]


ROWS = [AnswerRow((5, 6, 7, 8, 9), ((1, 3), (4, 5))), AnswerRow((9, 8, 7), ((2, 3),))]


def test_mask_is_the_answers_and_never_padding():
    batch = OnlineSource(tiny_target(), (), torch.float32).batch(ROWS)
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9], [9, 8, 7, 0, 0]]
    assert batch.loss_mask.int().tolist() == [[0, 1, 1, 0, 1], [0, 0, 1, 0, 0]]


def test_last_tap_is_what_the_projection_reads():
    target = tiny_target()
    seen = OnlineSource(target, (0, 1, 2), torch.float32).batch(ROWS)
    projected = target.model.get_output_embeddings()(seen.hidden[2])
    assert torch.equal(projected, seen.target_logits)
    embedded = target.model.get_input_embeddings()(seen.tokens)
    assert torch.equal(embedded, seen.hidden[0])
    assert not seen.target_logits.requires_grad


def test_padding_changes_nothing_that_is_read():
    source = OnlineSource(tiny_target(), (1, 2), torch.float32)
    together = source.batch(ROWS)
    for place, each in enumerate(ROWS):
        alone = source.batch([each])
        length = len(each.tokens)
        torch.testing.assert_close(together.target_logits[place, :length], alone.target_logits[0])
        for tap in (1, 2):
            torch.testing.assert_close(together.hidden[tap][place, :length], alone.hidden[tap][0])


ANSWERS = [AnswerRow((9, 9, 9, 3, 3, 7, 5), ((3, 7),)), AnswerRow((1, 3, 2), ((1, 3),))]


def test_draft_vocabulary_holds_the_most_frequent_tokens():
    tokens, found = choose_vocabulary(Split(ANSWERS, ANSWERS[1:]), 1, 10)
    assert tokens.tolist() == [3]
    assert (found.training_coverage, found.validation_coverage) == (0.5, 0.5)
    tokens, found = choose_vocabulary(Split(ANSWERS, []), 3, 10)
    assert tokens.tolist() == [2, 3, 5]
    assert found.validation_coverage is None
