"""Readers of files, and what their records ask."""

import csv
import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_chat import said, user

from specdec.common.messages import NoQueryError, find_queries
from specdec.common.records import RecordFile, form_of


def asked(record, turns="all"):
    """(texts of the messages or of the completion, answer) of each query."""
    return [
        ([turn["content"] for turn in each.messages] or each.text, each.answer)
        for each in find_queries(record, turns)
    ]


ANSWER = {"choices": [{"message": said("Hi!")}]}
CHAT = {"model": "m", "messages": [{"role": "developer", "content": "Be kind."}, *user("Hello")]}
LOGGED = {"request": CHAT, "response": ANSWER, "status": 200}
ONE = [(["Be kind.", "Hello"], None)]
ANSWERED = [(["Be kind.", "Hello"], "Hi!")]
TALK = [(["a"], "b"), (["a", "b", "c"], "d")]
PARTS = [{"type": "text", "text": "What is"}, {"type": "text", "text": "this?"}]
IMAGE = {"type": "image_url", "image_url": {"url": "data:..."}}
TURNS = [*user("a"), said("b"), *user("c"), said("d")]
# A piece of a longer conversation may begin with the end of an answer.
PIECE = [("gpt", "..."), ("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d")]
SHAREGPT = {"id": "x", "conversations": [{"from": who, "value": text} for who, text in PIECE]}


@pytest.mark.parametrize(
    ("record", "turns", "queries"),
    [
        # A chat request is one query in every log.
        (CHAT, "all", ONE),
        (LOGGED, "all", ANSWERED),
        ({**LOGGED, "complete": True}, "all", ANSWERED),
        ({**LOGGED, "complete": False}, "all", ONE),
        ({"request": CHAT, "response": None, "status": 503}, "all", ONE),
        ({"custom_id": "1", "url": "/v1/chat/completions", "body": CHAT}, "all", ONE),
        ({"body": CHAT, "response": {"status_code": 200, "body": ANSWER}}, "all", ANSWERED),
        # It asks its last turn only.
        *(
            ({"model": "m", "messages": TURNS[:3]}, turns, [(["a", "b", "c"], None)])
            for turns in ("all", "last", "first")
        ),
        ({"model": "m", "messages": TURNS[:2]}, "all", [(["a"], "b")]),
        # A completion keeps its prompt as text, a question is a user's turn.
        (
            {"request": {"model": "m", "prompt": "A"}, "response": {"choices": [{"text": " b"}]}},
            "all",
            [("A", " b")],
        ),
        ({"model": "m", "prompt": ["One", "Two"]}, "all", [("One", None), ("Two", None)]),
        ({"prompt": "Hello"}, "all", [(["Hello"], None)]),
        (" Hello\n", "all", [(["Hello"], None)]),
        ({"question": "1+1?", "answer": "2"}, "all", [(["1+1?"], "2")]),
        ({"instruction": "Add", "input": "1, 1", "output": "2"}, "all", [(["Add\n\n1, 1"], "2")]),
        ({"instruction": "Add", "input": ""}, "all", [(["Add"], None)]),
        ({"messages": [*user(PARTS)]}, "all", [(["What is\nthis?"], None)]),
        # A conversation is a query at each turn.
        *(
            (record, turns, TALK[place])
            for record in (SHAREGPT, {"messages": TURNS}, TURNS)
            for turns, place in (("all", slice(2)), ("last", slice(1, 2)), ("first", slice(1)))
        ),
    ],
)
def test_record_asks_its_queries(record, turns, queries):
    assert asked(record, turns) == queries
    for query in find_queries(record, turns):
        roles = [turn["role"] for turn in query.messages]
        # A developer is the system.
        assert roles == ["system", "user"] if queries in (ONE, ANSWERED) else "system" not in roles


def test_tool_call_ends_what_a_conversation_asks():
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    record = {"messages": [*TURNS[:3], call, *user("d"), said("e")]}
    found = find_queries(record)
    assert [len(next(found).messages), len(next(found).messages)] == [1, 3]
    with pytest.raises(NoQueryError, match="tools"):
        next(found)


@pytest.mark.parametrize(
    ("record", "error", "message"),
    [
        ({"messages": TURNS[1:2]}, NoQueryError, "no_user_turn"),
        ({"messages": [*user([*PARTS, IMAGE])]}, NoQueryError, "not_text"),
        ({"model": "m", "prompt": [1, 2, 3]}, NoQueryError, "not_text"),
        ({"request": {"model": "e", "input": "x"}, "response": {}}, NoQueryError, "other_request"),
        ({"request": CHAT, "response": {"error": {}}, "status": 400}, NoQueryError, "refused"),
        (7, ValueError, "not int"),
        ({"a": 1, "b": 2}, ValueError, r"its keys are \['a', 'b'\]"),
        ({"messages": "hello"}, ValueError, "its messages is str"),
        ({"messages": [{"role": "king", "content": "x"}]}, ValueError, "the role 'king'"),
        ({"messages": [{"role": "user"}]}, ValueError, "its content is NoneType"),
        ({"question": 3, "answer": "x"}, ValueError, "question is int"),
        ({"response": {"body": ANSWER}}, ValueError, "a response without its request"),
    ],
)
def test_record_without_a_query_says_why(record, error, message):
    with pytest.raises(error, match=message):
        asked(record)


