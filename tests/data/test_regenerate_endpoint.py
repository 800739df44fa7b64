"""Answers through an endpoint: retries, failures, resuming, and tokens that may not be its own."""

import time

import httpx
import pytest
from fake_endpoint import FakeEndpoint, letters
from tenacity import RetryCallState
from tiny_chat import END, TEMPLATE, answers_in, letter_tokenizer, lines_of, said, user

from specdec.common.messages import Query
from specdec.data import endpoint as endpoint_module
from specdec.data.answers import AnswerSettings, load_answers
from specdec.data.dialogue import Chat
from specdec.data.endpoint import Endpoint, EndpointAnswers
from specdec.data.regenerate import EndpointDownError, regenerate

SETTINGS = AnswerSettings(temperatures=[0.0, 0.7], top_p=0.9, max_new_tokens=32, seed=3)
ALL_TURNS = AnswerSettings(**{**SETTINGS.model_dump(), "turns": "all"})


@pytest.fixture
def server():
    fake = FakeEndpoint()
    yield fake
    fake.close()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(endpoint_module, "_FIRST_WAIT_S", 0.002)


def queries(num=10):
    members = [Query(f"q{i}", user(f"query {i:03d}")) for i in range(num)]
    return {"train": members[:-2], "held_out": members[-2:]}


def ask(server, out, found=None, settings=SETTINGS, tokenizer=None, api="chat", **options):
    chat = Chat(tokenizer or letter_tokenizer(), (END,))
    answers = EndpointAnswers(Endpoint(server.url, "a-model", **options), chat, settings, api)
    return regenerate(found or queries(), out, answers)


def only(**queries):
    """Queries for training alone, by id."""
    return {"train": [Query(name, messages) for name, messages in queries.items()], "held_out": []}


def test_rows_hold_the_servers_tokens_in_order(server, tmp_path):
    manifest = ask(server, tmp_path)
    rows = lines_of(tmp_path / "train.jsonl") + lines_of(tmp_path / "held_out.jsonl")
    assert [row["id"] for row in rows] == [f"q{i}" for i in range(10)]
    for i, row in enumerate(rows):
        prompt = [*letters(f"u:query {i:03d}"), END, *letters("a:")]
        answer = [*letters(f"query {i:03d}"[::-1]), END]
        assert row["tokens"] == prompt + answer
        assert row["answers"] == [[len(prompt), len(row["tokens"])]]
        assert "retokenized" not in row
    asked = {"url": server.url, "model": "a-model", "api": "chat"}
    assert manifest.endpoint.model_dump() == asked
    assert load_answers(tmp_path) == manifest
    body = server.requests[0]
    assert (body["model"], body["top_p"], body["max_tokens"]) == ("a-model", 0.9, 32)
    assert {body["temperature"] for body in server.requests} == {0.0, 0.7}
    assert len({body["seed"] for body in server.requests}) == 10


def test_every_way_of_asking_gives_the_same_rows(server, tmp_path):
    ask(server, tmp_path / "chat")
    server.requests.clear()
    ask(server, tmp_path / "completion", api="completion")
    assert answers_in(tmp_path / "completion") == answers_in(tmp_path / "chat")
    assert all(isinstance(body["prompt"], list) for body in server.requests)
    server.gives_ids = False
    assert ask(server, tmp_path / "text").retokenized_answers == 10
    rows, wanted = (lines_of(tmp_path / name / "train.jsonl") for name in ("text", "chat"))
    assert rows == [{**row, "retokenized": True} for row in wanted]
    ask(server, tmp_path / "raw", {"train": [Query("t", text="abc")], "held_out": []})
    (row,) = lines_of(tmp_path / "raw/train.jsonl")
    assert row["tokens"] == [*letters("abccba"), END]


@pytest.mark.parametrize("api", ["chat", "completion"])
@pytest.mark.parametrize("gives_ids", [True, False])
def test_all_turns_follow_the_servers_own_answers(server, tmp_path, api, gives_ids):
    server.gives_ids = gives_ids
    found = only(q=(*user("one"), said("recorded"), *user("two")))
    ask(server, tmp_path, found, ALL_TURNS, api=api)
    (row,) = lines_of(tmp_path / "train.jsonl")
    end = chr(32 + END)
    assert row["tokens"] == letters(f"u:one{end}a:eno{end}u:two{end}a:owt{end}")
    wrote = [row["tokens"][a:b] for a, b in row["answers"]]
    assert wrote == [letters(f"eno{end}"), letters(f"owt{end}")]


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, "drop"])
def test_what_may_pass_is_tried_again(server, tmp_path, status):
    failing = "drop" if status == "drop" else (status, {}, {"error": "not now"})
    server.respond = lambda number, body: failing if number % 2 else None
    ask(server, tmp_path, queries(4), concurrency=1)
    assert load_answers(tmp_path).counts.train.rows == 2
    assert len(server.requests) == 8


