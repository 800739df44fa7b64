"""Records of what passes: their content, their limits, and how `specdec collect` reads them."""

import asyncio
import errno
import gzip
import json
import random
import threading
from functools import partial

import anyio
import pytest
from fake_upstream import PATIENCE_S, answer, chat, content_of, delta, event, json_answer, streaming
from starlette.responses import Response, StreamingResponse

from specdec.common.messages import NoQueryError, find_queries
from specdec.common.metrics import Metrics
from specdec.data.queries import open_source
from specdec.proxy.records import Record

DONE = event("[DONE]")


def only(proxy):
    (record,) = proxy.records()
    return Record(**record)


def skipped(proxy):
    return proxy.health()["skipped"]


def test_stream_is_recorded_joined(proxy, upstream):
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
            DONE,
        ]
    )
    proxy.ask(chat("a", stream=True))
    record = only(proxy)
    function = {"name": "f", "arguments": '{"a": 1}'}
    message = {
        "role": "assistant",
        "content": "two words",
        "reasoning_content": "hm",
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": function},
            {"id": "call_2", "function": {"name": "g"}},
        ],
    }
    assert record.response == {
        "id": "c1",
        "object": "chat.completion",
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}],
        "usage": usage,
    }
    assert (record.complete, record.stream) == (True, True)
    assert 0 <= record.ttft_s <= record.latency_s


def test_metrics_count_what_is_recorded(start_proxy, upstream):
    metrics, usage = Metrics(), {"prompt_tokens": 4, "completion_tokens": 2}
    proxy = start_proxy(upstream.url, recording={"observer": metrics})
    seen = []

    async def stream(request):
        seen.append(metrics.registry.get_sample_value("specdec_num_requests_running"))
        pieces = [delta(content="two"), delta("stop"), event({"choices": [], "usage": usage}), DONE]
        return await streaming(pieces)(request)

    for respond in (stream, json_answer({"error": {"message": "no"}}, 400)):
        upstream.answer = respond
        proxy.ask(chat("a", stream=True))
    running = partial(metrics.registry.get_sample_value, "specdec_num_requests_running")
    proxy.eventually(lambda: running() == 0)
    assert seen == [1]
    ended = "specdec_request_success_total"
    for name, labels, count in (
        ("specdec_prompt_tokens_total", {}, 4),
        ("specdec_generation_tokens_total", {}, 2),
        ("specdec_time_to_first_token_seconds_count", {}, 1),
        ("specdec_e2e_request_latency_seconds_count", {}, 2),
        (ended, {"finished_reason": "stop"}, 1),
        (ended, {"finished_reason": "error"}, 1),
    ):
        assert metrics.registry.get_sample_value(name, labels) == count, name


def joined(text, reason=None):
    message = {"role": "assistant", "content": text}
    choices = [{"index": 0, "message": message, "finish_reason": reason}]
    return {"id": "c1", "object": "chat.completion", "model": "m", "choices": choices}


def part(index, text, reason=None):
    return event({"choices": [{"index": index, "text": text, "finish_reason": reason}]})


def other_line_ends():
    first, second = delta(content="a").decode(), delta("stop", content="b").decode()
    second = second.replace('"choices"', '\ndata:"choices"')
    return (first + ": ping\n\nevent: x\nid: 1\n" + second).replace("\n", "\r\n").encode()


