"""Texts that were there before: what is wrong with them is told by line, and none is misread."""

import json

import pytest
from tiny_models import tiny_target

from specdec.analysis.texts import check_texts, read_texts


class Letters:
    """A tokenizer with one id a letter."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(letter) % 97 for letter in text]}


@pytest.fixture(scope="module")
def target():
    found = tiny_target()
    found.tokenizer = Letters()
    return found


def row(prompt, answer):
    return json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([row("a", "b"), "{nonsense"], "line 2: this is no JSON"),
        (["5"], "line 1: a row must be a JSON object"),
        ([row([{"role": "user", "content": "a"}], "b")], 'line 1: .*"answer", both text'),
        ([row("a", None)], 'line 1: .*"answer", both text'),
    ],
)
def test_a_line_that_cannot_be_read_is_told_by_its_number(target, tmp_path, lines, message):
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        read_texts(tmp_path / "a.jsonl", target, 5, 8)


def test_empty_lines_and_unusual_separators_are_no_rows(target, tmp_path):
    """A line separator may stand inside a JSON text; only a newline ends a row."""
    rows = ["", row("a", "b\u2028c"), "", row("d", "e"), ""]
    (tmp_path / "a.jsonl").write_text("\n".join(rows), encoding="utf-8")
    texts = read_texts(tmp_path / "a.jsonl", target, 5, 8)
    assert [len(text.tokens) for text in texts] == [3, 1]


def test_pieces_of_a_long_text_leave_room_for_a_prompt(target, tmp_path):
    (tmp_path / "a.txt").write_text("abcdefgh" * 80)
    texts = read_texts(tmp_path / "a.txt", target, 5, 10 * target.max_context_len)
    check_texts(texts, target)
    assert len(texts[0].tokens) == target.max_context_len - 1
    assert sum(len(text.tokens) for text in texts) == 8 * 80 - 1
