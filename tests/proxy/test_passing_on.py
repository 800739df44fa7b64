"""The client and the upstream see each other through the proxy."""

import gzip
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import anyio
import httpx
import pytest
from fake_upstream import (
    answer,
    chat,
    content_of,
    delta,
    event,
    json_answer,
    just,
    raw_answer,
    streaming,
)
from starlette.responses import JSONResponse, Response, StreamingResponse

from specdec.proxy.server import end_to_end, hosts_of, listen


def test_first_chunk_arrives_before_the_last_is_sent(proxy, upstream):
    arrived = threading.Event()
    first, last = delta(content="one"), delta(content="two") + event("[DONE]")
    upstream.answer = streaming([first, arrived, last])
    with proxy.stream(chat("a", stream=True)) as response:
        pieces = response.iter_raw()
        assert next(pieces) == first
        arrived.set()
        assert b"".join(pieces) == last


@pytest.mark.parametrize("cut", [1, 7, 1000])
def test_stream_passes_byte_for_byte_however_cut(proxy, upstream, cut):
    whole = b": ping\r\n\r\n" + delta(content="Grüße \U0001f600") + b"event: x\nid: 1\n\n"
    whole += delta("stop") + event("[DONE]") + b"\ntrailing"
    upstream.answer = streaming([whole[i : i + cut] for i in range(0, len(whole), cut)])
    response = proxy.ask(chat("a", stream=True))
    assert response.content == whole
    assert response.headers["content-type"].startswith("text/event-stream")
    (record,) = proxy.records()
    assert content_of(record) == "Grüße \U0001f600"


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_any_method_and_path_passes_as_written(proxy, upstream, method):
    target = "/v1/models/a%2Fb/c%20d;x?q=%26&q=2&empty="
    given = {"content": b"\x00body\xff", "extensions": {"target": target.encode()}}
    with proxy.client() as client:
        assert client.request(method, "/", **given).status_code == 200
    ((seen_method, scope, body),) = upstream.seen
    path, _, query = target.encode().partition(b"?")
    assert (seen_method, scope["raw_path"], scope["query_string"]) == (method, path, query)
    assert body == b"\x00body\xff"


def test_headers_pass_except_those_of_one_hop(proxy, upstream):
    response = JSONResponse(answer("hi"), 201)
    added = b"set-cookie a=1,set-cookie b=2,x-request-id 7,connection x-inner,x-inner 1"
    added += b",keep-alive timeout=5"
    response.raw_headers += [tuple(each.split()) for each in added.split(b",")]
    upstream.answer = just(response)
    of_one_hop = {"connection": "x-private", "x-private": "1", "te": "trailers"}
    sent = {"authorization": "Bearer sk-1234567890", "x-tag": "t", "user-agent": "curl/8"}
    sent |= {**of_one_hop, "proxy-authorization": "Basic eDp5"}
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


def test_compressed_answer_passes_and_is_recorded_plain(proxy, upstream):
    body = gzip.compress(delta(content="one") + delta("stop", content=" two") + event("[DONE]"))
    upstream.answer = streaming([body[:20], body[20:]], headers={"content-encoding": "gzip"})
    accepted = {"accept-encoding": "br, gzip;q=0.8, zstd"}
    with proxy.stream(headers=accepted) as response:
        assert b"".join(response.iter_raw()) == body
        assert response.headers["content-encoding"] == "gzip"
    assert dict(upstream.seen[0][1]["headers"])[b"accept-encoding"] == b"gzip;q=0.8"
    (record,) = proxy.records()
    assert content_of(record) == "one two"


def test_client_chooses_codings_of_unrecorded_answers(proxy, upstream):
    proxy.ask(path="/v1/models", method="GET", headers={"accept-encoding": "br, zstd"})
    assert dict(upstream.seen[0][1]["headers"])[b"accept-encoding"] == b"br, zstd"