GZIP = {"headers": {"content-encoding": "gzip"}}
GROWING = gzip.compress(delta(content="x" * 300_000) + delta("stop", content="end") + DONE)
OUT_OF_MEMORY = {"error": {"message": "out of memory"}}
TEXTS = [
    {"index": 0, "text": "aA", "finish_reason": "stop"},
    {"index": 1, "text": "bB", "finish_reason": "length"},
]
ANSWERS = {
    "stream": (streaming([other_line_ends(), b"data: [DONE]"]), joined("ab", "stop"), True),
    "growing": (streaming([GROWING], **GZIP), joined("x" * 300_000 + "end", "stop"), True),
    "texts": (  # without [DONE], as every choice has its reason
        streaming([part(1, "b"), part(0, "a"), part(0, "A", "stop"), part(1, "B", "length")]),
        {"object": "text_completion", "choices": TEXTS},
        True,
    ),
    "no end": (streaming([delta(content="a")]), joined("a"), False),
    "error": (
        streaming([delta(content="a"), event(OUT_OF_MEMORY), DONE]),
        joined("a") | OUT_OF_MEMORY,
        False,
    ),
    **{
        bad: (streaming([delta(content="a"), event(bad), DONE]), joined("a"), False)
        for bad in ("{not json", '{"choices": [null]}', "[1]")
    },
    "no gzip": (streaming([b"no gzip at all"], **GZIP), None, False),
    **{
        repr(body[:9]): (streaming([body], media_type="application/json"), None, False)
        for body in (b"<html>", b"[1]", b"\xff", b"", b"[" * 100_000)
    },
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answer_is_recorded_as_far_as_sound(proxy, upstream, name):
    upstream.answer, response, complete = ANSWERS[name]
    with proxy.stream() as served:
        assert served.status_code == 200
        list(served.iter_raw())
    assert (only(proxy).response, only(proxy).complete) == (response, complete)


RECORDED = (
    *("/v1/chat/completions", "/v1/completions", "/chat/completions", "/completions"),
    "/team/a/v1/chat/completions/?x=1",
)
OTHERS = ("/v1/embeddings", "/v1/completions/1", "/v1/mycompletions")


def test_only_completions_are_recorded(proxy, upstream):
    asked = [("POST", path) for path in (*RECORDED, *OTHERS)] + [("GET", RECORDED[0])]
    for method, path in asked:
        assert proxy.ask(path=path, method=method).status_code == 200
    paths = [record["path"] for record in proxy.records()]
    assert paths == [*RECORDED[:4], "/v1/chat/completions/"]
    assert skipped(proxy) == {}


def test_client_that_leaves_stops_the_upstream(proxy, upstream):
    async def run():
        try:
            yield delta(content="half")
            await anyio.sleep(PATIENCE_S)
        except asyncio.CancelledError:
            upstream.left.set()
            raise

    async def respond(request):
        return StreamingResponse(run(), media_type="text/event-stream")

    upstream.answer = respond
    with proxy.stream() as response:
        assert next(response.iter_raw())
    assert upstream.left.wait(PATIENCE_S)
    proxy.eventually(proxy.records)
    record = only(proxy)
    assert (record.complete, record.status, content_of(vars(record))) == (False, 200, "half")
    proxy.eventually(lambda: proxy.health()["running"] == 0)


def sent_by_hand(proxy, body, length):
    """A connection that has sent this much of a request whose body has that length."""
    connection = proxy.connect()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def test_client_that_leaves_early_is_recorded_too(proxy, upstream):
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
    assert (record.status, record.response, record.complete) == (None, None, False)


def test_client_that_never_asked_leaves_nothing(proxy, upstream):
    with sent_by_hand(proxy, b'{"messages"', 100):
        proxy.eventually(lambda: proxy.recorder.held_bytes)
    proxy.eventually(lambda: proxy.health()["running"] == 0)
    assert skipped(proxy) == {"client left before it had asked": 1}
    assert (proxy.health()["held_bytes"], proxy.lines()) == (0, [])


@pytest.mark.parametrize(
    ("pieces", "headers"),
    [
        ([delta(content="a"), DONE], {"content-type": "text/event-stream"}),
        ([b'{"a": 1', b"}"], {}),
        ([b'{"a": 1', b"}"], {"content-length": "8"}),
        ([], {"content-length": "0"}),
    ],
    ids=["[DONE]", "chunked", "with a length", "empty"],
)
def test_finished_answer_is_on_the_disk(start_proxy, upstream, pieces, headers):
    finished, too_late = threading.Event(), []

    def append(write, line):
        too_late.append(finished.wait(0.2))
        write(line)

    proxy = start_proxy(upstream.url, append=append, recording={"max_wait_s": PATIENCE_S})
    upstream.answer = streaming(pieces, media_type=None, headers=headers)
    with proxy.stream() as response:
        if not pieces:
            finished.set()
        for piece in response.iter_raw():
            if b"[DONE]" in piece:
                finished.set()
        finished.set()
        assert len(proxy.records()) == 1
    assert too_late == [False]


def test_share_of_the_requests_is_recorded(start_proxy, upstream):
    proxy = start_proxy(upstream.url, sample=0.4, recording={"chance": random.Random(3)})
    chance = random.Random(3)
    wanted = [number for number in range(20) if chance.random() < 0.4]
    for number in range(20):
        proxy.ask(chat(str(number)))
    recorded = [int(record["request"]["messages"][0]["content"]) for record in proxy.records()]
    assert recorded == wanted
    assert skipped(proxy) == {"not sampled": 20 - len(wanted)}


def test_larger_bodies_are_served_but_not_recorded(start_proxy, upstream):
    proxy = start_proxy(upstream.url, max_body="1000")
    assert proxy.ask(chat("x" * 2000)).json() == answer("hi")
    assert json.loads(upstream.seen[0][2]) == chat("x" * 2000)
    upstream.answer = json_answer(answer("y" * 2000))
    assert proxy.ask(chat("a")).json() == answer("y" * 2000)
    upstream.answer = json_answer(answer("y"))
    proxy.ask(chat("b"))
    assert only(proxy).request == chat("b")
    assert skipped(proxy) == {"request too large": 1, "answer too large": 1}
    assert proxy.health()["held_bytes"] == 0


@pytest.mark.parametrize("kind", ["text", "one line", "fields", "calls"])
def test_memory_for_a_huge_stream_is_bounded(start_proxy, upstream, kind):
    proxy = start_proxy(upstream.url, max_body="100000")
    pieces = {
        "text": [delta(content="x" * 1000)] * 500,
        "one line": [b"data: " + b"x" * 1000] * 500,
        "fields": [delta(**{f"f{n}": ""}) for n in range(500)],
        "calls": [delta(tool_calls=[{"index": n, "id": "x"}]) for n in range(500)],
    }[kind]
    held, received = [], []
    upstream.answer = streaming(pieces)
    with proxy.stream() as response:
        for piece in response.iter_raw():
            received.append(piece)
            held.append(proxy.recorder.held_bytes)
    assert b"".join(received) == b"".join(pieces)
    assert max(held) < 200_000
    assert skipped(proxy) == {"answer too large": 1}


def test_memory_for_all_requests_is_bounded(start_proxy, upstream):
    proxy = start_proxy(upstream.url, recording={"max_held_bytes": 1000})
    proxy.ask(chat("x" * 2000))
    proxy.ask(chat("a"))
    assert only(proxy).request == chat("a")
    assert skipped(proxy) == {"too much in flight": 1}
    assert proxy.health()["held_bytes"] == 0


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"a"', b"\xff\xfe", b"[" * 100_000])
def test_request_that_is_no_object_is_only_served(proxy, upstream, body):
    assert proxy.ask(content=body).json() == answer("hi")
    assert skipped(proxy) == {"request is no JSON object": 1}


@pytest.mark.parametrize("text", ["\\ud800", "\\u2028 \\u0000", "NaN"])
def test_every_line_is_plain_json(proxy, upstream, text):
    proxy.ask(content=b'{"prompt": "' + text.encode() + b'"}')
    (line,) = proxy.lines()
    assert line.isascii()
    assert json.loads(line)["request"] == json.loads(f'{{"prompt": "{text}"}}')


def test_unrecordable_request_is_served_and_counted(proxy, upstream):
    assert proxy.ask(content=b'{"temperature": NaN}').status_code == 200
    assert skipped(proxy) == {"fault of the recorder": 1}
    assert "ValueError" in proxy.health()["last_error"]
    proxy.ask()
    assert len(proxy.records()) == 1


def test_health_counts_what_was_recorded(proxy, upstream):
    for text in "ab":
        proxy.ask(chat(text))
        assert proxy.health()["recorded"] == len(proxy.records())
    assert proxy.health() == {
        "status": "ok",
        "upstream": {"url": upstream.url, "reachable": True, "health_status": 200},
        "recording": True,
        "why_not": None,
        "recorded": 2,
        "skipped": {},
        "bytes": sum(len(line) + 1 for line in proxy.lines()),
        "file": "requests-00001.jsonl",
        "running": 0,
        "held_bytes": 0,
        "last_error": None,
    }
    assert len(upstream.seen) == 3  # its own health was asked once


@pytest.mark.parametrize("status", [404, 503])
def test_upstream_that_answers_can_be_reached(proxy, upstream, status):
    upstream.answer = json_answer(None, status)
    state = {"url": upstream.url, "reachable": True, "health_status": status}
    assert proxy.health()["upstream"] == state


def test_full_disk_stops_recording_not_serving(start_proxy, upstream):
    full = threading.Event()

    def append(write, line):
        if full.is_set():
            raise OSError(errno.ENOSPC, "No space left on device")
        write(line)

    proxy = start_proxy(upstream.url, append=append)
    proxy.ask(chat("before"))
    full.set()
    for _ in range(3):
        assert proxy.ask(chat("lost")).json() == answer("hi")
    health = proxy.health()
    assert (health["status"], health["recording"]) == ("not recording", False)
    assert "No space left" in health["why_not"]
    assert "No space left" in health["last_error"]
    assert skipped(proxy) == {"disk cannot be written": 3}
    assert sum("No space left" in line for line in proxy.said) == 1
    full.clear()
    proxy.ask(chat("after"))
    health = proxy.health()
    assert (health["status"], health["recording"], health["why_not"]) == ("ok", True, None)
    assert proxy.said[-1] == "recording goes on"
    texts = [record["request"]["messages"][0]["content"] for record in proxy.records()]
    assert texts == ["before", "after"]


def test_total_stops_recording_not_serving(start_proxy, upstream):
    proxy = start_proxy(upstream.url, max_total="700")
    assert [proxy.ask(chat("a")).json() for _ in range(4)] == [answer("hi")] * 4
    health = proxy.health()
    assert health["recorded"] + health["skipped"]["--max-total reached"] == 4
    assert 0 < health["recorded"] < 4
    assert health["recording"] is False
    assert "700 are on the disk" in health["why_not"]
    assert sum("recording stopped" in line for line in proxy.said) == 1


def test_hanging_disk_does_not_hang_the_client(start_proxy, upstream):
    goes_on = threading.Event()

    def append(write, line):
        assert goes_on.wait(PATIENCE_S)
        write(line)

    proxy = start_proxy(upstream.url, append=append, recording={"max_wait_s": 0.01})
    assert proxy.ask(chat("a")).json() == answer("hi")
    assert proxy.records() == []
    assert proxy.health()["held_bytes"] > 0
    goes_on.set()
    proxy.eventually(lambda: proxy.health()["recorded"] == 1)
    assert (proxy.health()["held_bytes"], len(proxy.records())) == (0, 1)


def test_removed_folder_stops_recording_not_serving(start_proxy, upstream):
    proxy = start_proxy(upstream.url)
    proxy.ask(chat("a"))
    for path in proxy.folder.iterdir():
        path.unlink()
    proxy.folder.rmdir()
    assert proxy.ask(chat("b")).json() == answer("hi")
    assert "No such file" in proxy.health()["why_not"]
    proxy.folder.mkdir()
    proxy.ask(chat("c"))
    assert only(proxy).request == chat("c")


TURNS = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "Grüße?"}]
TWO = [delta(content="one"), delta(content=" two")]
CHAT, TEXT = {"model": "m", "messages": TURNS}, {"model": "m", "prompt": "a"}
FAILED = {"error": {"message": "no"}}


@pytest.mark.parametrize(
    ("body", "respond", "query"),
    [
        (CHAT, streaming([*TWO, DONE]), (tuple(TURNS), "one two")),
        (CHAT, streaming(TWO), (tuple(TURNS), None)),
        (TEXT, json_answer({"choices": [{"index": 0, "text": "b"}]}), ("a", "b")),
        (TEXT, json_answer(FAILED, 429), ("a", None)),
        (TEXT, json_answer(FAILED, 500), ("a", None)),
        (TEXT, json_answer(FAILED, 400), "refused"),  # by the server: it is no query
    ],
    ids=["stream", "no end", "text", "too many", "broken", "wrong"],
)
def test_record_is_collected_with_its_answer(proxy, upstream, body, respond, query):
    upstream.answer = respond
    proxy.ask(body, "/v1/chat/completions" if body is CHAT else "/v1/completions")
    assert [found(record.value) for record in open_source(str(proxy.folder))] == [query]


def found(value):
    try:
        (asked,) = find_queries(value)
    except NoQueryError as error:
        return error.reason
    return asked.messages or asked.text, asked.answer
