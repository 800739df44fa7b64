"""Rows of a data file: what is read, what is cut, and where a wrong one is."""

import pytest
from tiny_training import write_rows

from specdec.data.answers import AnswerRow, read_rows
from specdec.train.config import DataConfig
from specdec.train.data import load_split


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
        (row(answers=[]), "answers is empty"),
        (row([1, 2, 97], [(0, 2)]), "token id 97 is outside the target's vocabulary of 97"),
        (row([1, -1], [(0, 2)]), "token id -1"),
        (row([1, "a"], [(0, 2)]), "tokens must be a list of token ids"),
        (row(answers=[(2, 9)]), "within the row's 8 tokens"),
        (row(answers=[(2, 2)]), "non-empty span"),
        (row(answers=[(4, 6), (5, 7)]), "behind the one before"),
        (row(answers=[(1, 2, 3)]), "must be a pair"),
        ({"tokens": [1]}, 'an object with "tokens" and "answers"'),
        ([1], "a row must be an object"),
    ],
)
def test_a_wrong_row_is_named_by_file_and_line(tmp_path, wrong, message):
    path = write_rows(tmp_path / "a.jsonl", [row(), row(), wrong])
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 3: .*{message}"):
        list(read_rows(path, vocab_size=97))


def test_a_line_that_was_cut_short_is_named(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [row()])
    path.write_text(path.read_text() + '{"tokens": [1, 2')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: "):
        list(read_rows(path, vocab_size=97))


def test_rows_are_cut_to_max_len_with_their_answers():
    long = AnswerRow(tuple(range(8)), ((2, 4), (5, 8)))
    assert long.cut(6) == AnswerRow(tuple(range(6)), ((2, 4), (5, 6)))
    assert long.cut(5) == AnswerRow(tuple(range(5)), ((2, 4),))
    assert long.cut(9) == long


def split(tmp_path, rows, max_len=100, **settings):
    path = write_rows(tmp_path / "a.jsonl", rows)
    return load_split(DataConfig(path=str(path), **settings), 97, max_len)


def test_the_last_rows_are_for_validation(tmp_path):
    rows = [row([first, *range(7)]) for first in range(10)]
    for settings in ({"num_validation": 3}, {"validation_fraction": 0.3}):
        found = split(tmp_path, rows, **settings)
        assert [each.tokens[0] for each in found.training] == list(range(7))
        assert [each.tokens[0] for each in found.validation] == [7, 8, 9]
    assert [
        r.tokens[0] for r in split(tmp_path, rows, max_rows=4, num_validation=1).validation
    ] == [3]


def test_rows_without_an_answer_inside_max_len_are_dropped_and_counted(tmp_path):
    found = split(tmp_path, [row(), row(answers=[(5, 8)]), row(answers=[(2, 3)])], max_len=6)
    assert (len(found.training), found.num_dropped) == (1, 2)


def test_too_few_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing to train on: it is empty"):
        split(tmp_path, [])
    with pytest.raises(ValueError, match=r"none of its 1 rows .* max_len 3; raise data.max_len"):
        split(tmp_path, [row()], max_len=3)
    with pytest.raises(ValueError, match=r"holds 2 rows .* and 2 of them"):
        split(tmp_path, [row(), row()], num_validation=2)
    with pytest.raises(FileNotFoundError, match="is not a file"):
        load_split(DataConfig(path=str(tmp_path / "b.jsonl")), 97, 100)


def test_the_fingerprint_follows_the_content(tmp_path):
    marks = [split(tmp_path, rows).fingerprint for rows in ([row()], [row()], [row(range(1, 9))])]
    assert marks[0] == marks[1] != marks[2]
