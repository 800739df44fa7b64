"""Requests and files that are refused."""

import os
import socket
import stat
from contextlib import suppress

import pytest
from fake_upstream import PATIENCE_S, answer, chat

from specdec.common.files import Journal, whole_folder
from specdec.proxy.recorder import RecordFiles
from specdec.proxy.server import hosts_of

POST = "POST /v1/completions HTTP/1.1\r\nHost: x\r\n"


def raw(proxy, head, body=b"", close=True):
    """The status line, or nothing, that bytes get which no decent client would send."""
    host, port = proxy.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), PATIENCE_S)
    with connection, suppress(OSError):  # it may hang up before all is sent
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


@pytest.mark.parametrize("path", OUTSIDE.split())
def test_a_path_outside_of_the_root_is_not_passed_on(proxy, upstream, path):
    line = raw(proxy, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b" 400 " in line
    assert upstream.seen == []


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *(("localhost:8800", 200), ("LOCALHOST:8800", 200), ("127.0.0.1:8800", 200)),
        *(("[::1]:8800", 200), ("127.0.0.2:8800", 421), ("localhost", 421), ("localhost:80", 421)),
        *(("evil.example:8800", 421), ("localhost.evil.example:8800", 421), ("", 421)),
        *(("localhost:8800\r\nHost: evil.example", 400), ("localhost:8800, evil", 421)),
        *(("localhost:8800@evil", 421), ("user@localhost:8800", 421)),
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/health"])
def test_only_its_own_hosts_are_answered(start_proxy, upstream, host, status, path):
    proxy = start_proxy(upstream.url, hosts=hosts_of("127.0.0.1", 8800))
    line = raw(proxy, f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n", close=False)
    assert f" {status} ".encode() in line
    assert bool(upstream.seen) == (status == 200)


def test_the_port_may_be_left_out_where_it_is_the_usual_one():
    assert {"localhost", "127.0.0.1:80"} <= hosts_of("127.0.0.1", 80)
    assert "[::2]:1" in hosts_of("::2", 1)


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
def test_a_hostile_request_reaches_nobody_and_the_next_one_is_served(proxy, upstream, head, body):
    line = raw(proxy, head, body)
    assert not line or line.split()[1][:1] == b"4"
    assert [method for method, _, _ in upstream.seen if method in ("TRACE", "CONNECT", "GET")] == []
    assert proxy.lines() == []
    assert proxy.ask(chat("a")).json() == answer("hi")


def test_a_length_beside_chunks_is_not_passed_on(proxy, upstream):
    head = f"{POST}Content-Length: 4\r\nTransfer-Encoding: chunked"
    body = b"2\r\n{}\r\n0\r\n\r\nGET /admin HTTP/1.1\r\n\r\n"
    raw(proxy, head + "\r\nConnection: close\r\n\r\n", body)
    assert [(method, body) for method, _, body in upstream.seen] in ([], [("POST", b"{}")])


def test_an_upgrade_is_passed_on_as_a_plain_request(proxy, upstream):
    head = "GET /v1/x HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    assert b" 200 " in raw(proxy, head, close=False)
    assert b"upgrade" not in dict(upstream.seen[0][1]["headers"])


@pytest.fixture
def open_umask():
    before = os.umask(0)
    yield
    os.umask(before)


def modes(folder):
    found = {path: stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.rglob("*")]}
    return {mode for path, mode in found.items() if mode != (0o700 if path.is_dir() else 0o600)}


def test_collections_are_their_owners_alone_whatever_the_umask(tmp_path, open_umask):
    with whole_folder(tmp_path / "a" / "b" / "collected", private=True) as partial:
        (partial / "part").mkdir()
        (partial / "part" / "data").write_text("x")
    Journal(tmp_path / "c" / "answers" / "journal.jsonl", {}).close()
    files = RecordFiles(tmp_path / "d" / "recorded", 100, 100)
    files.append(b"{}\n")
    files.close()
    assert [modes(tmp_path / name) for name in "acd"] == [set(), set(), set()]


@pytest.mark.parametrize("name", ["requests-00001.jsonl", ".lock"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe"])
def test_a_recording_is_not_written_through_a_link_or_a_pipe(tmp_path, name, kind):
    folder, other = tmp_path / "recorded", tmp_path / "other"
    folder.mkdir()
    if kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to(other)
    if kind == "link":
        other.write_text("precious")
    with pytest.raises(OSError, match="is a link or no regular file"):
        RecordFiles(folder, 100, 100).append(b"{}\n")
    assert not other.exists() or other.read_text() == "precious"


def test_a_link_that_takes_the_place_of_the_file_gets_no_lines(tmp_path):
    files = RecordFiles(tmp_path, 100, 100)
    files.append(b"{}\n")
    files.path.rename(tmp_path / "taken")
    files.path.symlink_to(tmp_path / "taken")
    files.append(b"[]\n")
    files.close()
    assert (tmp_path / "taken").read_text() == "{}\n"
    assert (tmp_path / "requests-00002.jsonl").read_text() == "[]\n"