def test_unknown_coding_is_served_but_not_recorded(proxy, upstream):
    upstream.answer = streaming([b"\x01\x02"], headers={"content-encoding": "br"})
    with proxy.stream() as response:
        assert b"".join(response.iter_raw()) == b"\x01\x02"
    assert proxy.health()["skipped"] == {"unknown content coding": 1}


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500, 503])
def test_upstream_errors_pass_with_status_headers_body(proxy, upstream, status):
    upstream.answer = json_answer({"error": {"message": "no"}}, status, **{"retry-after": "3"})
    response = proxy.ask()
    assert (response.status_code, response.json()) == (status, {"error": {"message": "no"}})
    assert response.headers["retry-after"] == "3"
    (record,) = proxy.records()
    assert (record["status"], record["response"]) == (status, {"error": {"message": "no"}})


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 204), ("GET", 304)])
def test_answers_without_a_body_come_to_their_end(proxy, upstream, method, status):
    upstream.answer = just(Response(None if status != 200 else b"12345", status))
    with proxy.client() as client:
        for _ in range(2):  # twice: the connection is still of use
            response = client.request(method, "/v1/models")
            assert (response.status_code, response.content) == (status, b"")
            if method == "HEAD":
                assert response.headers["content-length"] == "5"


def test_request_without_a_length_is_passed_on(proxy, upstream):
    content = iter([b'{"messages"', b': [], "n": 1}'])
    assert proxy.ask(content=content).status_code == 200
    _, scope, body = upstream.seen[0]
    assert body == b'{"messages": [], "n": 1}'
    assert b"content-length" not in dict(scope["headers"])
    assert proxy.records()[0]["request"] == {"messages": [], "n": 1}


def test_dead_upstream_gives_502_in_openai_form(start_proxy):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    proxy = start_proxy(f"http://127.0.0.1:{port}", login="me:topsecret9")
    response = proxy.ask()
    assert response.status_code == 502
    error = response.json()["error"]
    assert error["code"] == "upstream_unreachable"
    assert error.keys() == {"message", "type", "param", "code"}
    health = proxy.ask(path="/health", method="GET")
    assert health.status_code == 503
    state = health.json()
    assert state["skipped"] == {"no answer from upstream": 1}
    assert (state["status"], state["recording"]) == ("upstream unreachable", True)
    assert state["upstream"]["reachable"] is False
    assert "topsecret9" not in response.text + "".join(proxy.said) + health.text


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
def test_client_sees_the_upstream_break_off(proxy, upstream, headers, body, content):
    upstream.answer = raw_answer(
        {**START, "headers": headers},
        {"type": "http.response.body", "body": body, "more_body": True},
    )
    got = bytearray()
    with proxy.stream() as response, pytest.raises(httpx.RemoteProtocolError):
        list(map(got.extend, response.iter_raw()))
    assert got == body
    proxy.eventually(proxy.records)
    (record,) = proxy.records()
    assert record["complete"] is False
    assert record["request"] == chat("a")
    if content:
        assert content_of(record) == content
    assert any("broke off an answer" in line for line in proxy.said)


def test_connections_send_every_piece_at_once():
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_concurrent_streams_do_not_mix(proxy, upstream):
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
    asked = [record["request"]["messages"][0]["content"] for record in proxy.records()]
    assert sorted(asked) == sorted(texts)
    assert [content_of(record) for record in proxy.records()] == [text * 10 for text in asked]


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
def test_upstream_path_is_put_before_requests(start_proxy, upstream, root, path, reached):
    proxy = start_proxy(upstream.url + root)
    proxy.ask(path=path, method="GET")
    assert upstream.seen[0][1]["raw_path"] == reached.encode()


@pytest.mark.parametrize(
    ("login", "sent"), [("me:p@ss", b"Basic bWU6cEBzcw=="), ("key-1", b"Bearer key-1")]
)
def test_login_is_sent_where_the_client_has_none(start_proxy, upstream, login, sent):
    proxy = start_proxy(upstream.url, login=login)
    proxy.ask()
    proxy.ask(headers={"authorization": "Bearer mine"})
    seen = [dict(scope["headers"])[b"authorization"] for _, scope, _ in upstream.seen]
    assert seen == [sent, b"Bearer mine"]


POST = "POST /v1/completions HTTP/1.1\r\nHost: x\r\n"


def raw(proxy, head, body=b"", close=True):
    """The status line, or nothing, that bytes get which no decent client would send."""
    with proxy.connect() as connection, suppress(OSError):  # it may hang up before all is sent
        connection.sendall(head.encode("latin-1") + body)
        if close:
            connection.shutdown(socket.SHUT_WR)
        return connection.makefile("rb").readline()
    return b""


