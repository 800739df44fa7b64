"""`specdec collect`, from sources to the folder."""

import errno
import json
import os
import stat

import pytest
from datasets import Dataset, DatasetDict
from tiny_chat import said, user
from tiny_training import write_rows
from typer.testing import CliRunner

from specdec.cli import app
from specdec.common.config import read_model
from specdec.common.messages import read_queries
from specdec.data.collect import CollectReport, collect
from specdec.data.config import CollectSettings
from specdec.data.queries import SPLITS

DISHES = ("pasta", "sushi", "borscht", "mole", "couscous", "pho", "paella", "ramen", "goulash")
ASKS = ("How long do I cook {}?", "Which wine goes with {}?", "Where was {} invented, and by whom?")
QUESTIONS = [
    ask.format(f"{dish} for {n}") for ask in ASKS for dish in DISHES for n in ("two", "a crowd")
]


def run(*arguments):
    return CliRunner().invoke(app, ["collect", *map(str, arguments)])


def summary(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def report_of(folder):
    return read_model(CollectReport, folder / "collect.json")


def requests(path, questions=QUESTIONS):
    return write_rows(path, [{"model": "m", "messages": user(q)} for q in questions])


def kept(folder):
    return {split: [q.last_turn for q in read_queries(folder, split)] for split in SPLITS}


def everything(folder):
    return sorted(text for texts in kept(folder).values() for text in texts)


@pytest.fixture
def log(tmp_path):
    return requests(tmp_path / "log.jsonl")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "q"


@pytest.fixture
def open_umask():
    before = os.umask(0)
    yield
    os.umask(before)


def test_log_becomes_a_private_folder_with_card(log, out, open_umask):
    last = summary(log, "--out", out, "--domain", "food", "--tag-language")
    assert everything(out) == sorted(QUESTIONS)
    report = report_of(out)
    assert last["kept"] == report.kept.model_dump() == {s: len(t) for s, t in kept(out).items()}
    assert report.kept.held_out > 0
    assert report.domains == {"food": report.kept}
    assert report.languages["en"] > len(QUESTIONS) / 2
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlanguage:\n- en\n")
    assert "size_categories:\n- n<1K\n" in card
    assert f"| food | {report.kept.train} | {report.kept.held_out} |" in card
    query = read_queries(out, "train")[0]
    assert (query.domain, query.source.rpartition(":")[0]) == ("food", str(log))
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [out, *out.rglob("*")]}
    assert modes == {path: 0o700 if path.is_dir() else 0o600 for path in modes}
    before = (out / "collect.json").read_bytes()
    summary(log, "--out", out, "--domain", "food", "--tag-language")
    assert (out / "collect.json").read_bytes() == before, "given again, its work is done"


def test_answers_are_masked_and_halves_of_characters_replaced(tmp_path, out):
    log = tmp_path / os.fsdecode(b"log\xff.jsonl")
    log.write_text(
        '{"text": "cut emoji \\ud83d", "answer": "a@b.example"}\n{"messages": "\\ud83d"}'
    )
    collect([str(log)], out, CollectSettings(held_out=0))
    query = read_queries(out, "train")[0]
    assert (query.last_turn, query.answer) == ("cut emoji ?", "<EMAIL>")


def source_of_kind(folder, kind):
    """A source that asks the questions, and the options that it needs."""
    source = folder / f"source.{kind}"
    if kind == "txt":
        source.write_text("\n".join(QUESTIONS))
    elif kind == "tsv":
        source.write_text("no\tasked\n" + "".join(f"{n}\t{q}\n" for n, q in enumerate(QUESTIONS)))
        return source, ["--column", "asked"]
    elif kind == "parquet":
        Dataset.from_dict({"asked": QUESTIONS}).to_parquet(source)
    elif kind == "saved":
        texts = {"train": ["no"], "dev": QUESTIONS}
        splits = {split: Dataset.from_dict({"x": each}) for split, each in texts.items()}
        DatasetDict(splits).save_to_disk(source)
        return source, ["--split", "dev", "--column", "x"]
    else:
        source.mkdir()
        requests(source / "requests-00001.jsonl", QUESTIONS[:20])
        requests(source / "requests-00002.jsonl", QUESTIONS[20:])
        (source / "notes.txt").write_text("not a query")
    return source, []


@pytest.mark.parametrize("kind", ["txt", "tsv", "parquet", "saved", "folder"])
def test_every_source_gives_the_same_queries(tmp_path, out, kind):
    source, options = source_of_kind(tmp_path, kind)
    summary(source, "--out", out, *options)
    assert everything(out) == sorted(QUESTIONS)


