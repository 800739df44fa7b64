"""Texts that were there before: each fault is told, and none is misread."""

import json

import pytest
from tiny_models import tiny_target

from specdec import SamplingConfig
from specdec.analysis.predict import Predictor
from specdec.analysis.texts import Text, check_texts, read_texts


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
    ("name", "content", "sizes"),
    [
        ("a.txt", "abcabc hello", [(1, 8), (9, 3)]),
        ("a.jsonl", row("ab", "0123456789"), [(2, 8)]),
        ("a.jsonl", json.dumps({"tokens": [1, 2, 3, 4, 5], "answers": [[0, 1], [2, 5]]}), [(2, 3)]),
        # A line separator may stand inside a JSON text; only a newline ends a row.
        ("a.jsonl", "\n".join(["", row("a", "b\u2028c"), "", row("d", "e")]), [(1, 3), (1, 1)]),
    ],
)
def test_texts_are_cut_into_prompt_and_answer(target, tmp_path, name, content, sizes):
    (tmp_path / name).write_text(content + "\n" * (name != "a.txt"), encoding="utf-8")
    texts = read_texts(tmp_path / name, target, 5, 8)
    assert [(len(text.prompt), len(text.tokens)) for text in texts] == sizes
    assert {text.max_tokens for text in texts} == {8}


def test_pieces_of_a_long_text_leave_a_prompt(target, tmp_path):
    (tmp_path / "a.txt").write_text("abcdefgh" * 80)
    texts = read_texts(tmp_path / "a.txt", target, 5, 10 * target.max_context_len)
    check_texts(texts, target)
    assert len(texts[0].tokens) == target.max_context_len - 1
    assert sum(len(text.tokens) for text in texts) == 8 * 80 - 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "x", "holds no text of at least one token behind a prompt"),
        ("a.jsonl", row("a", "b") + "\n{nonsense", ":2: not JSON"),
        ("a.jsonl", "5", ":1: 5 is no object"),
        ("a.jsonl", '{"prompt": "a"}', 'row 1: a row must be an object with "prompt" and "answer"'),
        ("a.jsonl", row([{"role": "user", "content": "a"}], "b"), 'row 1: .*"answer", both text'),
        ("a.jsonl", row("a", None), 'row 1: .*"answer", both text'),
        ("a.jsonl", '{"tokens": [500], "answers": [[0, 1]]}', "outside the target's vocabulary"),
        ("gone.jsonl", None, "is not there"),
        ("", None, "holds no finished answers .*make it with specdec regenerate"),
    ],
)
def test_texts_that_cannot_be_read_are_refused(target, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_texts(tmp_path / name, target, 5, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (Text([], [1], 4), "0 prompt tokens"),
        (Text([1], [], 4), "and 0 new ones; give one of each"),
        (Text([1], [2, 3], 1), "was allowed 1"),
        (Text([1], [2] * 256, 256), "the target's context holds 256"),
        (Text([1], [2, 97], 4), "has token 97"),
    ],
)
def test_texts_of_another_target_are_refused(target, text, message):
    with pytest.raises(ValueError, match=message):
        Predictor(target, [text], SamplingConfig())