KEYS = ["request", "response", "body", "model", "messages", "conversations", "prompt", "status"]
KEYS += ["instruction", "input", "text", "role", "from", "content", "value", "choices", "message"]
LEAVES = st.none() | st.booleans() | st.integers(0, 500) | st.text(max_size=3)
LEAVES |= st.sampled_from(["user", "assistant", "tool", "gpt", "human"])


def nested(inner):
    return st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)


@given(st.recursive(LEAVES, nested, max_leaves=12))
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_any_json_is_asked_or_refused(record):
    try:
        found = list(find_queries(record))
    except ValueError:
        return
    assert found
    for each in found:
        assert not (each.messages and each.text)
        assert all(type(turn["content"]) is str for turn in each.messages)
        assert not each.messages or each.messages[-1]["role"] == "user"
        assert each.answer is None or type(each.answer) is str


@pytest.mark.parametrize(
    ("name", "content", "form"),
    [
        ("a.jsonl", '{"text": "x"}\n', "jsonl"),
        ("a.json", '[{"text": "x"}]', "json"),
        ("a.json", '{"text": "x"}\n{"text": "y"}\n', "jsonl"),
        ("a.jsonl", '\n [{"text": "x"}]', "json"),
        ("a.log", '{"text": "x"}\n', "jsonl"),
        ("a.log", "hello\n", "text"),
        ("a.txt", '{"text": "x"}\n', "text"),
        ("a.csv", "text\nx\n", "csv"),
        ("a.tsv", "text\tb\n", "tsv"),
    ],
)
def test_format_is_told_from_suffix_and_content(tmp_path, name, content, form):
    (tmp_path / name).write_text(content)
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
    assert form_of(tmp_path / name) == form_of(tmp_path / f"{name}.gz") == form
    assert form_of(tmp_path / name, "text") == "text"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b'{\n"data": []\n}', "one object over many lines"), ("hello".encode("utf-16"), "iconv")],
)
def test_files_that_would_be_misread_are_refused(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        form_of(tmp_path / "a.json")


ROWS = [{"text": "a"}, {"text": 'b, "b"\nb'}, {"text": "ü\u2028]"}]


def written(path, form):
    if form == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif form == "csv":
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            csv.writer(file).writerows([["text"], *([row["text"]] for row in ROWS)])
    elif form == "json":
        path.write_text(json.dumps(ROWS, indent=1))
    else:
        path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS))


@pytest.mark.parametrize(
    ("form", "chunk"),
    [("jsonl", 7), ("csv", 7), ("parquet", 7), ("json", 1), ("json", 7), ("json", 1 << 20)],
)
def test_every_format_gives_the_same_records(tmp_path, form, chunk, monkeypatch):
    monkeypatch.setattr("specdec.common.records._CHUNK_CHARS", chunk)
    path = tmp_path / f"rows.{form}"
    written(path, form)
    records = RecordFile(path)
    assert [record.value for record in records] == ROWS
    assert records.done == records.size


@pytest.mark.parametrize(
    ("name", "content", "sound", "places"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n\xff\xfe\n{"text": "b"}\n{"te', "14", "12345"),
        ("a.csv", b'text,b\nx,1\nonly one\n"a"b,1\n\xff,1\ny,2\n', "26", "23456"),
    ],
)
def test_malformed_lines_are_told_with_their_place(tmp_path, name, content, sound, places):
    (tmp_path / name).write_bytes(content)
    found = list(RecordFile(tmp_path / name))
    assert [each.where.rpartition(":")[2] for each in found] == list(places)
    assert "".join(each.where[-1] for each in found if not each.fault) == sound


def test_broken_off_files_give_what_they_have(tmp_path):
    path = tmp_path / "a.json"
    for rest in ('{"text": "b"', '{"text": "b"}, ', "", "oops]"):
        path.write_text('[{"text": "a"}, ' + rest)
        first, *_, last = RecordFile(path)
        assert first.value == {"text": "a"}
        assert "breaks off" in last.fault
    zipped = tmp_path / "a.jsonl.gz"
    content = gzip.compress(b"".join(b'{"text": "%d"}\n' % n for n in range(50_000)))
    zipped.write_bytes(content[: len(content) // 2])
    *some, last = RecordFile(zipped)
    assert 0 < len(some) < 50_000
    assert "damaged" in last.fault