OUTSIDE = r"""
/v1/../../admin /v1/.. /.. /v1/./x /v1/%2e%2e/admin /v1/%2E./admin //admin
/v1/%252e%252e/admin /v1/%25252e%25252e/x /v1/..%2f..%2fadmin /v1/%2e%2e%2fadmin
/v1\..\admin /v1/..\admin /v1/%5c..%5cadmin /v1//admin /v1/%2fadmin *
/v1/..;/admin /v1/..;x=1/admin /v1/%c0%ae%c0%ae/admin /v1/%ef%bc%8e%ef%bc%8e/admin
/v1/..%00/x /v1/x%0d%0aHost:%20evil /v1/%2e%2e%3b/admin
http://evil/v1/models evil:443 /v1/%e2%80%a5/admin /v1/%20..%20/x
"""


def test_path_outside_the_root_is_refused(proxy, upstream):
    lines = {p: raw(proxy, f"GET {p} HTTP/1.1\r\nHost: x\r\n\r\n") for p in OUTSIDE.split()}
    assert [path for path, line in lines.items() if b" 400 " not in line] == []
    assert upstream.seen == []


HOSTS = {
    200: "localhost:8800|LOCALHOST:8800|127.0.0.1:8800|[::1]:8800",
    421: "127.0.0.2:8800|localhost|localhost:80|evil.example:8800||localhost.evil.example:8800|"
    "localhost:8800, evil|localhost:8800@evil|user@localhost:8800",
    400: "localhost:8800\r\nHost: evil.example",
}


@pytest.mark.parametrize("path", ["/v1/models", "/health"])
@pytest.mark.parametrize("status", HOSTS)
def test_only_its_own_hosts_are_answered(start_proxy, upstream, status, path):
    proxy = start_proxy(upstream.url, hosts=hosts_of("127.0.0.1", 8800))
    for host in HOSTS[status].split("|"):
        line = raw(proxy, f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n", close=False)
        assert f" {status} ".encode() in line, host
    assert bool(upstream.seen) == (status == 200)


def test_usual_port_may_be_left_out():
    assert {"localhost", "127.0.0.1:80"} <= hosts_of("127.0.0.1", 80)
    assert "[0::1]:1" in hosts_of("0::1", 1)
    assert hosts_of("::2", 1) is hosts_of("example.com", 1) is None


@pytest.mark.parametrize(
    ("head", "body"),
    [
        ("GET / HTTP/1.1\r\nHost: x\r\nA: " + "a" * 200_000 + "\r\n\r\n", b""),
        (f"{POST}Content-Length: 5\r\nContent-Length: 6\r\n\r\n", b"{}"),
        (f"{POST}Content-Length: -1\r\n\r\n", b"{}"),
        (f"{POST}Transfer-Encoding: x\r\n\r\n", b"{}"),
        (f"{POST}Transfer-Encoding: chunked\r\n\r\n", b"5\r\n{}"),
        (f"{POST}Transfer-Encoding: chunked\r\n\r\n", b"zz\r\n"),
        (f"{POST}A : x\r\n\r\n", b""),
        (f"{POST}B\r\n\r\n", b""),
        ("TRACE /v1/models HTTP/1.1\r\nHost: x\r\n\r\n", b""),
        ("CONNECT evil:443 HTTP/1.1\r\nHost: x\r\n\r\n", b""),
        ("\x16\x03\x01\x02\x00", b"\x01\x00"),
    ],
    ids=lambda given: repr(given)[:40],
)
def test_hostile_request_reaches_nobody(proxy, upstream, head, body):
    line = raw(proxy, head, body)
    assert not line or line.split()[1][:1] == b"4"
    assert [method for method, _, _ in upstream.seen if method in ("TRACE", "CONNECT", "GET")] == []
    assert proxy.lines() == []
    assert proxy.ask(chat("a")).json() == answer("hi")


def test_length_beside_a_transfer_coding_is_dropped():
    headers = [(b"Content-Length", b"5"), (b"Transfer-Encoding", b"chunked"), (b"A", b"1")]
    assert end_to_end(headers) == [(b"a", b"1")]


def test_length_beside_chunks_is_not_passed_on(proxy, upstream):
    head = f"{POST}Content-Length: 4\r\nTransfer-Encoding: chunked"
    body = b"2\r\n{}\r\n0\r\n\r\nGET /admin HTTP/1.1\r\n\r\n"
    raw(proxy, head + "\r\nConnection: close\r\n\r\n", body)
    assert [(method, body) for method, _, body in upstream.seen] in ([], [("POST", b"{}")])


def test_upgrade_is_passed_on_as_plain_request(proxy, upstream):
    head = "GET /v1/x HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    assert b" 200 " in raw(proxy, head, close=False)
    assert b"upgrade" not in dict(upstream.seen[0][1]["headers"])
