"""What is recorded of what passes, and what is not."""

import asyncio
import gzip
import json
import os
import random
import socket
import threading
from pathlib import Path

import anyio
import pytest
from fake_upstream import PATIENCE_S, answer, chat, delta, event, streaming
from json_schema import violations
from starlette.responses import JSONResponse, Response, StreamingResponse

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "recording.schema.json").read_text())


def only(proxy):
    (record,) = proxy.records()
    assert violations(record, SCHEMA) == []
    return record


def test_a_plain_answer_is_recorded_as_it_is(proxy, upstream):
    body = answer("hi", usage={"total_tokens": 3})

    async def respond(request):
        return JSONResponse(body)

    upstream.answer = respond
    proxy.ask(chat("hello", temperature=0.5))
    record = only(proxy)
    assert record["request"] == chat("hello", temperature=0.5)
    assert record["response"] == body
    assert (record["status"], record["complete"], record["stream"]) == (200, True, False)
    assert (record["path"], record["model"]) == ("/v1/chat/completions", "m")
    assert record["ttft_s"] is None


def test_a_stream_is_recorded_joined(proxy, upstream):
    usage = {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6}
    call = {"index": 0, "id": "call_1", "type": "function"}
    upstream.answer = streaming(
        [
            delta(role="assistant", content=""),
            delta(reasoning_content="hm", content=None),
            delta(content="two "),
            delta(content="words"),
            delta(tool_calls=[{**call, "function": {"name": "f", "arguments": ""}}]),
            delta(tool_calls=[{"index": 1, "id": "call_2", "function": {"name": "g"}}]),
            delta(tool_calls=[{"index": 0, "function": {"arguments": '{"a":'}}]),
            delta(tool_calls=[{"index": 0, "function": {"arguments": " 1}"}}]),
            delta("tool_calls"),
            event({"id": "c1", "choices": [], "usage": usage}),
            event("[DONE]"),
        ]
    )
    proxy.ask(chat("a", stream=True))
    record = only(proxy)
    assert record["response"] == {
        "id": "c1",
        "object": "chat.completion",
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "two words",
                    "reasoning_content": "hm",
                    "tool_calls": [
                        {
                            "id": "call_1",
                            "type": "function",
                            "function": {"name": "f", "arguments": '{"a": 1}'},
                        },
                        {"id": "call_2", "function": {"name": "g"}},
                    ],
                },
                "finish_reason": "tool_calls",
            }
        ],
        "usage": usage,
    }
    assert (record["complete"], record["stream"]) == (True, True)
    assert 0 <= record["ttft_s"] <= record["latency_s"]


def test_events_with_other_line_ends_and_over_several_lines_are_read(proxy, upstream):
    first, second = delta(content="a").decode(), delta("stop", content="b").decode()
    second = second.replace('"choices"', '\ndata:"choices"')
    stream = (first + ": ping\n\nevent: x\nid: 1\n" + second).replace("\n", "\r\n").encode()
    upstream.answer = streaming([stream, b"data: [DONE]"])
    proxy.ask(chat("a", stream=True))
    record = only(proxy)
    assert record["response"]["choices"][0]["message"]["content"] == "ab"
    assert record["complete"] is True


def test_a_compressed_stream_that_grows_much_is_read_to_its_end(proxy, upstream):
    events = [delta(content="x" * 300_000), delta("stop", content="end"), event("[DONE]")]
    packed = gzip.compress(b"".join(events))
    upstream.answer = streaming([packed], headers={"content-encoding": "gzip"})
    proxy.ask(chat("a", stream=True))
    record = only(proxy)
    assert record["response"]["choices"][0]["message"]["content"] == "x" * 300_000 + "end"
    assert record["complete"] is True


def test_damaged_compression_leaves_the_request_recorded(proxy, upstream):
    upstream.answer = streaming([b"no gzip at all"], headers={"content-encoding": "gzip"})
    with (
        proxy.client() as client,
        client.stream("POST", "/v1/chat/completions", json=chat("a")) as response,
    ):
        assert b"".join(response.iter_raw()) == b"no gzip at all"
    record = only(proxy)
    assert (record["response"], record["complete"]) == (None, False)


def test_choices_of_a_streamed_completion_are_joined_apart(proxy, upstream):
    def part(index, text, reason=None):
        return event({"choices": [{"index": index, "text": text, "finish_reason": reason}]})

    upstream.answer = streaming(
        [part(1, "b"), part(0, "a"), part(0, "A", "stop"), part(1, "B", "length")]
    )
    proxy.ask({"prompt": "x", "stream": True}, "/v1/completions")
    record = only(proxy)
    assert record["response"]["object"] == "text_completion"
    assert record["response"]["choices"] == [
        {"index": 0, "text": "aA", "finish_reason": "stop"},
        {"index": 1, "text": "bB", "finish_reason": "length"},
    ]
    assert record["complete"] is True  # without [DONE], as every choice has its reason


