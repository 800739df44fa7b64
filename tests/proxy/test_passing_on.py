"""What the client and the upstream see of each other through the proxy."""

import gzip
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import anyio
import httpx
import pytest
from fake_upstream import answer, chat, delta, event, raw_answer, streaming
from starlette.responses import JSONResponse, Response, StreamingResponse

from specdec.proxy.exchange import end_to_end
from specdec.proxy.server import listen


def test_the_first_chunk_arrives_before_the_upstream_has_sent_the_last(proxy, upstream):
    arrived = threading.Event()
    first, last = delta(content="one"), delta(content="two") + event("[DONE]")
    upstream.answer = streaming([first, arrived, last])
    with (
        proxy.client() as client,
        client.stream("POST", "/v1/chat/completions", json=chat("a", stream=True)) as response,
    ):
        pieces = response.iter_raw()
        assert next(pieces) == first
        arrived.set()
        assert b"".join(pieces) == last


@pytest.mark.parametrize("cut", [1, 7, 1000])
def test_a_stream_passes_byte_for_byte_however_it_is_cut(proxy, upstream, cut):
    whole = b": ping\r\n\r\n" + delta(content="Grüße \U0001f600") + b"event: x\nid: 1\n\n"
    whole += delta("stop") + event("[DONE]") + b"\ntrailing"
    upstream.answer = streaming([whole[i : i + cut] for i in range(0, len(whole), cut)])
    response = proxy.ask(chat("a", stream=True))
    assert response.content == whole
    assert response.headers["content-type"].startswith("text/event-stream")
    (record,) = proxy.records()
    assert record["response"]["choices"][0]["message"]["content"] == "Grüße \U0001f600"


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_any_method_and_path_is_passed_on_as_it_is_written(proxy, upstream, method):
    target = "/v1/models/a%2Fb/c%20d;x?q=%26&q=2&empty="
    with proxy.client() as client:
        request = httpx.Request(
            method, proxy.url, content=b"\x00body\xff", extensions={"target": target.encode()}
        )
        assert client.send(request).status_code == 200
    ((seen_method, scope, body),) = upstream.seen
    path, _, query = target.encode().partition(b"?")
    assert (seen_method, scope["raw_path"], scope["query_string"]) == (method, path, query)
    assert body == b"\x00body\xff"


def test_headers_pass_except_those_of_one_hop(proxy, upstream):
    async def respond(request):
        response = JSONResponse(answer("hi"), 201)
        for name, value in [
            ("set-cookie", "a=1"),
            ("set-cookie", "b=2"),
            ("x-request-id", "7"),
            ("connection", "x-inner"),
            ("x-inner", "1"),
            ("keep-alive", "timeout=5"),
        ]:
            response.raw_headers.append((name.encode(), value.encode()))
        return response

    upstream.answer = respond
    sent = {
        "authorization": "Bearer sk-1234567890",
        "x-tag": "t",
        "connection": "x-private",
        "x-private": "1",
        "proxy-authorization": "Basic eDp5",
        "te": "trailers",
        "user-agent": "curl/8",
    }
    response = proxy.ask(headers=sent)
    headers = dict(upstream.seen[0][1]["headers"])
    assert headers[b"authorization"] == b"Bearer sk-1234567890"
    assert (headers[b"x-tag"], headers[b"user-agent"]) == (b"t", b"curl/8")
    assert headers[b"host"] == upstream.url.removeprefix("http://").encode()
    assert not headers.keys() & {b"x-private", b"proxy-authorization", b"te", b"connection"}
    assert response.status_code == 201
    assert response.headers.get_list("set-cookie") == ["a=1", "b=2"]
    assert response.headers["x-request-id"] == "7"
    assert not set(response.headers) & {"x-inner", "keep-alive", "connection", "server", "date"}


def test_a_compressed_answer_stays_compressed_and_is_recorded_in_plain(proxy, upstream):
    body = gzip.compress(delta(content="one") + delta("stop", content=" two") + event("[DONE]"))
    upstream.answer = streaming([body[:20], body[20:]], headers={"content-encoding": "gzip"})
    accepted = {"accept-encoding": "br, gzip;q=0.8, zstd"}
    with (
        proxy.client() as client,
        client.stream("POST", "/v1/chat/completions", json=chat("a"), headers=accepted) as response,
    ):
        assert b"".join(response.iter_raw()) == body
        assert response.headers["content-encoding"] == "gzip"
    assert dict(upstream.seen[0][1]["headers"])[b"accept-encoding"] == b"gzip;q=0.8"
    (record,) = proxy.records()
    assert record["response"]["choices"][0]["message"]["content"] == "one two"


def test_a_length_beside_a_transfer_coding_is_not_passed_on():
    headers = [(b"Content-Length", b"5"), (b"Transfer-Encoding", b"chunked"), (b"A", b"1")]
    assert end_to_end(headers) == [(b"a", b"1")]


def test_codings_of_what_is_not_recorded_are_left_to_the_client(proxy, upstream):
    with proxy.client() as client:
        client.get("/v1/models", headers={"accept-encoding": "br, zstd"})
    assert dict(upstream.seen[0][1]["headers"])[b"accept-encoding"] == b"br, zstd"


