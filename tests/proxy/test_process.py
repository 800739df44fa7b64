"""The command as a process of its own: killed, stopped, and started wrongly."""

import json
import re
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import anyio
import httpx
import pytest
from fake_upstream import PATIENCE_S, chat, delta, event, streaming
from starlette.responses import StreamingResponse
from typer.testing import CliRunner

from specdec.cli import app
from specdec.proxy.records import parse_size


@pytest.fixture
def start_process(tmp_path, upstream):
    running = []

    def start(*options):
        arguments = ["--upstream", upstream.url, "--out", str(tmp_path / "q"), "--port", "0"]
        process = subprocess.Popen(
            [sys.executable, "-m", "specdec", "collect", "proxy", *arguments, *options],
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        first = process.stderr.readline()
        return process, re.search(r"recording (http://127\.0\.0\.1:\d+) -> ", first)[1]

    yield start
    for process in running:
        process.kill()
        process.wait()
        process.stderr.close()


@contextmanager
def asking(url, text="a"):
    with (
        httpx.Client(base_url=url, timeout=PATIENCE_S, verify=False) as client,
        client.stream("POST", "/v1/chat/completions", json=chat(text, stream=True)) as response,
    ):
        yield response


def recorded(folder):
    lines = (folder / "q" / "requests-00001.jsonl").read_bytes().splitlines()
    return [json.loads(line)["request"]["messages"][0]["content"] for line in lines]


@pytest.mark.slow
def test_killed_proxy_loses_no_finished_request(start_process, upstream, tmp_path):
    hanging = threading.Event()

    async def respond(request):
        text = (await request.json())["messages"][0]["content"]

        async def run():
            yield delta(content=text)
            if text == "hangs":
                hanging.set()
                await anyio.sleep(PATIENCE_S)
            yield event("[DONE]")

        return StreamingResponse(run(), media_type="text/event-stream")

    upstream.answer = respond
    process, url = start_process()
    finished = [str(number) for number in range(10)]
    for text in finished:
        with asking(url, text) as response:
            # A client stops reading at [DONE], before the connection's own end of the answer.
            assert any(b"[DONE]" in piece for piece in response.iter_raw())
    with asking(url, "hangs"):
        assert hanging.wait(PATIENCE_S)
        process.send_signal(signal.SIGKILL)
        process.wait(PATIENCE_S)
    assert recorded(tmp_path) == finished
    with (tmp_path / "q" / "requests-00001.jsonl").open("ab") as file:
        file.write(b'{"id": "to')  # what a kill in the middle of a write leaves
    _, url = start_process()
    web_page = {"host": "evil.example:" + url.rpartition(":")[2]}
    assert httpx.get(f"{url}/health", headers=web_page, verify=False).status_code == 421
    with asking(url, "again") as response:
        assert response.status_code == 200
        list(response.iter_raw())
    assert recorded(tmp_path) == [*finished, "again"]


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_stopped_proxy_finishes_running_answers(
    start_process, upstream, tmp_path, ending, monkeypatch
):
    monkeypatch.setenv("KEY_OF_UPSTREAM", "not-on-the-command-line")
    (tmp_path / "q").mkdir(mode=0o755)
    goes_on = threading.Event()
    last = delta("stop", content=" two") + event("[DONE]")
    upstream.answer = streaming([delta(content="one"), goes_on, last])
    process, url = start_process("--upstream-key-env", "KEY_OF_UPSTREAM")
    with asking(url) as response:
        pieces = response.iter_raw()
        next(pieces)
        process.send_signal(ending)
        goes_on.set()
        assert b"".join(pieces).endswith(event("[DONE]"))
    assert process.wait(PATIENCE_S) == (0 if ending == signal.SIGINT else -signal.SIGTERM)
    said = process.stderr.read()
    assert "recorded 1 requests" in said
    assert f"others may look into {tmp_path / 'q'}" in said
    sent = dict(upstream.seen[0][1]["headers"])
    assert sent[b"authorization"] == b"Bearer not-on-the-command-line"
    assert recorded(tmp_path) == ["a"]


@pytest.mark.slow
def test_answer_that_outlasts_the_end_is_cut(start_process, upstream, tmp_path):
    goes_on = threading.Event()
    upstream.answer = streaming([delta(content="one"), goes_on])
    process, url = start_process("--drain", "0")
    with asking(url) as response:
        pieces = response.iter_raw()
        next(pieces)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(httpx.RemoteProtocolError):
            list(pieces)
    process.wait(PATIENCE_S)
    goes_on.set()
    (line,) = (tmp_path / "q" / "requests-00001.jsonl").read_bytes().splitlines()
    record = json.loads(line)
    assert record["complete"] is False
    assert record["response"]["choices"][0]["message"]["content"] == "one"


def invoke(tmp_path, *options):
    arguments = ["collect", "proxy", "--out", str(tmp_path / "q"), "--port", "0", *options]
    return CliRunner().invoke(app, arguments)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--upstream", "localhost:8000"], "http://HOST:PORT"),
        (["--upstream", "ftp://h"], "http://HOST:PORT"),
        (["--upstream", "http://u:secret@h"], "--upstream-key-env NAME"),
        (["--upstream", "http://u:sec@ret@h:x"], "--upstream-key-env NAME"),
        (["--upstream", "http://h", "--upstream-key-env", "NO_SUCH"], "is empty or not set"),
        (["--upstream", "http://h", "--sample", "1.5"], "sample is 1.5 but must be at most 1"),
        (["--upstream", "http://h", "--max-body", "8 parsecs"], "'8 parsecs' is no size"),
        (["--upstream", "http://h", "--max-file", "0"], "'0' is no size"),
    ],
)
def test_wrong_options_are_told_in_a_line(tmp_path, options, said):
    done = invoke(tmp_path, *options)
    assert done.exit_code == 2
    assert said in done.stderr
    assert "secret" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_missing_extra_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("specdec.cli.data.find_spec", lambda name: None)
    done = invoke(tmp_path, "--upstream", "http://h")
    assert done.exit_code == 2
    assert "pip install 'specdec-lab[collect]'" in done.stderr


def test_port_that_is_taken_is_told(tmp_path, upstream):
    done = invoke(tmp_path, "--upstream", "http://h", "--port", upstream.url.rpartition(":")[2])
    assert done.exit_code == 1
    assert "Address already in use" in done.stderr


def test_sizes_are_powers_of_1024():
    sizes = {"4096": 4096, "512K": 512 * 1024, "8M": 8 << 20, "256MiB": 256 << 20, "1.5g": 3 << 29}
    assert {text: parse_size(text) for text in sizes} == sizes