@pytest.mark.parametrize(
    "events",
    [
        [delta(content="a")],
        [delta(content="a"), event({"error": {"message": "out of memory"}}), event("[DONE]")],
        [delta(content="a"), event("{not json"), event("[DONE]")],
        [delta(content="a"), event({"choices": [None]}), event("[DONE]")],
        [delta(content="a"), event("[1]"), event("[DONE]")],
    ],
    ids=["no end", "error", "no JSON", "no choice", "no object"],
)
def test_a_stream_that_is_not_whole_or_not_sound_says_so(proxy, upstream, events):
    upstream.answer = streaming(events)
    assert proxy.ask(chat("a", stream=True)).content == b"".join(events)
    record = only(proxy)
    assert record["complete"] is False
    assert record["response"]["choices"][0]["message"]["content"] == "a"


@pytest.mark.parametrize("body", [b"<html>", b"[1]", b"\xff", b"", b"[" * 100_000])
def test_an_answer_that_is_no_object_leaves_the_request_recorded(proxy, upstream, body):
    async def respond(request):
        return Response(body, 502)

    upstream.answer = respond
    assert proxy.ask().content == body
    record = only(proxy)
    assert (record["response"], record["complete"], record["status"]) == (None, False, 502)


@pytest.mark.parametrize(
    ("method", "path", "recorded"),
    [
        ("POST", "/v1/chat/completions", True),
        ("POST", "/v1/completions", True),
        ("POST", "/chat/completions", True),
        ("POST", "/completions", True),
        ("POST", "/team/a/v1/chat/completions/?x=1", True),
        ("POST", "/v1/embeddings", False),
        ("POST", "/v1/completions/1", False),
        ("POST", "/v1/mycompletions", False),
        ("GET", "/v1/chat/completions", False),
    ],
)
def test_only_completions_are_recorded(proxy, upstream, method, path, recorded):
    with proxy.client() as client:
        assert client.request(method, path, json=chat("a")).status_code == 200
    assert len(proxy.records()) == recorded
    assert proxy.health()["skipped"] == {}


def until_the_client_leaves(upstream, first):
    """Answers with `first`, and then nothing until the connection is closed."""

    async def run():
        try:
            yield first
            await anyio.sleep(PATIENCE_S)
        except asyncio.CancelledError:
            upstream.left.set()
            raise

    async def respond(request):
        return StreamingResponse(run(), media_type="text/event-stream")

    return respond


def test_a_client_that_leaves_stops_the_upstream_and_is_recorded_as_far_as_it_came(proxy, upstream):
    upstream.answer = until_the_client_leaves(upstream, delta(content="half"))
    with (
        proxy.client() as client,
        client.stream("POST", "/v1/chat/completions", json=chat("a")) as response,
    ):
        assert next(response.iter_raw())
    assert upstream.left.wait(PATIENCE_S)
    proxy.eventually(proxy.records)
    record = only(proxy)
    assert (record["complete"], record["status"]) == (False, 200)
    assert record["response"]["choices"][0]["message"]["content"] == "half"
    proxy.eventually(lambda: proxy.health()["running"] == 0)


def sent_by_hand(proxy, body, length):
    """A connection that has sent this much of a request whose body has that length."""
    address = proxy.url.removeprefix("http://").split(":")
    connection = socket.create_connection((address[0], int(address[1])))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def test_a_client_that_leaves_before_the_answer_begins_is_recorded_too(proxy, upstream):
    asked = threading.Event()

    async def respond(request):
        asked.set()
        while not await request.is_disconnected():
            await anyio.sleep(0.01)
        upstream.left.set()
        return Response()

    upstream.answer = respond
    body = json.dumps(chat("a")).encode()
    with sent_by_hand(proxy, body, len(body)):
        assert asked.wait(PATIENCE_S)
    assert upstream.left.wait(PATIENCE_S)
    proxy.eventually(proxy.records)
    record = only(proxy)
    assert (record["status"], record["response"], record["complete"]) == (None, None, False)


def test_a_client_that_leaves_before_it_has_asked_leaves_nothing(proxy, upstream):
    with sent_by_hand(proxy, b'{"messages"', 100):
        proxy.eventually(lambda: proxy.recorder.budget.held_bytes)
    proxy.eventually(lambda: proxy.health()["running"] == 0)
    health = proxy.health()
    assert health["skipped"] == {"client left before it had asked": 1}
    assert (health["held_bytes"], proxy.lines()) == (0, [])


def plain(*pieces, **headers):
    async def respond(request):
        return StreamingResponse(iter(pieces), headers=headers)

    return respond


