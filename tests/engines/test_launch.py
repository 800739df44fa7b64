"""Engines in processes of their own, played by small scripts, and what /metrics counts."""

import os
import signal
import sys
import time
from dataclasses import replace

import httpx
import pytest

from specdec.engines.counters import Counters, parse_counters, read_counters
from specdec.engines.launch import last_error, server_command, start, without_drafter

SERVER = """
import subprocess, sys, http.server
child = subprocess.Popen(["sleep", "600"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path in ("/health", "/v1/models", "/metrics") else 404)
        self.end_headers()
        self.wfile.write(b'vllm:spec_decode_num_drafts_total{engine="0"} 3.0\\n'
                         b"# pid %d\\n" % child.pid)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    monkeypatch.setenv("SPECDEC_VLLM_PYTHON", sys.executable)


def run(code, tmp_path, **options):
    return start(["python", "-c", code], engine="vllm", log=tmp_path / "log", **options)


def is_alive(pid):
    try:
        return os.waitpid(pid, os.WNOHANG) == (0, 0)
    except ChildProcessError:
        return os.path.exists(f"/proc/{pid}") and "Z" not in open(f"/proc/{pid}/stat").read()


def test_interrupt_ends_an_engine_and_its_children(tmp_path):
    def use():
        with run(SERVER, tmp_path) as url:
            assert read_counters(url).num_drafts == 3
            children.append(int(httpx.get(url.replace("/v1", "/metrics")).text.split()[-1]))
            assert is_alive(children[0])
            urls.append(url)
            signal.raise_signal(signal.SIGTERM)  # SIGINT's own handler is Python's

    children, urls = [], []
    with pytest.raises(KeyboardInterrupt):
        use()
    ends = time.monotonic() + 10
    while is_alive(children[0]) and time.monotonic() < ends:
        time.sleep(0.05)
    assert not is_alive(children[0])
    with pytest.raises(RuntimeError, match=r"/metrics does not answer .* is the server up"):
        read_counters(urls[0])


def test_error_of_an_engine_is_told(tmp_path):
    code = "print('1 WARNING OSError: no'); raise TypeError('no such head')"
    with (
        pytest.raises(RuntimeError, match=r"status 1 before it answered: TypeError: no such head"),
        run(code, tmp_path),
    ):
        pass
    with (
        pytest.raises(RuntimeError, match=r"not answer after 1 s: loading \(all of it: .*log\)"),
        run("import time; print('loading'); time.sleep(600)", tmp_path, max_wait_s=1),
    ):
        pass


def test_root_cause_comes_before_what_follows_from_it(tmp_path):
    log = tmp_path / "log"
    log.write_text(
        "0.00.1 I srv init\n0.00.2 E gguf: no file\n0.00.3 E srv: exiting\nRuntimeError: failed\n"
    )
    assert last_error(log) == "gguf: no file"


def test_missing_engine_is_refused_with_its_install_command(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECDEC_ENGINES_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match=r"run `bash scripts/engines.sh llamacpp`, or give"):
        server_command(["llama-server", "-m", "a.gguf"], "llama.cpp")
    with pytest.raises(FileNotFoundError, match=r"is no Python; give SPECDEC_SGLANG_PYTHON"):
        server_command(["python", "-m", "sglang.launch_server"], "sglang")
    assert server_command(["vllm", "serve", "T", "-x"], "vllm")[3:] == ["--model", "T", "-x"]
    with pytest.raises(ValueError, match=r"begins with 'sglang', which is not vllm's server"):
        server_command(["sglang"], "vllm")


def test_launch_line_loses_its_drafter():
    line = (
        "llama-server -m a --metrics -md b -ctk f32 --spec-type draft-simple --spec-draft-n-max 5"
    )
    assert without_drafter(line.split()) == [*line.split()[:4], "-ctk", "f32"]
    assert without_drafter(["vllm", "serve", "--speculative-config={}", "T"])[-1] == "T"


def test_counters_of_engines_are_read_and_subtracted():
    page = "\n".join(
        f'{{name}}:spec_decode_num_{key}_total{{{{engine="{engine}"{label}}}}} {value}'
        for engine in "01"
        for key, label, value in [
            ("drafts", "", "3.0"),
            ("draft_tokens", "", "15.0"),
            ("accepted_tokens", "", "4.0"),
            ("accepted_tokens_per_pos", ',position="0"', "3.0"),
            ("accepted_tokens_per_pos", ',position="1"', "1.0"),
            ("accepted_tokens_per_pos", ',position="2"', "0.0"),
        ]
    )
    both = Counters(6, 30, 8, (6, 2, 0), "vllm")
    assert parse_counters(page.format(name="vllm")) == both
    assert parse_counters(page.format(name="llamacpp")) == replace(both, engine="llamacpp")
    sglang = Counters(7, 0, None, engine="sglang")
    assert parse_counters("sglang:spec_verify_calls_total 7\n") == sglang
    assert parse_counters("vllm:num_requests_running 1\n") is None
    assert both - Counters(2, 10, 3, (1, 2)) == Counters(4, 20, 5, (5, 0, 0), "vllm")
    assert both - None == both
