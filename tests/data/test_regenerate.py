"""The target's own answers: what is written, how a killed run goes on, what fails and is kept."""

import errno
import json
import os
import resource
from contextlib import contextmanager
from dataclasses import replace

import pytest
from tiny_chat import END, chatty_target

from specdec import SamplingConfig, generate_baseline, load_drafter
from specdec.checkpoints import identify_target
from specdec.common.config import validated
from specdec.common.files import Journal
from specdec.data.answers import AnswerSettings, check_answers_target, load_answers
from specdec.data.conversation import Query
from specdec.data.dialogue import plan_dialogues
from specdec.data.local_answers import LocalAnswers
from specdec.data.regenerate import regenerate as regenerate_with

MIX = AnswerSettings(temperatures=[0.0, 0.8], max_new_tokens=24, seed=5)
FILES = ("train.jsonl", "held_out.jsonl", "failed.jsonl")


def user(*texts):
    return tuple({"role": "user", "content": text} for text in texts)


def asked(name, *texts, **more):
    return Query(name, user(*texts), **more)


def some_queries(num=12):
    texts = [f"{'tell me ' * (i % 4)}about {i}" for i in range(num)]
    found = [asked(f"q{i}", text, domain=f"d{i % 2}") for i, text in enumerate(texts)]
    return {"train": found[: -num // 3], "held_out": found[-num // 3 :]}


def changed(**changes):
    return AnswerSettings(**{**MIX.model_dump(), **changes})


def regenerate(queries, out, target, settings=MIX, drafter=None, batch_size=32):
    return regenerate_with(queries, out, LocalAnswers(target, settings, drafter, batch_size))


@pytest.fixture(scope="module")
def target():
    return chatty_target()


def contents(folder):
    return {name: (folder / name).read_text() for name in FILES}


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@contextmanager
def room_for(num_bytes):
    """No file may grow beyond it, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def dies_after(target, monkeypatch, num_forwards):
    """Let the target's forward fail, as if the process had been stopped there."""
    original, left = target.score, [num_forwards]

    def score(*arguments, **options):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(target, "score", score)


def test_rows_hold_what_the_target_wrote_in_order(target, tmp_path):
    queries = some_queries()
    regenerate(queries, tmp_path, target, batch_size=3)
    for split, members in queries.items():
        rows = read(tmp_path / f"{split}.jsonl")
        assert [row["id"] for row in rows] == [query.id for query in members]
        for row, query in zip(rows, members, strict=True):
            ((start, end),) = row["answers"]
            prompt = row["tokens"][:start]
            config = SamplingConfig(row["temperature"], seed=row["seed"])
            alone = generate_baseline(target, [list(query.messages)], config, max_new_tokens=24)[0]
            assert (prompt, row["tokens"][start:]) == (alone.prompt_tokens, alone.tokens)
            assert end == len(row["tokens"])
            assert (row["finish_reason"] == "eos") == (row["tokens"][-1] == END)
            assert row["text"] == alone.text
            assert row["domain"] == query.domain
    assert {row["temperature"] for row in rows} == {0.0, 0.8}


def test_sampling_of_a_query_ignores_its_neighbours():
    queries = some_queries()
    whole = plan_dialogues(queries, (0.0, 0.8), 5, "last")
    some = plan_dialogues({"train": queries["held_out"][1:]}, (0.0, 0.8), 5, "last")
    known = {d.query.id: (d.temperature, d.seed) for d in whole}
    assert all(known[d.query.id] == (d.temperature, d.seed) for d in some)
    assert len({seed for _, seed in known.values()}) == len(known)
    other = plan_dialogues(queries, (0.0, 0.8), 6, "last")
    assert all(known[d.query.id][1] != d.seed for d in other)


@pytest.mark.parametrize("turns", ["last", "all"])
def test_run_killed_anywhere_resumes_to_the_same_tokens(target, tmp_path, monkeypatch, turns):
    queries = some_queries()
    queries["train"][1:3] = [asked("x", "hello", "again", "more"), Query("y", text="12 34")]
    messages = [m for text in "abc" for m in (*user(text), {"role": "assistant", "content": "z"})]
    queries["train"].append(Query("z", tuple(messages[:-1])))
    settings = changed(turns=turns)
    regenerate(queries, tmp_path / "whole", target, settings, batch_size=4)
    for number, num_forwards in enumerate([0, 1, 7, 20, 33]):
        folder = tmp_path / f"killed{number}"
        # Killed twice, and each run has another batch.
        for batch_size, forwards in ((3, num_forwards), (5, num_forwards // 3)):
            dies_after(target, monkeypatch, forwards)
            with pytest.raises(KeyboardInterrupt):
                regenerate(queries, folder, target, settings, batch_size=batch_size)
            monkeypatch.undo()
            with (folder / "journal.jsonl").open("ab") as file:
                file.write(b'{"step":[[0,0,0,[5')  # a line torn by the kill
        drafter = load_drafter({"type": "suffix", "min_match": 1}, target) if number % 2 else None
        manifest = regenerate(queries, folder, target, settings, drafter, batch_size=2)
        assert contents(folder) == contents(tmp_path / "whole")
        already = manifest.answer_tokens - manifest.session.tokens
        assert already > 2 * num_forwards


def test_journalled_tokens_are_not_decoded_again(target, tmp_path, monkeypatch):
    queries = some_queries()
    dies_after(target, monkeypatch, 30)
    with pytest.raises(KeyboardInterrupt):
        regenerate(queries, tmp_path, target, batch_size=4)
    monkeypatch.undo()
    steps = [row["step"] for row in read(tmp_path / "journal.jsonl")[1:]]
    known = sum(len(tokens) for step in steps for _, _, _, tokens, _ in step)
    assert known > 100
    manifest = regenerate(queries, tmp_path, target, batch_size=4)
    assert manifest.session.tokens == manifest.answer_tokens - known


def test_damaged_journal_line_costs_only_its_tokens(target, tmp_path, monkeypatch):
    queries = some_queries()
    regenerate(queries, tmp_path / "whole", target, batch_size=4)
    dies_after(target, monkeypatch, 40)
    with pytest.raises(KeyboardInterrupt):
        regenerate(queries, tmp_path / "torn", target, batch_size=4)
    monkeypatch.undo()
    journal = tmp_path / "torn" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[12] = b"\x00" * 20 + b"\n"
    journal.write_bytes(b"".join(lines))
    for _ in range(2):
        regenerate(queries, tmp_path / "torn", target, batch_size=4)
        assert contents(tmp_path / "torn") == contents(tmp_path / "whole")


def test_all_turns_follow_the_targets_own_answers(target, tmp_path):
    recorded = [
        {"role": "system", "content": "be brief"},
        *user("7"),
        {"role": "assistant", "content": "what another model said"},
        *user("5", "and 8"),
        {"role": "assistant", "content": "the same"},
        *user("3"),
    ]
    queries = {"train": [Query(str(i), tuple(recorded)) for i in range(30)], "held_out": []}
    settings = changed(temperatures=[1.0], max_new_tokens=30, turns="all")
    manifest = regenerate(queries, tmp_path, target, settings)
    rows = read(tmp_path / "train.jsonl")
    end = chr(32 + END)
    seen = set()
    for row in rows:
        letters = "".join(chr(32 + token) for token in row["tokens"])
        expected, wrote = f"s:be brief{end}u:7{end}a:", [letters[a:b] for a, b in row["answers"]]
        for text, more in zip(wrote, (f"u:5{end}u:and 8{end}a:", f"u:3{end}a:", ""), strict=False):
            expected += text
            if text is not wrote[-1]:
                assert text.endswith(end)
                expected += more
        assert letters == expected
        seen.add(len(wrote))
        if len(wrote) < 3:
            assert row["finish_reason"] == "length"
    assert seen == {1, 2, 3}
    assert manifest.answers == sum(len(row["answers"]) for row in rows)
    assert manifest.unanswered_turns == 90 - manifest.answers


def test_last_turn_is_answered_after_recorded_ones(target, tmp_path):
    recorded = (*user("7"), {"role": "assistant", "content": "eight"}, *user("5"))
    after = {"role": "assistant", "content": "never read"}
    regenerate({"train": [Query("q", (*recorded, after))], "held_out": []}, tmp_path, target)
    (row,) = read(tmp_path / "train.jsonl")
    end = chr(32 + END)
    prompt = "".join(chr(32 + token) for token in row["tokens"][: row["answers"][0][0]])
    assert prompt == f"u:7{end}a:eight{end}u:5{end}a:"


def test_unanswerable_queries_are_listed_with_their_reason(target, tmp_path):
    queries = {
        "train": [
            asked("good", "hello"),
            asked("long", "x" * 300),
            asked("nearly", "x" * 246),
            asked("empty", "  "),
            Query("nothing"),
            Query("silent", ({"role": "system", "content": "be brief"},)),
        ],
        "held_out": [],
    }
    manifest = regenerate(queries, tmp_path, target, changed(temperatures=[0.0]))
    reasons = {row["id"]: row["reason"] for row in read(tmp_path / "failed.jsonl")}
    assert reasons.keys() == {"long", "nearly", "empty", "nothing", "silent"}
    assert "305 tokens" in reasons["long"]
    assert "context was full after 251 tokens of the prompt and 5" in reasons["nearly"]
    assert manifest.counts.train.model_dump() == {"queries": 6, "rows": 1, "failed": 5}
    assert [row["id"] for row in read(tmp_path / "train.jsonl")] == ["good"]


def test_dialogue_that_fills_the_context_keeps_its_answers(target, tmp_path):
    messages = (*user("7"), {"role": "assistant", "content": "z"}, *user("x" * 300))
    queries = {"train": [Query(str(i), messages) for i in range(20)], "held_out": []}
    manifest = regenerate(
        queries, tmp_path, target, AnswerSettings(temperatures=[1.0], turns="all")
    )
    rows = read(tmp_path / "train.jsonl")
    cut = [row for row in rows if row["finish_reason"] == "context"]
    assert cut
    assert all(row["tokens"][-1] == END and len(row["answers"]) == 1 for row in cut)
    assert manifest.unanswered_turns == len(rows)
    assert {row["finish_reason"] for row in rows} == {"context"}


def test_finished_folder_loads(target, tmp_path):
    queries = some_queries()
    manifest = regenerate(queries, tmp_path, target)
    answers = load_answers(tmp_path)
    assert answers.manifest == manifest
    rows = list(answers.rows("held_out", target.vocab_size))
    assert [row.id for row in rows] == [query.id for query in queries["held_out"]]
    assert answers.num_rows("train") == len(queries["train"])
    assert manifest.answer_tokens == sum(
        row.num_answer_tokens
        for split in ("train", "held_out")
        for row in answers.rows(split, target.vocab_size)
    )


def test_answers_of_another_target_are_refused_by_fact(target, tmp_path):
    manifest = regenerate(some_queries(), tmp_path, target)
    ours = identify_target(target)
    check_answers_target(manifest, ours)
    check_answers_target(manifest, replace(ours, weights=None, name="other"))
    for fact, value in (("weights", "f" * 64), ("tokenizer", "0" * 64), ("vocab_size", 98)):
        with pytest.raises(ValueError, match=fact):
            check_answers_target(manifest, replace(ours, **{fact: value}))


def test_unfinished_or_changed_folder_is_not_loaded(target, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no finished answers"):
        load_answers(tmp_path)
    dies_after(target, monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        regenerate(some_queries(), tmp_path, target)
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="again, to finish it"):
        load_answers(tmp_path)
    regenerate(some_queries(), tmp_path, target)
    whole = contents(tmp_path)
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(ValueError, match="0 rows"):
        load_answers(tmp_path)
    regenerate(some_queries(), tmp_path, target)  # the journal still has everything
    assert contents(tmp_path) == whole


def test_folder_of_another_run_is_refused_by_name(target, tmp_path):
    regenerate(some_queries(3), tmp_path, target)
    for name, value in (
        ("temperatures", [0.0]),
        ("top_p", 0.9),
        ("max_new_tokens", 25),
        ("turns", "all"),
        ("seed", 6),
    ):
        with pytest.raises(ValueError, match=f"another run: {name} is"):
            regenerate(some_queries(3), tmp_path, target, changed(**{name: value}))
    with pytest.raises(ValueError, match="held_out_queries is"):
        regenerate(some_queries(6), tmp_path, target)
    other = chatty_target()
    other.model.lm_head.weight.data.neg_()
    with pytest.raises(ValueError, match="target_weights is"):
        regenerate(some_queries(3), tmp_path, other)
    other = chatty_target()
    other.tokenizer.chat_template += " "
    with pytest.raises(ValueError, match="chat_template is"):
        regenerate(some_queries(3), tmp_path, other)


def test_finished_run_given_again_changes_nothing(target, tmp_path):
    first = regenerate(some_queries(), tmp_path, target)
    assert regenerate(some_queries(), tmp_path, target) == first
    assert first.session.tokens == first.answer_tokens


def test_two_runs_cannot_write_to_one_folder(target, tmp_path):
    with (
        Journal(tmp_path / "journal.jsonl", {}),
        pytest.raises(ValueError, match="another run is writing"),
    ):
        regenerate(some_queries(), tmp_path, target)


@contextmanager
def full_at_the_end(monkeypatch):
    def full(*names):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        yield


def test_full_disk_keeps_what_was_answered(target, tmp_path, monkeypatch):
    regenerate(some_queries(), tmp_path / "whole", target)
    size = (tmp_path / "whole" / "journal.jsonl").stat().st_size
    for full in (room_for(size // 2), full_at_the_end(monkeypatch)):
        out = tmp_path / full.func.__name__
        with full, pytest.raises(OSError, match="no space left"):
            regenerate(some_queries(), out, target)
        assert [path.name for path in out.iterdir()] == ["journal.jsonl"]
        manifest = regenerate(some_queries(), out, target)
        assert contents(out) == contents(tmp_path / "whole")
        assert manifest.session.tokens < manifest.answer_tokens


def test_run_without_any_answer_fails_and_lists_why(target, tmp_path):
    queries = {"train": [asked("long", "x" * 300)], "held_out": []}
    with pytest.raises(RuntimeError, match="every query failed: the prompt has 305"):
        regenerate(queries, tmp_path, target)
    assert [row["id"] for row in read(tmp_path / "failed.jsonl")] == ["long"]


def test_chats_need_a_chat_template(tmp_path):
    target = chatty_target()
    target.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        regenerate(some_queries(), tmp_path, target)
    texts = {"train": [Query("t", text="abc")], "held_out": []}
    regenerate(texts, tmp_path, target)
    (row,) = read(tmp_path / "train.jsonl")
    assert row["tokens"][:3] == [ord(letter) - 32 for letter in "abc"]
    assert row["answers"][0][0] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperatures": []}, "temperatures is .* at least 1"),
        ({"temperatures": [-1.0]}, "temperature is -1.0"),
        ({"top_p": 2.0}, "top_p is 2.0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"turns": "first"}, "turns is 'first'"),
        ({"top_k": 3}, "top_k does not exist; did you mean top_p"),
    ],
)
def test_settings_that_cannot_work_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        validated(AnswerSettings, options)
