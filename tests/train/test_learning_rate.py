"""Learning rate and draft vocabulary: small functions with exact values."""

import pytest
import torch

from specdec.data.answers import AnswerRow
from specdec.train.data import coverage, most_frequent
from specdec.train.trainer import learning_rate


def test_warm_up_is_linear_and_the_rest_is_half_a_cosine():
    rates = [learning_rate(step, peak=2.0, num_warmup=4, num_steps=12) for step in range(12)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0
    assert rates[8] == pytest.approx(1.0)
    assert rates[6] == pytest.approx(1 + 0.5**0.5)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.1
    assert learning_rate(12, 2.0, 4, 12) == pytest.approx(0)


def test_without_warm_up_the_peak_comes_first():
    assert learning_rate(0, 2.0, 0, 10) == 2.0


def test_a_run_may_be_all_warm_up():
    assert learning_rate(4, 2.0, 10, 5) == 1.0


ROWS = [AnswerRow((9, 9, 9, 3, 3, 7, 5), ((3, 7),)), AnswerRow((1, 3, 2), ((1, 3),))]


def test_the_draft_vocabulary_is_what_answers_hold_most_often():
    assert most_frequent(ROWS, 1, 10).tolist() == [3]
    assert most_frequent(ROWS, 3, 10).tolist() == [2, 3, 5]
    assert coverage(ROWS, torch.tensor([3]), 10) == 0.5
    assert coverage(ROWS, torch.arange(10), 10) == 1.0
    assert coverage([], torch.arange(10), 10) is None
