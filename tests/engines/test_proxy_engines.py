"""The recording proxy in front of real servers: the same bytes, and records that are whole."""

import os
import re
from pathlib import Path

import httpx
import pytest
from fake_upstream import PATIENCE_S, Proxy, Served

from specdec.demo import demo_path
from specdec.engines.gguf import to_gguf
from specdec.engines.launch import start
from specdec.proxy.recorder import Exchange, Recorder
from specdec.proxy.records import ProxyConfig, RecordFiles
from specdec.proxy.server import Application, Upstream

ROOT = Path(__file__).parents[2]
KEY = "sk-proj-" + "Qm7vT2xK9" * 3
FOLDERS = {"llama.cpp": "llamacpp", "vllm": "vllm"}
FLAGS = {
    "llama.cpp": ["--parallel", "2", "--ctx-size", "1024", "--metrics", "--flash-attn", "off"],
    "vllm": ["--max-model-len", "512", "--no-enable-prefix-caching", "--enforce-eager"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("llama.cpp", marks=pytest.mark.llamacpp),
        pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
)
def engine(request, folder):
    """The root of a real server, and of a proxy in front of it."""
    name = request.param
    home = Path(os.environ.get("SPECDEC_ENGINES_DIR", ROOT / ".engines")) / FOLDERS[name]
    if not (home / "bin/python").exists():
        pytest.skip(f"no {home}: bash scripts/engines.sh {FOLDERS[name]}")
    target = demo_path("target")
    launch = ["vllm", "serve", str(target), "--dtype", "float32"]
    if name == "llama.cpp":
        launch = ["llama-server", "--model", str(to_gguf(target, folder / "target.gguf"))]
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    with start([*launch, *FLAGS[name]], engine=name, log=folder / "log", env=env) as url:
        config = ProxyConfig(upstream=url.removesuffix("/v1"), out=folder / name)
        upstream, said = Upstream(config.upstream, PATIENCE_S), []
        recorder = Recorder(config, RecordFiles(config.out, 2**28, 2**28), frozenset(), said.append)
        served = Served(Application(upstream, recorder, said.append))
        yield config.upstream, Proxy(served, config.out, said, recorder)
        served.stop()
        served.join()


CHAT = {"messages": [{"role": "user", "content": f"How do I bake bread? My key is {KEY}."}]}
TEXT, TEXTS, IDS = ({"prompt": each} for each in ("Once upon", ["Once upon", "Bread"], [5, 6, 7]))
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
BOTH = {"n": 2, "temperature": 0.0}
TOOL = {
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "bake",
                "parameters": {
                    "type": "object",
                    "properties": {"loaves": {"type": "integer"}},
                    "required": ["loaves"],
                },
            },
        }
    ],
    "tool_choice": "required",
}
# Each is asked as it is, and as a stream.
KINDS = {
    "chat": CHAT,
    "chat, two answers": {**CHAT, **BOTH},
    "chat, ids": {"messages": [{"role": "user", "content": "Bread?"}], "return_token_ids": True},
    "chat, log probabilities": {**CHAT, "logprobs": True, "top_logprobs": 2},
    "forced tool call": {**CHAT, **TOOL},
    "text": TEXT,
    "texts": TEXTS,
    "prompt ids": {**IDS, "return_token_ids": True},
    "text, ids": {**TEXT, "return_token_ids": True},
    "text, log probabilities": {**TEXT, "logprobs": 2},
    "wrong value": {**TEXT, "temperature": "hot"},
    "too long": {"prompt": [5] * 2000},
}


def same_for_all(body):
    """Without what differs from one answer to the next: ids, times, and the order of rows."""
    body = re.sub(rb'"(id|system_fingerprint)": ?"[^"]*"', rb'"\\1":""', body)
    body = re.sub(rb'"(created|cached_tokens)": ?\d+', rb'"\\1":0', body)
    body = re.sub(rb'"timings": ?\{[^}]*\}', b'"timings":{}', body)
    return sorted(body.split(b"\n"))


def without_nulls(value):
    if isinstance(value, dict):
        kept = {name: without_nulls(each) for name, each in value.items() if each is not None}
        return {
            name: each for name, each in kept.items() if name not in ("id", "created", "timings")
        }
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


def test_proxy_is_invisible_and_records_all(engine, monkeypatch):
    (root, proxy), received, relay = engine, [], Exchange.add_answer

    def receive(exchange, piece):
        received.append(piece)
        relay(exchange, piece)

    monkeypatch.setattr(Exchange, "add_answer", receive)
    headers, records = {"Authorization": f"Bearer {KEY}"}, {}
    with httpx.Client(timeout=120, headers=headers, trust_env=False) as client:
        model = client.get(f"{root}/v1/models").json()["data"][0]["id"]
        for name, body in KINDS.items():
            for options in ({}, STREAM):
                path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
                given = {"model": model, "max_tokens": 12, "temperature": 0, "cache_prompt": False}
                given |= {**body, **options}
                direct = client.post(root + path, json=given)
                passed = client.post(proxy.served.url + path, json=given)
                assert direct.status_code == passed.status_code, name
                assert passed.content == b"".join(received), name
                received.clear()
                # What vLLM puts into one chunk of a stream depends on its load.
                if proxy.folder.name != "vllm" or not options:
                    assert same_for_all(direct.content) == same_for_all(passed.content), name
                record = proxy.records()[-1]
                assert record["complete"], name
                assert record["stream"] == (b"data: " in passed.content), name
                records[name, record["stream"]] = record["response"]
        for path in ("/v1/nothing", "/v1/models", "/metrics"):
            direct, passed = (client.get(each + path) for each in (root, proxy.served.url))
            assert direct.status_code == passed.status_code == (404 if "no" in path else 200)
    assert len(proxy.records()) == 2 * len(KINDS)
    assert not any(KEY.encode() in line for line in proxy.lines())
    for (name, is_stream), response in records.items():
        # vLLM has a call that max_tokens cuts as text where it is no stream.
        if is_stream and (name, False) in records and "tool" not in name:
            joined, whole = without_nulls(response), without_nulls(records[name, False])
            if "texts" in name:  # llama.cpp tells the usage of the last one
                del joined["usage"], whole["usage"]
            assert joined == whole, name
    assert {is_stream for name, is_stream in records if "ids" in name} == {False, True}