def test_query_keeps_its_split_in_any_collection(tmp_path):
    half = requests(tmp_path / "half.jsonl", QUESTIONS[::2])
    shouted = requests(tmp_path / "all.jsonl", [q.upper() for q in reversed(QUESTIONS)])
    summary(half, "--out", tmp_path / "half", "--domain", "a")
    summary(shouted, "--out", tmp_path / "all", "--domain", "b", "--seed", 7)
    before, after = kept(tmp_path / "half"), kept(tmp_path / "all")
    for split in SPLITS:
        assert {q.upper() for q in before[split]} <= set(after[split])


def test_turns_of_a_conversation_share_a_split(tmp_path, out):
    later = [(*user(q), said("Let me see."), *user(f"{q[:9]} again")) for q in QUESTIONS]
    log = write_rows(tmp_path / "c.jsonl", [{"conversation": each} for each in later])
    last = summary(log, "--out", out, "--near-duplicates", 0)
    assert sum(last["kept"].values()) == 2 * len(QUESTIONS)
    names = [{q.conversation for q in read_queries(out, split)} for split in SPLITS]
    assert not names[0] & names[1]


def test_smaller_draw_is_part_of_a_larger(log, tmp_path):
    for num in (5, 20):
        summary(log, "--out", tmp_path / str(num), "--num", num)
        assert len(everything(tmp_path / str(num))) == num
    assert set(everything(tmp_path / "5")) < set(everything(tmp_path / "20"))
    result = run(log, "--out", tmp_path / "more", "--num", 1000)
    assert f"{len(QUESTIONS)} queries were there, fewer than num=1000" in result.stderr


def test_drops_are_counted_by_reason(tmp_path, out):
    texts = ["Where is my order?", "Where is my order?", "where is  my order??", " ", "word " * 50]
    messages = [*map(user, texts), [{"role": "system", "content": "x"}]]
    log = write_rows(tmp_path / "log.jsonl", [{"messages": each} for each in messages])
    with log.open("a") as file:
        file.write("{oops")
    reasons = "malformed no_user_turn too_short too_long duplicate near_duplicate"
    last = summary(log, "--out", out, "--max-chars", 100)
    assert last["dropped"] == dict.fromkeys(reasons.split(), 1)
    (bad,) = report_of(out).dropped["malformed"].examples
    assert (bad.where, bad.quote) == (f"{log}:7", "{oops")
    assert "| lines that are no record | 1 | {oops |" in (out / "README.md").read_text()
    kept_both = summary(log, "--out", tmp_path / "r", "--near-duplicates", 0)
    assert sum(kept_both["kept"].values()) == 3


def test_quotes_stay_masked_where_queries_are_not(tmp_path, out):
    log = tmp_path / "log.txt"
    log.write_text("Mail me at jane@doe.example\nMail me at jane@doe.example\n")
    masked = summary(log, "--out", out)
    assert everything(out) == ["Mail me at <EMAIL>"]
    bare = summary(log, "--out", tmp_path / "r", "--no-mask")
    assert everything(tmp_path / "r") == ["Mail me at jane@doe.example"]
    assert masked["dropped"] == bare["dropped"] == {"duplicate": 1}
    for name in ("collect.json", "README.md"):
        assert "jane" not in (tmp_path / "r" / name).read_text()


def test_too_many_malformed_lines_stop_the_run(log, tmp_path, out):
    with log.open("a") as file:
        file.write('{"key": "sk-abcdefghijklmnop1234567890", cut\n' * 3)
    result = run(log, "--out", out, "--max-bad", 2)
    assert result.exit_code == 2
    assert f"{log}:{len(QUESTIONS) + 3}: not JSON" in result.stderr
    assert "<API_KEY>" in result.stderr
    assert "sk-abc" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]
    assert summary(log, "--out", out, "--max-bad", 3)["dropped"]["malformed"] == 3


FULL_DISK = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "message"),
    [(FULL_DISK, 1, "no space left in"), (KeyboardInterrupt(), 130, "same")],
)
def test_interrupted_write_leaves_the_folder_as_it_was(
    log, tmp_path, out, monkeypatch, there, error, status, message
):
    if there:
        summary(requests(tmp_path / "first.jsonl", QUESTIONS[:5]), "--out", out)

    def write(queries, folder):
        (folder / "half").write_text("written")
        raise error

    monkeypatch.setattr("specdec.data.collect.write_queries", write)
    result = run(log, "--out", out, "--append")
    assert (result.exit_code, message in result.stderr) == (status, True)
    assert out.exists() == there
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert not there or everything(out) == sorted(QUESTIONS[:5])


