"""The target's own answers: what is written, how a killed run goes on, what fails and is kept."""

import json
from dataclasses import replace
from unittest.mock import DEFAULT, Mock, patch

import pytest
from tiny_chat import END, answers_in, chatty_target, lines_of, said, spelled, user
from tiny_features import room_for

from specdec import SamplingConfig, generate_baseline, load_drafter
from specdec.checkpoints import identify_target
from specdec.common.config import validated
from specdec.common.messages import Query
from specdec.data.answers import AnswerSettings, check_answers_target, load_answers, read_rows
from specdec.data.dialogue import plan_dialogues
from specdec.data.regenerate import LocalAnswers
from specdec.data.regenerate import regenerate as regenerate_with

MIX = AnswerSettings(temperatures=[0.0, 0.8], max_new_tokens=24, seed=5)


def changed(**changes):
    return AnswerSettings(**{**MIX.model_dump(), **changes})


def regenerate(queries, out, target, settings=MIX, drafter=None, batch_size=4):
    given = {"train": [], "held_out": [], **queries}
    return regenerate_with(given, out, LocalAnswers(target, settings, drafter, batch_size))


def some_queries(num=12):
    texts = [f"{'tell me ' * (i % 4)}about {i}" for i in range(num)]
    found = [Query(f"q{i}", user(text), domain=f"d{i % 2}") for i, text in enumerate(texts)]
    return {"train": found[: -num // 3], "held_out": found[-num // 3 :]}


@pytest.fixture(scope="module")
def target():
    return chatty_target()


def kill(queries, out, target, num_forwards, **options):
    """Stop a run as if its process had been killed after some forwards of the target."""
    left = [DEFAULT] * num_forwards + [KeyboardInterrupt]
    dying = Mock(wraps=target.score, side_effect=left)
    with patch.object(target, "score", dying), pytest.raises(KeyboardInterrupt):
        regenerate(queries, out, target, **options)


def test_rows_hold_what_the_target_wrote_in_order(target, tmp_path):
    queries = some_queries()
    manifest = regenerate(queries, tmp_path, target, batch_size=3)
    for split, members in queries.items():
        rows = lines_of(tmp_path / f"{split}.jsonl")
        assert [row["id"] for row in rows] == [query.id for query in members]
        for row, query in zip(rows, members, strict=True):
            ((start, end),) = row["answers"]
            config = SamplingConfig(row["temperature"], seed=row["seed"])
            alone = generate_baseline(target, [list(query.messages)], config, max_new_tokens=24)[0]
            assert row["tokens"][:start] == alone.prompt_tokens
            assert row["tokens"][start:] == alone.tokens
            assert end == len(row["tokens"])
            assert (row["finish_reason"] == "eos") == (row["tokens"][-1] == END)
            assert (row["text"], row["domain"]) == (alone.text, query.domain)
    assert {row["temperature"] for row in rows} == {0.0, 0.8}
    assert load_answers(tmp_path) == manifest
    assert manifest.counts.train.rows == len(queries["train"])
    assert manifest.answer_tokens == manifest.session.tokens
    assert manifest.answer_tokens == sum(
        row.num_answer_tokens
        for split in queries
        for row in read_rows(tmp_path / f"{split}.jsonl", target.vocab_size)
    )
    assert regenerate(queries, tmp_path, target) == manifest, "given again, it changes nothing"


def test_sampling_of_a_query_ignores_its_neighbors():
    queries = some_queries()
    whole = plan_dialogues(queries, (0.0, 0.8), 5, "last")
    some = plan_dialogues({"train": queries["held_out"][1:]}, (0.0, 0.8), 5, "last")
    known = {d.query.id: (d.temperature, d.seed) for d in whole}
    assert all(known[d.query.id] == (d.temperature, d.seed) for d in some)
    assert len({seed for _, seed in known.values()}) == len(known)
    other = plan_dialogues(queries, (0.0, 0.8), 6, "last")
    assert all(known[d.query.id][1] != d.seed for d in other)


@pytest.mark.parametrize("turns", ["last", "all"])
def test_run_killed_anywhere_resumes_to_the_same_tokens(target, tmp_path, turns):
    queries = some_queries()
    queries["train"][1:3] = [Query("x", user("hello", "again", "more")), Query("y", text="12 34")]
    messages = [message for text in "abc" for message in (*user(text), said("z"))]
    queries["train"].append(Query("z", tuple(messages[:-1])))
    settings = changed(turns=turns)
    regenerate(queries, tmp_path / "whole", target, settings)
    for number, num_forwards in enumerate([0, 1, 7, 20, 33]):
        folder = tmp_path / f"killed{number}"
        # Killed twice, and each run has another batch.
        for size, forwards in ((3, num_forwards), (5, num_forwards // 3)):
            kill(queries, folder, target, forwards, settings=settings, batch_size=size)
            with (folder / "journal.jsonl").open("ab") as file:
                file.write(b'{"step":[[0,0,0,[5')  # a line torn by the kill
        whole_lines = (folder / "journal.jsonl").read_bytes().split(b"\n")[1:-1]
        steps = [step for line in whole_lines for step in json.loads(line)["step"]]
        known = sum(len(tokens) for _, _, _, tokens, _ in steps)
        drafter = load_drafter({"type": "suffix", "min_match": 1}, target) if number % 2 else None
        manifest = regenerate(queries, folder, target, settings, drafter, batch_size=2)
        assert answers_in(folder) == answers_in(tmp_path / "whole")
        assert manifest.session.tokens == manifest.answer_tokens - known
        assert known > 2 * num_forwards
        assert drafter is None or manifest.session.tau > 1


def test_damaged_journal_line_costs_only_its_tokens(target, tmp_path):
    queries = some_queries()
    regenerate(queries, tmp_path / "whole", target)
    kill(queries, tmp_path / "torn", target, 40)
    journal = tmp_path / "torn" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[12] = b"\x00" * 20 + b"\n"
    journal.write_bytes(b"".join(lines))
    for _ in range(2):
        regenerate(queries, tmp_path / "torn", target)
        assert answers_in(tmp_path / "torn") == answers_in(tmp_path / "whole")


def test_full_disk_keeps_what_was_answered(target, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "full"
    regenerate(some_queries(), whole, target)
    half = (whole / "journal.jsonl").stat().st_size // 2
    with room_for(half), pytest.raises(OSError, match="no space left"):
        regenerate(some_queries(), out, target)
    assert [path.name for path in out.iterdir()] == ["journal.jsonl"]
    manifest = regenerate(some_queries(), out, target)
    assert answers_in(out) == answers_in(whole)
    assert 0 < manifest.session.tokens < manifest.answer_tokens


def test_all_turns_follow_the_targets_own_answers(target, tmp_path):
    system = {"role": "system", "content": "be brief"}
    recorded = [system, *user("7"), said("what another model said"), *user("5", "and 8")]
    recorded += [said("the same"), *user("3")]
    queries = {"train": [Query(str(i), tuple(recorded)) for i in range(30)]}
    settings = changed(temperatures=[1.0], max_new_tokens=30, turns="all")
    manifest = regenerate(queries, tmp_path, target, settings)
    end, seen = chr(32 + END), set()
    asked = (f"s:be brief{end}u:7{end}a:", f"u:5{end}u:and 8{end}a:", f"u:3{end}a:")
    rows = lines_of(tmp_path / "train.jsonl")
    for row in rows:
        text = spelled(row["tokens"])
        wrote = [text[a:b] for a, b in row["answers"]]
        assert text == "".join(map("".join, zip(asked, wrote, strict=False)))
        assert all(answer.endswith(end) for answer in wrote[:-1])
        assert len(wrote) == 3 or row["finish_reason"] == "length"
        seen.add(len(wrote))
    assert seen == {1, 2, 3}
    assert manifest.answers == sum(len(row["answers"]) for row in rows)
    assert manifest.unanswered_turns == 90 - manifest.answers


def test_last_turn_is_answered_after_recorded_ones(target, tmp_path):
    recorded = (*user("7"), said("eight"), *user("5"), said("never read"))
    regenerate({"train": [Query("q", recorded)]}, tmp_path, target)
    (row,) = lines_of(tmp_path / "train.jsonl")
    prompt = spelled(row["tokens"][: row["answers"][0][0]])
    assert prompt == "u:7Ha:eightHu:5Ha:".replace("H", chr(32 + END))


def test_unanswerable_queries_are_listed_with_their_reason(target, tmp_path):
    asked = {"good": "hello", "long": "x" * 300, "nearly": "x" * 246, "empty": "  "}
    queries = [Query(name, user(text)) for name, text in asked.items()]
    queries += [Query("nothing"), Query("silent", ({"role": "system", "content": "be brief"},))]
    manifest = regenerate({"train": queries}, tmp_path, target, changed(temperatures=[0.0]))
    reasons = {row["id"]: row["reason"] for row in lines_of(tmp_path / "failed.jsonl")}
    assert reasons.keys() == {"long", "nearly", "empty", "nothing", "silent"}
    assert "305 tokens" in reasons["long"]
    assert "context was full after 251 tokens of the prompt and 5" in reasons["nearly"]
    assert manifest.counts.train.model_dump() == {"queries": 6, "rows": 1, "failed": 5}
    assert [row["id"] for row in lines_of(tmp_path / "train.jsonl")] == ["good"]
    with pytest.raises(RuntimeError, match="every query failed: the prompt has 305"):
        regenerate({"train": queries[1:2]}, tmp_path / "none", target)
    assert [row["id"] for row in lines_of(tmp_path / "none" / "failed.jsonl")] == ["long"]


def test_dialogue_that_fills_the_context_keeps_its_answers(target, tmp_path):
    messages = (*user("7"), said("z"), *user("x" * 300))
    queries = {"train": [Query(str(i), messages) for i in range(20)]}
    settings = changed(temperatures=[1.0], max_new_tokens=512, turns="all")
    manifest = regenerate(queries, tmp_path, target, settings)
    rows = lines_of(tmp_path / "train.jsonl")
    assert {row["finish_reason"] for row in rows} == {"context"}
    assert all(row["tokens"][-1] == END and len(row["answers"]) == 1 for row in rows)
    assert manifest.unanswered_turns == len(rows) > 0


def test_answers_of_another_target_are_refused_by_fact(target, tmp_path):
    manifest = regenerate(some_queries(3), tmp_path, target)
    ours = identify_target(target)
    check_answers_target(manifest, ours)
    check_answers_target(manifest, replace(ours, weights=None, name="other"))
    for fact, value in (("weights", "f" * 64), ("tokenizer", "0" * 64), ("vocab_size", 98)):
        with pytest.raises(ValueError, match=fact):
            check_answers_target(manifest, replace(ours, **{fact: value}))


def test_unfinished_or_changed_folder_is_not_loaded(target, tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished answers"):
        load_answers(tmp_path)
    kill(some_queries(), tmp_path, target, 5)
    with pytest.raises(FileNotFoundError, match="again, to finish it"):
        load_answers(tmp_path)
    regenerate(some_queries(), tmp_path, target)
    whole = answers_in(tmp_path)
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(ValueError, match="0 rows"):
        load_answers(tmp_path)
    regenerate(some_queries(), tmp_path, target)  # the journal still has everything
    assert answers_in(tmp_path) == whole
    (tmp_path / "answers.json").write_text('{"schema": "specdec-answers-2"}')
    with pytest.raises(ValueError, match=r"answers\.json' is damaged, or of another version"):
        load_answers(tmp_path)


def test_folder_of_another_run_is_refused_by_name(target, tmp_path):
    regenerate(some_queries(3), tmp_path, target)
    other, spoken = chatty_target(), chatty_target()
    other.model.lm_head.weight.data.neg_()
    spoken.tokenizer.chat_template += " "
    changes = {"temperatures": [0.0], "top_p": 0.9, "max_new_tokens": 25, "turns": "all", "seed": 6}
    for name, queries, who, settings in (
        *((name, 3, target, changed(**{name: value})) for name, value in changes.items()),
        ("held_out_queries", 6, target, MIX),
        ("target_weights", 3, other, MIX),
        ("chat_template", 3, spoken, MIX),
    ):
        with pytest.raises(ValueError, match=f"another run: {name} is"):
            regenerate(some_queries(queries), tmp_path, who, settings)


def test_chats_need_a_chat_template(tmp_path):
    target = chatty_target()
    target.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        regenerate(some_queries(), tmp_path, target)
    regenerate({"train": [Query("t", text="abc")]}, tmp_path, target)
    (row,) = lines_of(tmp_path / "train.jsonl")
    assert (spelled(row["tokens"][:3]), row["answers"][0][0]) == ("abc", 3)


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