@pytest.mark.parametrize(
    "respond",
    [
        streaming([delta(content="a"), event("[DONE]")]),
        plain(b'{"a": 1', b"}"),
        plain(b'{"a": 1', b"}", **{"content-length": "8"}),
        plain(**{"content-length": "0"}),
    ],
    ids=["[DONE]", "chunked", "with a length", "empty"],
)
def test_what_a_client_knows_to_be_finished_is_on_the_disk(start_proxy, upstream, respond):
    finished, too_late = threading.Event(), []

    def write(fd, line):
        too_late.append(finished.wait(0.2))
        return os.write(fd, line)

    proxy = start_proxy(upstream.url, write=write, max_wait_s=PATIENCE_S)
    upstream.answer = respond
    with (
        proxy.client() as client,
        client.stream("POST", "/v1/chat/completions", json=chat("a")) as response,
    ):
        if response.headers.get("content-length") == "0":
            finished.set()
        for piece in response.iter_raw():
            if b"[DONE]" in piece:
                finished.set()
        finished.set()
        assert len(proxy.records()) == 1
    assert too_late == [False]


def test_a_share_of_the_requests_is_recorded(start_proxy, upstream):
    proxy = start_proxy(upstream.url, sample=0.4, chance=random.Random(3))
    chance = random.Random(3)
    wanted = [number for number in range(20) if chance.random() < 0.4]
    with proxy.client() as client:
        for number in range(20):
            client.post("/v1/chat/completions", json=chat(str(number)))
    recorded = [int(record["request"]["messages"][0]["content"]) for record in proxy.records()]
    assert 0 < len(wanted) < 20
    assert recorded == wanted
    assert proxy.health()["skipped"] == {"not sampled": 20 - len(wanted)}


def test_larger_requests_and_answers_are_served_but_not_recorded(start_proxy, upstream):
    proxy = start_proxy(upstream.url, max_body_bytes=1000)

    async def respond(request):
        return JSONResponse(answer("y" * int(request.headers["x-size"])))

    upstream.answer = respond
    assert proxy.ask(chat("x" * 2000), headers={"x-size": "1"}).status_code == 200
    assert json.loads(upstream.seen[0][2]) == chat("x" * 2000)
    large = proxy.ask(chat("a"), headers={"x-size": "2000"})
    assert len(large.json()["choices"][0]["message"]["content"]) == 2000
    proxy.ask(chat("b"), headers={"x-size": "1"})
    assert [record["request"] for record in proxy.records()] == [chat("b")]
    health = proxy.health()
    assert health["skipped"] == {"request too large": 1, "answer too large": 1}
    assert health["held_bytes"] == 0


@pytest.mark.parametrize("kind", ["text", "one line", "fields", "calls"])
def test_what_is_kept_of_a_huge_stream_is_bounded(start_proxy, upstream, kind):
    proxy = start_proxy(upstream.url, max_body_bytes=100_000)
    pieces = {
        "text": [delta(content="x" * 1000)] * 500,
        "one line": [b"data: " + b"x" * 1000] * 500,
        "fields": [delta(**{f"f{n}": ""}) for n in range(500)],
        "calls": [delta(tool_calls=[{"index": n, "id": "x"}]) for n in range(500)],
    }[kind]
    held, received = [], []
    upstream.answer = streaming(pieces)
    with (
        proxy.client() as client,
        client.stream("POST", "/v1/chat/completions", json=chat("a")) as response,
    ):
        for piece in response.iter_raw():
            received.append(piece)
            held.append(proxy.recorder.budget.held_bytes)
    assert b"".join(received) == b"".join(pieces)
    assert max(held) < 200_000
    assert proxy.health()["skipped"] == {"answer too large": 1}


def test_memory_for_all_requests_together_is_bounded(start_proxy, upstream):
    proxy = start_proxy(upstream.url, max_held_bytes=1000)
    proxy.ask(chat("x" * 2000))
    proxy.ask(chat("a"))
    assert [record["request"] for record in proxy.records()] == [chat("a")]
    health = proxy.health()
    assert (health["skipped"], health["held_bytes"]) == ({"too much in flight": 1}, 0)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"a"', b"\xff\xfe", b"[" * 100_000])
def test_a_request_that_is_no_object_is_served_but_not_recorded(proxy, upstream, body):
    with proxy.client() as client:
        assert client.post("/v1/chat/completions", content=body).json() == answer("hi")
    assert proxy.health()["skipped"] == {"request is no JSON object": 1}


@pytest.mark.parametrize("text", ["\\ud800", "\\u2028 \\u0000", "NaN"])
def test_every_line_is_plain_json_whatever_the_texts_hold(proxy, upstream, text):
    with proxy.client() as client:
        client.post("/v1/completions", content=b'{"prompt": "' + text.encode() + b'"}')
    (line,) = proxy.lines()
    assert line.isascii()
    assert json.loads(line)["request"] == json.loads(f'{{"prompt": "{text}"}}')


def test_a_request_that_cannot_be_recorded_is_served_and_counted(proxy, upstream):
    with proxy.client() as client:
        response = client.post("/v1/completions", content=b'{"temperature": NaN}')
    assert response.status_code == 200
    health = proxy.health()
    assert health["skipped"] == {"fault of the recorder": 1}
    assert "ValueError" in health["last_error"]
    proxy.ask()
    assert len(proxy.records()) == 1
