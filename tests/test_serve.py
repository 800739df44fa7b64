"""The server of OpenAI's API: its answers are `generate`'s, however they are asked for."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import httpx
import pytest
from fake_upstream import PATIENCE_S, Served

from specdec import Engine, SamplingConfig, generate, load_drafter, load_target
from specdec.engines.counters import read_counters
from specdec.serve import Server

CHAT = [{"role": "user", "content": "How do I bake bread?"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": CHAT[0]["content"]}]}]
SETTINGS = {field.name for field in fields(SamplingConfig)}


@pytest.fixture(scope="module")
def engine():
    target = load_target("demo", device="cpu")
    return Engine(target, load_drafter("eagle3", target), max_rows=3)


@pytest.fixture(scope="module")
def client(engine):
    said = []
    served = Served(Server(engine, "demo", said.append))
    with httpx.Client(base_url=served.url, timeout=120, trust_env=False) as client:
        client.said = said
        yield client
    served.stop()
    served.join()


def path_of(body):
    return "/v1/chat/completions" if "messages" in body else "/v1/completions"


def ask(client, body):
    return client.post(path_of(body), json=body)


def stream(client, body):
    """Chunks of a stream, and their choices joined."""
    reply = ask(client, {**body, "stream": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    *lines, end, nothing = reply.text.split("\n\n")
    assert (end, nothing) == ("data: [DONE]", "")
    chunks, rows = [json.loads(line.removeprefix("data: ")) for line in lines], {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            row = rows.setdefault(choice["index"], {"text": "", "token_ids": []})
            said = choice.get("delta", {"content": choice.get("text")})
            row["text"] += said["content"]
            row["token_ids"] += choice["token_ids"]
            ids = chunk.get("prompt_token_ids") or choice.get("prompt_token_ids")
            row |= {"prompt_token_ids": ids} if ids else {}
            row |= {"role": said["role"]} if "role" in said else {}
            row["finish_reason"] = choice["finish_reason"]
    return chunks, [rows[index] for index in sorted(rows)]


def whole(answer):
    """The same of an answer that is no stream."""
    rows = []
    for choice in answer["choices"]:
        row = {name: choice[name] for name in ("token_ids", "finish_reason")}
        row["prompt_token_ids"] = answer.get("prompt_token_ids") or choice["prompt_token_ids"]
        said = choice.get("message", {"content": choice.get("text")})
        row["text"] = said.pop("content")
        rows.append({**row, **said})
    return rows


def expected(engine, body, rows):
    sampling = {"temperature": 1.0, **{name: body[name] for name in SETTINGS & body.keys()}}
    results = generate(
        engine.target,
        engine.drafter,
        [prompt for prompt, _ in rows],
        [{**sampling, "seed": seed} for _, seed in rows],
        max_new_tokens=body.get("max_tokens", 16),
        stop=body.get("stop"),
    )
    role = {"role": "assistant"} if "messages" in body else {}
    return [
        {
            "text": each.text,
            "token_ids": each.tokens,
            "prompt_token_ids": each.prompt_tokens,
            "finish_reason": "stop" if each.finish_reason == "eos" else each.finish_reason,
            **role,
        }
        for each in results
    ]


def eventually(holds):
    until = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.01)


# Half a character is often sampled at such a temperature.
WILD = {"temperature": 2.5, "seed": 7}
PENALTIES = {"frequency_penalty": 0.5, "presence_penalty": 0.4, "repetition_penalty": 1.2}
CASES = {
    "chat": ({"messages": CHAT, "max_tokens": 48, "temperature": 0}, [(CHAT, 0)]),
    "parts": ({"messages": PARTS, "max_tokens": 9, "temperature": 0, "seed": None}, [(CHAT, 0)]),
    "choices": ({"messages": CHAT, "max_tokens": 20, "n": 2, **WILD}, [(CHAT, 7), (CHAT, 8)]),
    "stop": (
        {"messages": CHAT, "max_tokens": 30, "temperature": 0, "stop": [" oolong", "zz"]},
        [(CHAT, 0)],
    ),
    "texts": (
        {"prompt": ["Once", "Bread is"], "n": 2, "seed": 3, "top_p": 0.9, "top_k": 20},
        [("Once", 3), ("Once", 4), ("Bread is", 3), ("Bread is", 4)],
    ),
    "ids": (
        {
            "prompt": [[5, 6, 7]],
            "max_tokens": 20,
            "min_p": 0.1,
            "user": "x",
            "verbose": True,
            **PENALTIES,
            **WILD,
        },
        [([5, 6, 7], 7)],
    ),
}


def test_answers_are_those_of_generate_together(engine, client):
    """All cases at once, as streams and not, three rows at a time."""
    wanted = {name: expected(engine, *case) for name, case in CASES.items()}
    bodies = {name: {**case[0], "return_token_ids": True} for name, case in CASES.items()}
    with ThreadPoolExecutor(2 * len(CASES)) as pool:
        plain = {name: pool.submit(ask, client, body) for name, body in bodies.items()}
        streams = {name: pool.submit(stream, client, body) for name, body in bodies.items()}
    for name, rows in wanted.items():
        answer = plain[name].result().json()
        chunks, joined = streams[name].result()
        assert whole(answer) == rows == joined, name
        num_prompts, num_emitted = (
            sum(len(row[key]) for row in rows) for key in ("prompt_token_ids", "token_ids")
        )
        num_prompts //= bodies[name].get("n", 1)
        assert answer["usage"] == {
            "prompt_tokens": num_prompts,
            "completion_tokens": num_emitted,
            "total_tokens": num_prompts + num_emitted,
        }
        assert len(chunks) > len(rows)  # they come as steps accept
        assert all("usage" not in chunk for chunk in chunks)
    assert client.said == []


def test_streams_tell_their_usage_if_asked(client):
    for options, told in (("include_usage", [7]), ("continuous_usage_stats", [1, 7])):
        body = {"prompt": "Once upon a time", "temperature": 0, "max_tokens": 7}
        chunks, _ = stream(
            client, {**body, "return_token_ids": True, "stream_options": {options: True}}
        )
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks if "usage" in chunk]
        assert {counts[0], counts[-1]} == {*told}
        assert counts == sorted(counts)
    assert "token_ids" not in ask(client, body).text


def test_metrics_count_drafts_as_the_loop_does(engine, client):
    before = read_counters(str(client.base_url))
    ask(client, {"messages": CHAT, "max_tokens": 24, "temperature": 0})
    after = read_counters(str(client.base_url))
    counted = after - before
    assert max(after.accepted_per_position) <= after.num_drafts  # no time is taken for a count
    [result] = generate(engine.target, engine.drafter, [CHAT], max_new_tokens=24)
    stats = result.stats
    drafted = (sum(record.num_drafted > 0 for record in result.records), stats.num_drafted)
    assert (counted.num_drafts, counted.num_drafted) == drafted
    assert counted.num_accepted == stats.num_accepted == sum(counted.accepted_per_position) > 0


REFUSED = [
    (b"{", "Expecting"),
    (b"[]", "must be an object with prompt"),
    ({"prompt": None}, "must be an object with prompt"),
    ({"prompt": "a", "messages": CHAT}, "prompt is 'a' but is not honored"),
    ({"prompt": "a", "logprobs": 0}, "logprobs is 0 but is not honored here; leave it out"),
    ({"prompt": "a", "echo": True}, "echo is True"),
    ({"messages": CHAT, "tools": [{"type": "function"}]}, "tools is"),
    ({"messages": CHAT, "response_format": {"type": "json_object"}}, "response_format is"),
    ({"messages": CHAT, "made_up": 1}, "made_up is 1"),
    ({"prompt": "a", "temperature": -1}, "temperature is -1 but must be 0 or"),
    ({"prompt": "a", "top_k": "x"}, "top_k is 'x' but must be"),
    ({"prompt": "a", "n": 0}, "n is 0 but must be at least 1"),
    ({"prompt": "a", "max_tokens": 0}, "max_new_tokens is 0"),
    ({"prompt": "a", "stop": [""]}, "an empty string"),
    ({"prompt": "a", "stop_token_ids": [9]}, r"stop_token_ids is \[9\] but is not honored"),
    ({"prompt": ["a", ""]}, "prompt 1 is empty"),
    ({"prompt": [1] * 5000}, "prompt 0 has 5000 tokens but the target's context holds"),
    ({"prompt": [[5, 6], [1] * 5000]}, "prompt 1 has 5000 tokens"),
    ({"prompt": 5}, "prompts is 5"),
    ({"messages": [{"role": "user"}]}, "each entry must be"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url"),
    ({"prompt": "a", "model": "gpt"}, "the model 'gpt' does not exist"),
]


@pytest.mark.parametrize(("body", "message"), REFUSED)
def test_request_that_cannot_be_honored_is_refused(client, body, message):
    given = {"content": body} if isinstance(body, bytes) else {"json": body}
    path = "/v1/completions" if isinstance(body, bytes) else path_of(body)
    reply = client.post(path, **given)
    error = reply.json()["error"]
    assert reply.status_code == (404 if "gpt" in message else 400)
    assert re.search(message, error["message"])
    assert (error["type"], error["param"]) == ("invalid_request_error", None)


def test_client_that_leaves_frees_its_rows(engine, client, monkeypatch):
    """A stream, an answer that is none, and one that still waits."""
    cancelled, steps, step = [], [], engine.step

    def cancel(index, cancel=engine.cancel):
        cancel(index)  # a KeyError says that it has ended
        cancelled.append(index)

    def slow_step():
        time.sleep(0.05)
        steps.append(step())
        return steps[-1]

    monkeypatch.setattr(engine, "cancel", cancel)
    monkeypatch.setattr(engine, "step", slow_step)
    body = {"messages": CHAT, "n": 2, "temperature": 3, "seed": 1, "min_new_tokens": 300}
    port, sockets = client.base_url.port, []
    for number, options in enumerate(({"stream": True}, {}, {"stream": True}), 1):
        sent = json.dumps({**body, **options}).encode()
        head = f"POST {path_of(body)} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(sent)}\r\n\r\n"
        sockets.append(socket.create_connection(("127.0.0.1", port)))
        sockets[-1].sendall(head.encode() + sent)
        eventually(lambda: engine.num_running + engine.num_waiting == 2 * number)  # noqa: B023
    assert sockets[0].recv(1)
    for connection in sockets:
        connection.close()
    eventually(lambda: len(cancelled) == 6)
    assert (engine.num_running, engine.num_waiting) == (0, 0)
    assert ask(client, {"prompt": "a", "max_tokens": 3}).status_code == 200
    for index in cancelled:  # nothing is kept of them
        with pytest.raises(KeyError):
            engine.peek(index)
    num_steps = len(steps)
    time.sleep(0.3)
    assert len(steps) <= num_steps + 1  # and nobody steps for them


def test_error_of_one_answer_leaves_the_others(engine, client, monkeypatch):
    """Logits that are not finite end a request; a step that fails ends those that joined."""
    score, calls = engine.target.score, []

    def fail(*args):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("a wire came loose")
        return score(*args)

    body = {"prompt": ["Once", "Bread"], "temperature": 0, "return_token_ids": True}
    monkeypatch.setattr(engine.target, "score", fail)
    reply = ask(client, body)
    assert (reply.status_code, reply.json()["error"]["type"]) == (500, "server_error")
    assert "a wire came loose" in reply.json()["error"]["message"]
    calls.clear()
    text = ask(client, {**body, "stream": True}).text
    assert "a wire came loose" in text
    assert text.endswith("data: [DONE]\n\n")
    assert "a step failed: a wire came loose" in client.said
    client.said.clear()
    wanted = expected(engine, body, [("Once", 0), ("Bread", 0)])
    assert whole(ask(client, body).json()) == wanted


@pytest.mark.slow
def test_command_serves_and_ends_with_ctrl_c():
    command = [sys.executable, "-m", "specdec", "serve", "--drafter", "ngram", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        line = process.stderr.readline()
        url = re.fullmatch(r"specdec: serving demo at (http://127\.0\.0\.1:\d+)/v1: (.*)\n", line)
        assert url[2] == "for research, not for production"
        with httpx.Client(base_url=url[1], timeout=PATIENCE_S, trust_env=False) as client:
            assert client.get("/v1/models").json()["data"][0]["id"] == "demo"
            assert client.get("/health").status_code == 200
            assert client.get("/v1/nothing").json()["error"]["message"] == "Not Found"
            body = {"messages": CHAT, "stream": True, "n": 100}
            with client.stream("POST", path_of(body), json=body) as reply:
                assert next(reply.iter_raw())
                process.send_signal(signal.SIGINT)
                assert process.wait(PATIENCE_S) == 0
        assert "Traceback" not in process.stderr.read()