def test_an_answer_in_an_unknown_coding_is_served_but_not_recorded(proxy, upstream):
    upstream.answer = streaming([b"\x01\x02"], headers={"content-encoding": "br"})
    with (
        proxy.client() as client,
        client.stream("POST", "/v1/completions", json={"prompt": "a"}) as response,
    ):
        assert b"".join(response.iter_raw()) == b"\x01\x02"
    assert proxy.health()["skipped"] == {"unknown content coding": 1}


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500, 503])
def test_errors_of_the_upstream_pass_with_status_headers_and_body(proxy, upstream, status):
    async def refuse(request):
        return Response(b'{"error": {"message": "no"}}', status, {"retry-after": "3"})

    upstream.answer = refuse
    response = proxy.ask()
    assert (response.status_code, response.content) == (status, b'{"error": {"message": "no"}}')
    assert response.headers["retry-after"] == "3"
    (record,) = proxy.records()
    assert (record["status"], record["response"]) == (status, {"error": {"message": "no"}})


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 204), ("GET", 304)])
def test_answers_without_a_body_come_to_their_end(proxy, upstream, method, status):
    async def respond(request):
        return Response(None if status != 200 else b"12345", status)

    upstream.answer = respond
    with proxy.client() as client:
        for _ in range(2):  # twice: the connection is still of use
            response = client.request(method, "/v1/models")
            assert (response.status_code, response.content) == (status, b"")
            if method == "HEAD":
                assert response.headers["content-length"] == "5"


def test_a_request_body_without_a_length_is_passed_on(proxy, upstream):
    with proxy.client() as client:
        response = client.post(
            "/v1/chat/completions", content=iter([b'{"messages"', b': [], "n": 1}'])
        )
    assert response.status_code == 200
    _, scope, body = upstream.seen[0]
    assert body == b'{"messages": [], "n": 1}'
    assert b"content-length" not in dict(scope["headers"])
    assert proxy.records()[0]["request"] == {"messages": [], "n": 1}


def test_an_upstream_that_is_down_gives_502_in_the_form_of_openai(start_proxy, free_port):
    proxy = start_proxy(f"http://127.0.0.1:{free_port}", login="me:topsecret9")
    response = proxy.ask()
    assert response.status_code == 502
    error = response.json()["error"]
    assert error["code"] == "upstream_unreachable"
    assert error.keys() == {"message", "type", "param", "code"}
    assert proxy.health()["skipped"] == {"no answer from upstream": 1}
    assert "topsecret9" not in response.text + "".join(proxy.said) + str(proxy.health())


START = {"type": "http.response.start", "status": 200}
SSE_TYPE = [(b"content-type", b"text/event-stream")]


@pytest.mark.parametrize(
    ("headers", "body", "content"),
    [
        (SSE_TYPE, delta(content="half"), "half"),
        ([*SSE_TYPE, (b"content-length", b"9999")], delta(content="half"), "half"),
        ([(b"content-type", b"application/json"), (b"content-length", b"99")], b'{"id"', None),
    ],
    ids=["chunked", "with a length", "JSON"],
)
def test_the_client_sees_an_upstream_that_dies_as_it_died(proxy, upstream, headers, body, content):
    upstream.answer = raw_answer(
        {**START, "headers": headers},
        {"type": "http.response.body", "body": body, "more_body": True},
    )
    got = bytearray()
    with (
        proxy.client() as client,
        client.stream("POST", "/v1/chat/completions", json=chat("a")) as response,
        pytest.raises(httpx.RemoteProtocolError),
    ):
        list(map(got.extend, response.iter_raw()))
    assert got == body
    proxy.eventually(proxy.records)
    (record,) = proxy.records()
    assert record["complete"] is False
    assert record["request"] == chat("a")
    if content:
        assert record["response"]["choices"][0]["message"]["content"] == content
    assert any("broke off an answer" in line for line in proxy.said)


def test_connections_send_every_piece_at_once():
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_many_streams_at_once_do_not_mix(proxy, upstream):
    async def echo(request):
        text = (await request.json())["messages"][0]["content"]

        async def run():
            for _ in range(10):
                yield delta(content=text)
                await anyio.sleep(0)
            yield event("[DONE]")

        return StreamingResponse(run(), media_type="text/event-stream")

    upstream.answer = echo
    texts = [f"<{number}>" for number in range(60)]
    with ThreadPoolExecutor(30) as pool:
        got = list(pool.map(lambda text: proxy.ask(chat(text)).content, texts))
    assert got == [delta(content=text) * 10 + event("[DONE]") for text in texts]
    recorded = {
        record["request"]["messages"][0]["content"]: record["response"]["choices"][0]["message"]
        for record in proxy.records()
    }
    assert {text: message["content"] for text, message in recorded.items()} == {
        text: text * 10 for text in texts
    }


@pytest.mark.parametrize(
    ("root", "path", "reached"),
    [
        ("/api", "/v1/models", "/api/v1/models"),
        ("/v1/", "/v1/models", "/v1/models"),
        ("/v1", "/models", "/v1/models"),
        ("/v1", "/v1x", "/v1/v1x"),
        ("", "/models", "/models"),
    ],
)
def test_the_path_of_the_upstream_url_is_put_before(start_proxy, upstream, root, path, reached):
    proxy = start_proxy(upstream.url + root)
    with proxy.client() as client:
        client.get(path)
    assert upstream.seen[0][1]["raw_path"] == reached.encode()


@pytest.mark.parametrize(
    ("login", "sent"), [("me:p@ss", b"Basic bWU6cEBzcw=="), ("key-1", b"Bearer key-1")]
)
def test_the_login_is_used_where_the_client_sends_none(start_proxy, upstream, login, sent):
    proxy = start_proxy(upstream.url, login=login)
    proxy.ask()
    proxy.ask(headers={"authorization": "Bearer mine"})
    seen = [dict(scope["headers"])[b"authorization"] for _, scope, _ in upstream.seen]
    assert seen == [sent, b"Bearer mine"]
