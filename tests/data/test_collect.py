"""`specdec collect`, from sources to the folder."""

import csv
import errno
import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from json_schema import violations
from typer.testing import CliRunner

from specdec.cli import app
from specdec.data.collect import CollectSettings, collect
from specdec.data.conversation import SPLITS, read_queries

ROOT = Path(__file__).parent.parent.parent
SCHEMA = json.loads((ROOT / "docs" / "collect.schema.json").read_text())
DISHES = ("pasta", "sushi", "borscht", "mole", "couscous", "pho", "paella", "ramen", "goulash")
ASKS = ("How long do I cook {}?", "Which wine goes with {}?", "Where was {} invented, and by whom?")
QUESTIONS = [
    ask.format(f"{dish} for {n}") for ask in ASKS for dish in DISHES for n in ("two", "a crowd")
]


def run(*arguments):
    return CliRunner().invoke(app, ["collect", *map(str, arguments)])


def summary(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def requests(path, questions=QUESTIONS, **more):
    rows = ({"model": "m", "messages": [{"role": "user", "content": q}], **more} for q in questions)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def kept(folder):
    return {split: [q.last_turn for q in read_queries(folder, split)] for split in SPLITS}


def everything(folder):
    return sorted(text for texts in kept(folder).values() for text in texts)


@pytest.fixture
def log(tmp_path):
    return requests(tmp_path / "log.jsonl")


def test_a_log_becomes_a_folder_with_card_and_report(log, tmp_path):
    out = tmp_path / "q"
    last = summary(run(log, "--out", out, "--domain", "food", "--tag-language"))
    assert everything(out) == sorted(QUESTIONS)
    report = json.loads((out / "collect.json").read_text())
    assert violations(report, SCHEMA) == []
    assert last["kept"] == report["kept"] == {s: len(texts) for s, texts in kept(out).items()}
    assert report["kept"]["held_out"] > 0
    assert report["domains"] == {"food": report["kept"]}
    assert report["languages"]["en"] > len(QUESTIONS) / 2
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlanguage:\n- en\n")
    assert f"| food | {report['kept']['train']} | {report['kept']['held_out']} |" in card
    query = read_queries(out, "train")[0]
    assert (query.domain, query.source.rpartition(":")[0]) == ("food", str(log))


def test_recorded_answers_are_kept_for_reference(tmp_path):
    log = tmp_path / "log.jsonl"
    request = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
    response = {"choices": [{"message": {"content": "Write to a@b.example"}}]}
    log.write_text(json.dumps({"request": request, "response": response}))
    summary(run(log, "--out", tmp_path / "q", "--held-out", 0))
    assert read_queries(tmp_path / "q", "train")[0].answer == "Write to <EMAIL>"


@pytest.mark.parametrize("kind", ["txt", "csv", "tsv", "parquet", "saved", "folder", "sharegpt"])
def test_every_source_gives_the_same_queries(tmp_path, kind):
    source, options = tmp_path / f"source.{kind}", []
    if kind == "txt":
        source.write_text("\n".join(QUESTIONS))
    elif kind in ("csv", "tsv"):
        with source.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="," if kind == "csv" else "\t")
            writer.writerows([("no", "asked"), *enumerate(QUESTIONS)])
        options = ["--column", "asked"]
    elif kind == "parquet":
        Dataset.from_dict({"asked": QUESTIONS}).to_parquet(source)
    elif kind == "saved":
        splits = {
            "train": Dataset.from_dict({"x": ["no"]}),
            "dev": Dataset.from_dict({"x": QUESTIONS}),
        }
        DatasetDict(splits).save_to_disk(source)
        options = ["--split", "dev", "--column", "x"]
    elif kind == "folder":
        source.mkdir()
        requests(source / "requests-00001.jsonl", QUESTIONS[:20])
        requests(source / "requests-00002.jsonl", QUESTIONS[20:])
        (source / "notes.txt").write_text("not a query")
    else:
        source = tmp_path / "source.json"
        turns = [[{"from": "human", "value": q}, {"from": "gpt", "value": "ok"}] for q in QUESTIONS]
        source.write_text(json.dumps([{"conversations": turn} for turn in turns]))
    summary(run(source, "--out", tmp_path / "q", *options))
    assert everything(tmp_path / "q") == sorted(QUESTIONS)