def test_other_contents_are_not_overwritten(log, tmp_path, out):
    summary(log, "--out", out)
    before = everything(out)
    for options, message in (
        (["--num", 5], "give another --out, or --append"),
        (["--append", "--held-out", 0.5], "so that no query moves"),
    ):
        result = run(log, "--out", out, *options)
        assert (result.exit_code, message in result.stderr) == (2, True)
    requests(log, QUESTIONS[:3])
    assert run(log, "--out", out).exit_code == 2
    assert everything(out) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert "holds no collected queries" in run(log, "--out", tmp_path / "mine").stderr
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_appending_drops_what_repeats_the_folder(tmp_path, out):
    summary(requests(tmp_path / "a.jsonl", QUESTIONS[:30]), "--out", out)
    before = kept(out)
    out.rename(tmp_path / ".q.before")  # a run was killed while it exchanged the folders
    more = requests(tmp_path / "b.jsonl", [*QUESTIONS[20:], QUESTIONS[0] + "?"])
    last = summary(more, "--out", out, "--append")
    assert last["dropped"] == {"duplicate": 10, "near_duplicate": 1}
    assert everything(out) == sorted(QUESTIONS)
    for split in SPLITS:
        assert kept(out)[split][: len(before[split])] == before[split]
    earlier = report_of(out).earlier.kept.model_dump()
    assert earlier == {split: len(texts) for split, texts in before.items()}
    assert "30 were there before." in (out / "README.md").read_text()


def test_lopsided_splits_are_told(tmp_path, out):
    rows = [{"text": q, "topic": "food"} for q in QUESTIONS] + [{"text": "Hello?", "topic": "rare"}]
    result = run(write_rows(tmp_path / "log.jsonl", rows), "--out", out, "--domain-field", "topic")
    assert report_of(out).domains["rare"].model_dump() == {"train": 1, "held_out": 0}
    assert "no query of domain 'rare' is held out" in result.stderr
    rows = [{"messages": [*user("1+1?"), said("2"), *user(q)]} for q in QUESTIONS]
    result = run(write_rows(tmp_path / "log.jsonl", rows), "--out", tmp_path / "r")
    assert max(report_of(tmp_path / "r").kept.model_dump().values()) == len(QUESTIONS)
    assert "begin with the same user turn" in result.stderr


def test_named_sources_leave_out_bench_prompts(tmp_path, out):
    (tmp_path / "data" / "taskmaster4").mkdir(parents=True)
    rows = [{"id": q, "turns": [["user", q], ["assistant", "ok"]]} for q in QUESTIONS]
    write_rows(tmp_path / "data" / "taskmaster4" / "dialogs.jsonl", rows)
    report = collect(["taskmaster4"], out, CollectSettings(), data_dir=tmp_path / "data")
    assert everything(out) == sorted(q for n, q in enumerate(QUESTIONS) if n % 10)
    assert list(report.domains) == ["taskmaster4"]
    assert read_queries(out, "train")[0].answer == "ok"
    with pytest.raises(FileNotFoundError, match="set SPECDEC_DATA_DIR"):
        collect(["sgd"], tmp_path / "r", CollectSettings(), data_dir=tmp_path / "data")


def test_missing_source_is_told_from_the_hub(out, monkeypatch):
    def load_dataset(path, name=None, split=None):
        if path != "someone/questions":
            raise ConnectionError("Couldn't reach it")
        return Dataset.from_dict({"question": QUESTIONS})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    result = run("someone/nothing", "--out", out)
    assert (result.exit_code, "Couldn't reach it" in result.stderr) == (2, True)
    summary("someone/questions", "--out", out)
    assert everything(out) == sorted(QUESTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--turns some", "turns is 'some'"),
        ("--format yaml", "format is 'yaml'"),
        ("--held-out 1", "held_out is 1.0 but must be below 1"),
        ("--near-duplicates 80", "near_duplicates is 80.0"),
        ("--num 0", "num is 0 but must be at least 1"),
        ("--min-chars 0", "min_chars is 0"),
        ("--max-chars 5 --min-chars 6", "max_chars is 5 but must be at least min_chars"),
        ("--max-bad -1", "max_bad is -1"),
        ("--phone-region Germany", "phone_region is 'Germany'"),
        ("nothing.jsonl", "nothing.jsonl' is not a folder or file here"),
        ("--column none", "no query is left"),
        ("--column none --max-bad 0", "has no column 'none'"),
        ("no extra", "pip install 'specdec-lab[collect]'"),
    ],
)
def test_wrong_options_are_told_in_one_line(log, out, options, message, monkeypatch):
    if options == "no extra":
        monkeypatch.setattr("specdec.cli.data.find_spec", lambda name: None)
        options = ""
    result = run(log, "--out", out, "--max-bad", 100, *options.split())
    assert result.exit_code == 2
    assert message in result.stderr
    assert not out.exists()
