"""`specdec regenerate` as a command: what fails is listed, and bad input is told."""

import json

import pytest
from fake_endpoint import FakeEndpoint
from tiny_chat import END, chatty_model, letter_tokenizer, lines_of, user
from tiny_training import write_rows
from typer.testing import CliRunner

from specdec.cli import app
from specdec.common.messages import Query
from specdec.data.queries import write_queries


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A target and a folder of collected queries."""
    path = tmp_path_factory.mktemp("regenerate")
    chatty_model().save_pretrained(path / "target")
    letter_tokenizer().save_pretrained(path / "target")
    queries = [Query(f"q{i}", user(f"say {i}")) for i in range(20)]
    write_queries({"train": queries[:14], "held_out": queries[14:]}, path / "queries")
    return path


def invoke(*arguments):
    return CliRunner().invoke(app, ["regenerate", *map(str, arguments)])


def test_failed_queries_do_not_fail_the_run(folder, tmp_path):
    rows = [
        {"id": "long", "messages": user("x" * 300), "split": "held_out"},
        {"messages": user("hello"), "domain": "greetings"},
        {"text": "ab", "language": "en"},
    ]
    queries = write_rows(tmp_path / "queries.jsonl", rows)
    done = invoke(queries, "--target", folder / "target", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert f"1 of 3 queries failed: {tmp_path / 'out' / 'failed.jsonl'}" in done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["counts"]["train"] == {"queries": 2, "rows": 2, "failed": 0}
    found = [(r["domain"], r["language"]) for r in lines_of(tmp_path / "out/train.jsonl")]
    assert found == [("greetings", ""), ("", "en")]


def test_endpoint_answers_and_a_dead_one_fails(folder, tmp_path, monkeypatch):
    from specdec.data import endpoint

    monkeypatch.setattr(endpoint, "_FIRST_WAIT_S", 0.002)
    monkeypatch.setenv("MY_KEY", "sk-secret")
    server = FakeEndpoint()
    arguments = [folder / "queries", "--endpoint", server.url, "--model", "m", "--tokenizer"]
    arguments += [folder / "target", "--out", tmp_path, "--api-key-variable", "MY_KEY"]
    server.is_down = True
    done = invoke(*arguments)
    assert done.exit_code == 1
    assert "answers no more" in done.stderr
    server.is_down = False
    done = invoke(*arguments)
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["answers"] == 20
    assert server.headers[0]["Authorization"] == "Bearer sk-secret"
    assert lines_of(tmp_path / "train.jsonl")[0]["tokens"][-1] == END
    server.close()


LOCAL, SERVER = ["--target", "demo"], ["--endpoint", "http://h/v1"]


@pytest.mark.parametrize(
    ("line", "arguments", "message"),
    [
        ("", [], "--target is missing"),
        ("", [*LOCAL, "--model", "m"], "belong to --endpoint"),
        ("", SERVER, "needs --model"),
        ("", [*SERVER, "--model", "m"], "needs --tokenizer"),
        (None, LOCAL, "does not exist"),
        ("", [*LOCAL, "--turns", "first"], "turns is 'first'"),
        ("", LOCAL, "holds no queries"),
        ("{", LOCAL, ":1: not JSON"),
        ('{"id": "a"}', LOCAL, 'needs either "messages" or "text"'),
        ('{"text": 5}', LOCAL, "text is 5"),
        ('{"messages": [{"role": "user"}]}', LOCAL, "messages.0.content is missing"),
        ('{"text": "a", "split": "test"}', LOCAL, "split is 'test'"),
        ('{"text": "a"}\n{"text": "a", "split": "held_out"}', LOCAL, "twice"),
    ],
)
def test_bad_input_ends_with_status_two(tmp_path, line, arguments, message):
    queries = tmp_path / "queries.jsonl"
    if line is not None:
        queries.write_text(line + "\n")
    done = invoke(queries, "--out", tmp_path / "out", *arguments)
    assert (done.exit_code, message in done.stderr) == (2, True)
    assert not (tmp_path / "out").exists()


def test_folder_without_queries_is_told(tmp_path):
    done = invoke(tmp_path, *LOCAL, "--out", tmp_path / "out")
    assert (done.exit_code, "no split 'train' of collected queries" in done.stderr) == (2, True)
