"""Prompts: named sources in a folder or on the hub, and files of every kind."""

import gzip
import json
import sys
from types import SimpleNamespace

import pytest

from specdec.bench.prompts import SOURCES, load_prompts
from specdec.common.messages import Query
from specdec.data.queries import write_queries


def user(text):
    return {"role": "user", "content": text}


def write_lines(path, rows):
    path.parent.mkdir(exist_ok=True)
    open_text = gzip.open if path.suffix == ".gz" else open
    with open_text(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def dialogues(count):
    turns = [["user", "hello"], ["assistant", "yes?"], ["user", "bye"], ["assistant", "bye"]]
    return [{"id": f"d{i}", "turns": turns} for i in range(count)]


@pytest.fixture
def data(tmp_path):
    """A data folder with a little of every source."""
    questions = [{"question_id": 81, "category": "writing", "turns": ["Write.", "Rewrite."]}]
    code = [{"task_id": "HumanEval/0", "prompt": "def f():\n"}]
    write_lines(tmp_path / "gsm8k/test.jsonl", [{"question": f"{i}?"} for i in range(5)])
    write_lines(tmp_path / "sgd/dev.jsonl", dialogues(4))
    write_lines(tmp_path / "taskmaster4/dialogs.jsonl", dialogues(21))
    write_lines(tmp_path / "spec_bench/question.jsonl", questions)
    write_lines(tmp_path / "mt_bench/question.jsonl", questions)
    write_lines(tmp_path / "human_eval/HumanEval.jsonl.gz", code)
    return tmp_path


@pytest.fixture
def no_folder(monkeypatch):
    monkeypatch.delenv("SPECDEC_DATA_DIR", raising=False)


def test_source_is_read_from_the_data_folder(data, monkeypatch):
    monkeypatch.setenv("SPECDEC_DATA_DIR", str(data))
    counts = {name: len(load_prompts(name, 99)) for name in SOURCES}
    filed = {"gsm8k": 5, "sgd": 4, "taskmaster4": 3, "spec_bench": 1, "mt_bench": 1}
    assert counts == {"demo": 80, "held_out": 9, **filed, "human_eval": 1}


def test_records_become_prompts(data):
    folder = str(data)
    questions = load_prompts("gsm8k", 9, folder)
    assert sorted(p.messages[0]["content"] for p in questions) == ["0?", "1?", "2?", "3?", "4?"]
    assert questions == load_prompts("gsm8k", 9, folder)
    for prompt in load_prompts("sgd", 9, folder):
        assert prompt.domain == "sgd"
        assert prompt.messages[-1]["role"] == "user"
    # Only every tenth dialogue: the others are for training.
    assert {p.id for p in load_prompts("taskmaster4", 9, folder)} == {"d0", "d10", "d20"}
    (question,) = load_prompts("mt_bench", 9, folder)
    assert (question.messages, question.follow_ups) == ((user("Write."),), ("Rewrite.",))
    assert load_prompts("human_eval", 9, folder)[0].text == "def f():\n"
    domains = [p.domain for p in load_prompts("held_out", 4, folder)]
    assert domains == ["gsm8k", "sgd", "taskmaster4", "gsm8k"]


HUB = {
    "gsm8k": ("openai/gsm8k", {"question": "1?", "answer": "1"}, "gsm8k-0"),
    "human_eval": ("openai/openai_humaneval", {"task_id": "H/3", "prompt": "def"}, "H/3"),
    "mt_bench": (
        "HuggingFaceH4/mt_bench_prompts",
        {"prompt_id": 7, "category": "math", "prompt": ["a", "b"], "reference": []},
        "mt_bench-7",
    ),
}


@pytest.mark.parametrize("source", HUB)
def test_hub_is_asked_without_a_folder(no_folder, monkeypatch, tmp_path, source):
    path, row, name = HUB[source]
    asked = []

    def load_dataset(**options):
        asked.append(options["path"])
        return [row]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    for folder in (None, str(tmp_path)):
        assert [prompt.id for prompt in load_prompts(source, 3, folder)] == [name]
    assert asked == [path, path]


def test_silent_hub_is_named_with_the_fix(no_folder, monkeypatch):
    def load_dataset(**options):
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(FileNotFoundError, match=r"openai/gsm8k could not be read.*ConnectionErr"):
        load_prompts("gsm8k", 1)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FileNotFoundError, match=r"needs datasets.*specdec-lab\[collect\]"):
        load_prompts("gsm8k", 1)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("sgd", "loading script"),
        ("taskmaster4", "nor on the hub"),
        ("spec_bench", "nor on the hub"),
        ("held_out", "could not be read"),
    ],
)
def test_missing_source_says_where_it_comes_from(no_folder, monkeypatch, source, reason):
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=None))
    with pytest.raises(FileNotFoundError, match=f"{reason}.*SPECDEC_DATA_DIR, or prompts.data_dir"):
        load_prompts(source, 1)