def test_a_query_stays_in_its_split_whatever_else_is_collected(tmp_path):
    half = requests(tmp_path / "half.jsonl", QUESTIONS[::2])
    shouted = requests(tmp_path / "all.jsonl", [q.upper() for q in reversed(QUESTIONS)])
    summary(run(half, "--out", tmp_path / "half", "--domain", "a"))
    summary(run(shouted, "--out", tmp_path / "all", "--domain", "b", "--seed", 7))
    before, after = kept(tmp_path / "half"), kept(tmp_path / "all")
    for split in SPLITS:
        assert {q.upper() for q in before[split]} <= set(after[split])


def test_turns_of_a_conversation_share_a_split(tmp_path):
    source = tmp_path / "chats.jsonl"
    chats = []
    for question in QUESTIONS:
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "Let me see."}]
        chats.append([*turns, {"from": "human", "value": f"{question[:9]} again"}])
    source.write_text("\n".join(json.dumps({"conversations": turns}) for turns in chats))
    last = summary(run(source, "--out", tmp_path / "q", "--near-duplicates", 0))
    assert sum(last["kept"].values()) == 2 * len(QUESTIONS)
    names = [{q.conversation for q in read_queries(tmp_path / "q", split)} for split in SPLITS]
    assert not names[0] & names[1]


def test_a_smaller_draw_is_part_of_a_larger_one(log, tmp_path):
    drawn = {}
    for num in (5, 20):
        assert (
            sum(summary(run(log, "--out", tmp_path / str(num), "--num", num))["kept"].values())
            == num
        )
        drawn[num] = set(everything(tmp_path / str(num)))
    assert drawn[5] < drawn[20]
    result = run(log, "--out", tmp_path / "more", "--num", 1000)
    assert f"{len(QUESTIONS)} queries were there, fewer than num=1000" in result.stderr


def test_what_is_dropped_is_counted_by_reason(tmp_path):
    log = tmp_path / "log.jsonl"
    long = "word " * 50
    texts = ["Where is my order?", "Where is my order?", "where is  my order??", " ", long]
    messages = [[{"role": "user", "content": text}] for text in texts]
    messages.append([{"role": "system", "content": "x"}])
    log.write_text("\n".join(json.dumps({"messages": each}) for each in messages) + "\n{oops")
    out = tmp_path / "q"
    last = summary(run(log, "--out", out, "--max-chars", 100))
    assert last["dropped"] == {
        "malformed": 1,
        "no_user_turn": 1,
        "too_short": 1,
        "too_long": 1,
        "duplicate": 1,
        "near_duplicate": 1,
    }
    report = json.loads((out / "collect.json").read_text())
    assert violations(report, SCHEMA) == []
    bad = report["dropped"]["malformed"]["examples"]
    assert (bad[0]["where"], bad[0]["quote"]) == (f"{log}:7", "{oops")
    kept_both = summary(run(log, "--out", tmp_path / "r", "--near-duplicates", 0))
    assert sum(kept_both["kept"].values()) == 3