@pytest.mark.parametrize(("status", "attempts"), [(400, 1), (413, 1), (422, 1), (500, 3)])
def test_query_without_an_answer_is_listed(server, tmp_path, status, attempts):
    refusal = (status, {}, {"error": "too long"})
    server.respond = lambda number, body: refusal if "query 003" in str(body) else None
    manifest = ask(server, tmp_path, attempts=3)
    assert len(server.requests) == 9 + attempts, "what cannot pass is not tried again"
    (failed,) = lines_of(tmp_path / "failed.jsonl")
    assert (failed["id"], failed["reason"]) == ("q3", f'HTTP {status}: {{"error": "too long"}}')
    assert manifest.counts.train.model_dump() == {"queries": 8, "rows": 7, "failed": 1}
    server.respond = lambda number, body: None
    assert ask(server, tmp_path).counts.train.failed == 0
    assert len(server.requests) == 10 + attempts, "only what had failed is asked again"
    assert lines_of(tmp_path / "failed.jsonl") == []


def test_the_server_says_how_long_to_wait(server, tmp_path):
    times = []

    def respond(number, body):
        times.append(time.monotonic())
        return (429, {"retry-after": "0.3"}, "slow down") if number == 1 else None

    server.respond = respond
    ask(server, tmp_path, only(q=user("one")))
    assert times[1] - times[0] >= 0.3


def test_waits_are_the_servers_or_double_up_to_a_limit():
    date = httpx.Response(503, headers={"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"})
    assert endpoint_module._retry_after_s(date) == 0.0
    assert endpoint_module._retry_after_s(httpx.Response(503)) is None

    def wait(attempt):
        state = RetryCallState(None, None, (), {})
        state.attempt_number = attempt
        return endpoint_module._wait_s(state) / endpoint_module._FIRST_WAIT_S

    assert all(0.5 <= wait(1) <= 1.5 for _ in range(20))
    assert all(4 <= wait(4) <= 12 for _ in range(20))
    assert wait(40) <= 1.5 * endpoint_module._LONGEST_WAIT_S / endpoint_module._FIRST_WAIT_S


def test_dead_endpoint_keeps_answers_and_resumes(server, tmp_path):
    ask(server, tmp_path / "whole", queries(30))
    server.requests.clear()

    def respond(number, body):
        if number > 12:
            server.is_down = True

    server.respond = respond
    with pytest.raises(EndpointDownError, match="answers no more"):
        ask(server, tmp_path / "died", queries(30), concurrency=4, attempts=2)
    assert not (tmp_path / "died/answers.json").exists()
    failed = lines_of(tmp_path / "died/failed.jsonl")
    assert 18 <= len(failed) < 30
    waiting = [row for row in failed if row["reason"].startswith("not answered yet")]
    assert 0 < len(waiting) < len(failed), "what was asked last says what went wrong"
    server.is_down, server.respond = False, lambda number, body: None
    server.requests.clear()
    ask(server, tmp_path / "died", queries(30), concurrency=4)
    assert len(server.requests) == len(failed), "finished answers are not asked for again"
    assert answers_in(tmp_path / "died") == answers_in(tmp_path / "whole")


def test_server_that_only_answers_health_is_given_up(server, tmp_path):
    server.respond = lambda number, body: (500, {}, "broken")
    with pytest.raises(EndpointDownError, match="HTTP 500: broken"):
        ask(server, tmp_path, queries(50), concurrency=4, attempts=2)
    assert len(server.requests) < 30


@pytest.mark.parametrize("status", [401, 403, 404])
def test_server_that_refuses_every_query_stops_the_run(server, tmp_path, status):
    server.respond = lambda number, body: (status, {}, "no")
    with pytest.raises(ValueError, match=f"refuses model 'a-model' \\(HTTP {status}: no\\)"):
        ask(server, tmp_path, concurrency=1)
    assert len(server.requests) == 1