def test_unknown_source_lists_the_known_ones(tmp_path):
    for source in ("gsm9k", str(tmp_path / "no.jsonl")):
        with pytest.raises(ValueError, match="or one of demo, held_out, gsm8k"):
            load_prompts(source, 1)


def test_records_of_another_source_are_refused(data):
    write_lines(data / "gsm8k/test.jsonl", [{"instruction": "x"}])
    with pytest.raises(ValueError, match=r"gsm8k/test.jsonl:1 is no record of gsm8k.*question"):
        load_prompts("gsm8k", 1, str(data))


def test_jsonl_records_hold_text_or_messages(tmp_path):
    turns = [user("three"), {"role": "assistant", "content": "four"}]
    named = {"id": "b", "domain": "d", "text": "two\u2028x"}
    rows = [{"prompt": "one"}, named, {"messages": turns}]
    for name in ("a.jsonl", "a.jsonl.gz"):
        write_lines(tmp_path / name, rows)
        prompts = load_prompts(str(tmp_path / name), 9)
        texts = ("one", "two\u2028x", "three")
        assert [p.messages for p in prompts] == [(user(text),) for text in texts]
        assert (prompts[1].id, prompts[1].domain) == ("b", "d")


def test_sharegpt_ends_at_its_first_user_turn(tmp_path):
    turns = [("system", "s"), ("human", "one"), ("gpt", "x"), ("human", "two")]
    rows = [
        {"id": "a", "conversations": [{"from": f, "value": v} for f, v in turns]},
        {"id": "b", "conversations": []},
    ]
    (tmp_path / "share.json").write_text(json.dumps(rows))
    (prompt,) = load_prompts(str(tmp_path / "share.json"), 9)
    assert prompt.messages == ({"role": "system", "content": "s"}, user("one"))


def test_text_file_holds_a_prompt_a_line(tmp_path):
    (tmp_path / "c.txt").write_text("four\n\nfive\n")
    assert [p.text for p in load_prompts(str(tmp_path / "c.txt"), 9)] == ["four", "five"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\n \n", "holds no prompts"),
        ("a.jsonl", b"", "holds no prompts"),
        ("a.json", b"[]", "holds no prompts"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": ""}\n', "prompt '1' is empty"),
        ("a.jsonl", b'{"messages": []}\n', ":1 is no prompt: .*no_user_turn"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}\n', ":1 is no prompt: its content"),
        ("a.jsonl", b'{"prompt": 3}\n', ":1 is no prompt: its question is int but must be text"),
        ("a.jsonl", b'{"promt": "x", "x": 1}\n', "its keys are .'promt', .* must be messages"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prom', ":2: not JSON"),
        ("a.jsonl", b"[1]\n", "#1 is no prompt: a record must be an object"),
        ("a.json", b'{\n"prompt": "x"}', "one object over many lines.*give a list"),
        ("a.json", b"[3]", "#1 is no prompt"),
        ("a.json", b"{", "is not JSON"),
        ("a.txt", b"\xfa\xff", ":1: not UTF-8"),
        ("a.jsonl.gz", b"not gzip", "damaged"),
    ],
)
def test_unsound_file_is_refused_by_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        load_prompts(str(tmp_path / name), 9)
    assert str(tmp_path / name) in str(raised.value)


def test_demo_prompts_are_balanced_over_domains():
    prompts = load_prompts("demo", 12)
    assert [p.domain for p in prompts[:3]] == ["maths", "service", "coffee"]
    assert load_prompts("demo", 5, seed=1) != load_prompts("demo", 5)


def test_collected_folder_gives_its_held_out_queries(tmp_path):
    chat = Query("a", (user("hello"), {"role": "assistant", "content": "yes?"}, user("bye")))
    completion = Query("b", text="Once upon", domain="tales")
    split = {"train": [Query("c", (user("seen"),))], "held_out": [chat, completion]}
    write_queries(split, tmp_path / "queries")
    first, second = load_prompts(str(tmp_path / "queries"), 9)
    assert (first.id, first.domain, first.messages) == ("a", "collected", chat.messages)
    assert (second.domain, second.messages, second.text) == ("tales", (), "Once upon")


def test_another_folder_is_no_source(tmp_path):
    write_queries({"train": [Query("c", (user("seen"),))]}, tmp_path / "queries")
    for folder in (tmp_path, tmp_path / "queries"):
        with pytest.raises(ValueError, match="no split 'held_out' of collected queries"):
            load_prompts(str(folder), 9)