def test_masking_can_be_turned_off_but_quotes_stay_masked(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("Mail me at jane@doe.example\nMail me at jane@doe.example\n")
    masked = summary(run(log, "--out", tmp_path / "q"))
    assert everything(tmp_path / "q") == ["Mail me at <EMAIL>"]
    bare = summary(run(log, "--out", tmp_path / "r", "--no-mask"))
    assert everything(tmp_path / "r") == ["Mail me at jane@doe.example"]
    assert masked["dropped"] == bare["dropped"] == {"duplicate": 1}
    for name in ("collect.json", "README.md"):
        assert "jane" not in (tmp_path / "r" / name).read_text()


def test_halves_of_characters_are_replaced(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"text": "cut emoji \\ud83d", "answer": "\\ud83d"}\n{"messages": "\\ud83d"}')
    summary(run(log, "--out", tmp_path / "q", "--held-out", 0, "--no-mask"))
    query = read_queries(tmp_path / "q", "train")[0]
    assert (query.last_turn, query.answer) == ("cut emoji ?", "?")


def test_too_many_malformed_lines_stop_the_run_and_say_where(tmp_path):
    log = requests(tmp_path / "log.jsonl")
    with log.open("a") as file:
        file.write('{"key": "sk-abcdefghijklmnop1234567890", cut\n' * 3)
    result = run(log, "--out", tmp_path / "q", "--max-bad", 2)
    assert result.exit_code == 2
    assert f"{log}:{len(QUESTIONS) + 3}: not JSON" in result.stderr
    assert "<API_KEY>" in result.stderr
    assert "sk-abc" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]
    assert summary(run(log, "--out", tmp_path / "q", "--max-bad", 3))["dropped"]["malformed"] == 3


def test_a_file_of_something_else_says_what_was_wrong_with_it(tmp_path):
    source = tmp_path / "a.csv"
    source.write_text("a,b\n1,2\n")
    result = run(source, "--out", tmp_path / "q")
    assert result.exit_code == 2
    assert "no query is left (1 malformed)" in result.stderr
    assert "or be named as column" in result.stderr
    assert not (tmp_path / "q").exists()


FULL_DISK = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "message"),
    [(FULL_DISK, 1, "no space left in"), (KeyboardInterrupt(), 130, "same")],
)
def test_a_run_that_ends_while_writing_leaves_the_folder_as_it_was(
    log, tmp_path, monkeypatch, there, error, status, message
):
    out = tmp_path / "q"
    if there:
        summary(run(requests(tmp_path / "first.jsonl", QUESTIONS[:5]), "--out", out))

    def write(queries, folder):
        (folder / "half").write_text("written")
        raise error

    monkeypatch.setattr("specdec.data.collect.write_queries", write)
    result = run(log, "--out", out, "--append")
    assert (result.exit_code, message in result.stderr) == (status, True)
    assert out.exists() == there
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    if there:
        assert everything(out) == sorted(QUESTIONS[:5])


def test_the_same_command_finds_its_work_done(log, tmp_path):
    out = tmp_path / "q"
    summary(run(log, "--out", out))
    before = (out / "collect.json").read_bytes()
    summary(run(log, "--out", out))
    assert (out / "collect.json").read_bytes() == before


def test_another_collection_is_not_overwritten(log, tmp_path):
    out = tmp_path / "q"
    summary(run(log, "--out", out))
    before = everything(out)
    for options in (["--num", 5], ["--append", "--held-out", 0.5]):
        result = run(log, "--out", out, *options)
        assert result.exit_code == 2
    assert "so that no query moves" in result.stderr
    requests(log, QUESTIONS[:3])
    assert run(log, "--out", out).exit_code == 2
    assert everything(out) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert "holds no collected queries" in run(log, "--out", tmp_path / "mine").stderr
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_appending_keeps_what_is_there_and_drops_what_repeats_it(tmp_path):
    out = tmp_path / "q"
    summary(run(requests(tmp_path / "a.jsonl", QUESTIONS[:30]), "--out", out))
    before = kept(out)
    more = requests(tmp_path / "b.jsonl", [*QUESTIONS[20:], QUESTIONS[0] + "?"])
    last = summary(run(more, "--out", out, "--append"))
    assert last["dropped"] == {"duplicate": 10, "near_duplicate": 1}
    assert everything(out) == sorted(QUESTIONS)
    for split in SPLITS:
        assert kept(out)[split][: len(before[split])] == before[split]
    report = json.loads((out / "collect.json").read_text())
    assert report["earlier"]["kept"] == {split: len(texts) for split, texts in before.items()}
    assert violations(report, SCHEMA) == []