def test_the_api_key_is_sent_and_never_written(server, tmp_path):
    key = "sk-test-0123456789abcdef"
    server.respond = lambda number, body: (
        (400, {}, f"Incorrect API key provided: {key}") if number == 3 else None
    )
    ask(server, tmp_path, api_key=key, concurrency=1)
    assert all(headers["Authorization"] == f"Bearer {key}" for headers in server.headers)
    assert "provided: ***" in (tmp_path / "failed.jsonl").read_text()
    for path in tmp_path.iterdir():
        assert key not in path.read_text()


def test_strict_server_is_asked_without_unknown_fields(server, tmp_path):
    refusal = 400, {}, "Unrecognized request argument supplied: return_token_ids"
    server.respond = lambda number, body: refusal if "return_token_ids" in body else None
    assert ask(server, tmp_path, concurrency=1).retokenized_answers == 10
    assert len(server.requests) == 11


@pytest.mark.parametrize(
    ("choice", "message", "reason"),
    [
        ({}, {"reasoning_content": "so"}, "took reasoning or tool calls out"),
        ({}, {"tool_calls": [{"id": 1}]}, "took reasoning or tool calls out"),
        ({"finish_reason": "content_filter"}, {}, "ended by 'content_filter'"),
    ],
)
def test_changed_answer_is_refused(server, tmp_path, choice, message, reason):
    whole = {"finish_reason": "stop", "message": {**said("abc"), **message}, **choice}
    server.respond = lambda number, body: (200, {}, {"choices": [whole]})
    with pytest.raises(RuntimeError, match=f"every query failed.*{reason}"):
        ask(server, tmp_path)
    assert len(lines_of(tmp_path / "failed.jsonl")) == 10


def test_answer_joined_with_its_prompt_is_refused(server, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {chr(32 + i): i for i in range(97)}
    inner = Tokenizer(models.BPE({**vocab, ":a": 97}, [(":", "a")], unk_token="~"))
    inner.pre_tokenizer = pre_tokenizers.Split(chr(32 + END), "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="~", eos_token=chr(32 + END), chat_template=TEMPLATE
    )
    server.gives_ids = False
    ask(server, tmp_path, only(joins=user("cba"), fits=user("abc")), tokenizer=tokenizer)
    (failed,) = lines_of(tmp_path / "failed.jsonl")
    assert failed["id"] == "joins"
    assert "do not begin with the tokens of the prompt" in failed["reason"]
    assert [row["id"] for row in lines_of(tmp_path / "train.jsonl")] == ["fits"]


def test_template_that_rewrites_answers_ends_the_dialogue(server, tmp_path):
    template = TEMPLATE.replace("message['content']", "(message['content'] | upper)")
    found = only(q=(*user("1a"), said("x"), *user("2")))
    server.gives_ids = False
    manifest = ask(server, tmp_path, found, ALL_TURNS, letter_tokenizer(template))
    (row,) = lines_of(tmp_path / "train.jsonl")
    assert len(row["answers"]) == 1
    assert row["finish_reason"] == "template"
    assert manifest.unanswered_turns == 1


def test_answer_cut_by_the_context_fails(server, tmp_path):
    def respond(number, body):
        answer = server.answer("/chat/completions", body)
        if body["messages"][0]["content"] == "query 003":
            answer["choices"][0]["finish_reason"] = "length"
        return 200, {}, answer

    server.respond = respond
    ask(server, tmp_path)
    (failed,) = lines_of(tmp_path / "failed.jsonl")
    assert "context was full" in failed["reason"]
    ask(server, tmp_path / "long", only(long=user("x" * 40)))
    (row,) = lines_of(tmp_path / "long/train.jsonl")
    ((start, end),) = row["answers"]
    assert (row["finish_reason"], end - start) == ("length", 32)


def test_folder_of_another_endpoint_is_refused(server, tmp_path):
    ask(server, tmp_path)
    other = FakeEndpoint()
    with pytest.raises(ValueError, match="another run: endpoint is"):
        ask(other, tmp_path)
    other.close()
    with pytest.raises(ValueError, match="another run: api is"):
        ask(server, tmp_path, api="completion")
    with pytest.raises(ValueError, match="api is 'text' but must be one of"):
        ask(server, tmp_path, api="text")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:8000", "must be a URL"),
        ("ftp://host/v1", "must be a URL"),
        ("http://user:secret@host/v1", "a user name, a password"),
        ("http://host/v1?key=secret", "a user name, a password"),
    ],
)
def test_unusable_or_secret_url_is_refused(url, message):
    with pytest.raises(ValueError, match=message) as error:
        Endpoint(url, "m")
    assert "secret" not in str(error.value)