def test_a_run_killed_while_it_exchanged_folders_loses_nothing(log, tmp_path):
    out = tmp_path / "q"
    summary(run(log, "--out", out))
    out.rename(tmp_path / ".q.before")
    more = requests(tmp_path / "more.jsonl", ["Is there any more bread?"])
    summary(run(more, "--out", out, "--append"))
    assert everything(out) == sorted([*QUESTIONS, "Is there any more bread?"])


def test_domains_are_told_apart_and_one_without_held_out_queries_is_named(tmp_path):
    log = tmp_path / "log.jsonl"
    rows = [{"text": q, "topic": "food"} for q in QUESTIONS] + [{"text": "Hello?", "topic": "rare"}]
    log.write_text("\n".join(map(json.dumps, rows)))
    result = run(log, "--out", tmp_path / "q", "--domain-field", "topic")
    assert summary(result)["domains"]["rare"] == {"train": 1, "held_out": 0}
    assert "no query of domain 'rare' is held out" in result.stderr


def test_fixed_examples_that_would_keep_all_in_one_split_are_told(tmp_path):
    log = tmp_path / "log.jsonl"
    shots = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    rows = [{"messages": [*shots, {"role": "user", "content": q}]} for q in QUESTIONS]
    log.write_text("\n".join(map(json.dumps, rows)))
    result = run(log, "--out", tmp_path / "q")
    assert max(summary(result)["kept"].values()) == len(QUESTIONS)
    assert "begin with the same user turn" in result.stderr


def test_named_sources_leave_out_what_the_bench_measures(tmp_path):
    folder = tmp_path / "data" / "taskmaster4"
    folder.mkdir(parents=True)
    rows = [
        {"id": str(n), "turns": [["user", q], ["assistant", "ok"]]} for n, q in enumerate(QUESTIONS)
    ]
    (folder / "dialogs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "q"
    report = collect(["taskmaster4"], out, CollectSettings(), data_dir=tmp_path / "data")
    assert everything(out) == sorted(q for n, q in enumerate(QUESTIONS) if n % 10)
    assert list(report["domains"]) == ["taskmaster4"]
    assert read_queries(out, "train")[0].answer == "ok"
    with pytest.raises(FileNotFoundError, match="set SPECDEC_DATA_DIR"):
        collect(["sgd"], tmp_path / "r", CollectSettings(), data_dir=tmp_path / "data")


def test_a_source_that_is_not_there_is_told_from_one_of_the_hub(tmp_path, monkeypatch):
    result = run(tmp_path / "nothing.jsonl", "--out", tmp_path / "q")
    assert (result.exit_code, "nothing.jsonl' is not a folder or file here" in result.stderr) == (
        2,
        True,
    )

    def load_dataset(path, name=None, split=None):
        if path != "someone/questions":
            raise ConnectionError("Couldn't reach it")
        return Dataset.from_dict({"question": QUESTIONS})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    result = run("someone/nothing", "--out", tmp_path / "q")
    assert (result.exit_code, "Couldn't reach it" in result.stderr) == (2, True)
    summary(run("someone/questions", "--out", tmp_path / "q"))
    assert everything(tmp_path / "q") == sorted(QUESTIONS)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("turns", "some"),
        ("format", "yaml"),
        ("held-out", "1"),
        ("near-duplicates", "80"),
        ("num", "0"),
        ("min-chars", "0"),
        ("max-chars", "0"),
        ("max-bad", "-1"),
        ("phone-region", "Germany"),
    ],
)
def test_a_setting_out_of_its_range_is_told(log, tmp_path, option, value):
    result = run(log, "--out", tmp_path / "q", f"--{option}", value)
    assert result.exit_code == 2
    assert f"{option.replace('-', '_')} is " in result.stderr


def test_a_missing_extra_is_told_in_one_line(log, tmp_path, monkeypatch):
    monkeypatch.setattr("specdec.cli.collect.find_spec", lambda name: None)
    result = run(log, "--out", tmp_path / "q")
    assert result.exit_code == 2
    assert "pip install 'specdec[collect]'" in result.stderr
