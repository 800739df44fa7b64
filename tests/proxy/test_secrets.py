"""Wherever a secret stands in a request or an answer, it is not in the folder of recordings."""

import base64
import gzip
import json
import re
from collections import defaultdict
from pathlib import Path

import pytest
from fake_upstream import answer, chat, delta, event, json_answer, streaming

from specdec.proxy.redaction import REDACTED, redact, secrets_outside

KEY = "sk-proj-" + "Qm7vT2xK9" * 3  # of a known form
PLAIN = "tr0ub4dor-and-3"  # only its place says that it is a secret
BASIC = base64.b64encode(f"me:{PLAIN}".encode()).decode()
CHAT = "/v1/chat/completions"


def read_places():
    """(JSON, whether an answer may not repeat its secret) for each section of the file."""
    text = Path(__file__).with_name("secret_places.txt").read_text("utf-8")
    secrets = {"$KEY": KEY, "$PLAIN": PLAIN, "$BASIC": BASIC, "$ESCAPED": KEY.replace("-", "%2D")}
    for name, secret in secrets.items():
        text = text.replace(name, secret)
    found, section = defaultdict(list), ""
    for line in text.splitlines():
        if head := re.fullmatch(r"\[(\w+)\]", line):
            section = head[1]
        elif section and line:
            found[section].append((json.loads(line.removeprefix("* ")), line.startswith("* ")))
    return found


PLACES = read_places()


def schema(**properties):
    function = {"name": "f", "parameters": {"type": "object", "properties": properties}}
    return {"tools": [{"type": "function", "function": function}]}


def leaks(line):
    return [secret for secret in (KEY, KEY[8:], PLAIN, BASIC) if secret.encode() in line]


def test_secret_is_recorded_nowhere_it_was_sent(proxy, upstream):
    sent = [({"json": {**chat("x"), **body}}, repeated) for body, repeated in PLACES["body"]]
    sent += [({"json": chat("x"), **options}, repeated) for options, repeated in PLACES["sent"]]
    assert len(sent) > 70
    with proxy.client() as client:
        for number, (options, repeated) in enumerate(sent, 1):
            said = PLAIN if repeated else ""
            parts = (f"you said {said[:6]}", said[6:])
            upstream.answer = streaming([*(delta(content=part) for part in parts), event("[DONE]")])
            assert client.post(CHAT, **options).status_code == 200
            lines = proxy.lines()
            assert (len(lines), leaks(lines[-1])) == (number, []), options


@pytest.mark.parametrize(
    "path", [f"/{KEY}{CHAT}", f"/team/{PLAIN}{CHAT}", f"/k={PLAIN}/completions"]
)
def test_secret_in_the_path_is_not_recorded(proxy, upstream, path):
    proxy.ask(chat("x"), path)
    assert proxy.records()[0]["path"] == path[path.rindex(CHAT if CHAT in path else "/comp") :]
    assert leaks(proxy.lines()[0]) == []


def test_secret_is_recorded_nowhere_it_was_answered(proxy, upstream):
    for body, _ in PLACES["answer"]:
        upstream.answer = json_answer(body, 400 if "error" in body else 200)
        proxy.ask(chat("x"))
        assert proxy.records()[-1]["response"] is not None
        assert leaks(proxy.lines()[-1]) == [], body


def test_key_cut_over_events_is_hidden(proxy, upstream):
    call = {"index": 0, "function": {"arguments": '{"password": "' + PLAIN[:4]}}
    rest = {"index": 0, "function": {"arguments": PLAIN[4:] + '"}'}}
    upstream.answer = streaming(
        [
            *(delta(content=part) for part in (KEY[:3], KEY[3:9], KEY[9:])),
            *(delta(reasoning_content=part) for part in (KEY[:5], KEY[5:])),
            delta(tool_calls=[call], provider_field=PLAIN),
            delta(tool_calls=[rest]),
            event({"choices": [], "system_fingerprint": PLAIN, "x": PLAIN}),
            event("[DONE]"),
        ]
    )
    proxy.ask(chat("x", stream=True))
    assert proxy.records()[0]["complete"] is True
    assert leaks(proxy.lines()[0]) == []


def test_new_cookie_is_hidden_without_its_attributes(proxy, upstream):
    cookie = {"set-cookie": f"id={PLAIN}-0a1b; Domain=example.com; Path=/"}
    upstream.answer = json_answer({"error": f"{PLAIN}-0a1b from example.com"}, **cookie)
    proxy.ask()
    assert proxy.records()[0]["response"] == {"error": f"{REDACTED} from example.com"}


def test_other_bodies_and_endpoints_are_not_recorded(proxy, upstream):
    kinds = [{"data": {"api_key": PLAIN}}, {"files": {"file": ("a", PLAIN)}}, {"content": PLAIN}]
    kinds += [{"json": [PLAIN]}, {"content": gzip.compress(json.dumps(chat(PLAIN)).encode())}]
    with proxy.client() as client:
        for kind in kinds:
            assert client.post(CHAT, **kind).status_code == 200
        for path in ("/v1/embeddings", "/v1/responses", "/v1/files", "/v1/audio/speech"):
            assert client.post(path, json={"input": PLAIN}).status_code == 200
    assert proxy.lines() == []


def test_readers_find_what_they_need(proxy, upstream):
    schema = {"type": "object", "properties": {"password": {"type": "string"}}, "required": ["q"]}
    body = {
        **chat("x", temperature=0.5, top_p=0.9, seed=3, stop=["\n"], logit_bias={"5": -1}),
        "tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
    }
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{ "q":1.50}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "hm"}
    response = {
        **answer("x", usage={"total_tokens": 3, "details": {"cached_tokens": 1}}),
        "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}],
    }
    upstream.answer = json_answer(response)
    proxy.ask(body)
    (record,) = proxy.records()
    assert (record["request"], record["response"]) == (body, response)
    known = {"status": 200, "complete": True, "stream": False, "path": CHAT, "model": "m"}
    assert record.items() >= (known | {"ttft_s": None}).items()


def calls(arguments):
    return {"tool_calls": [{"function": {"name": "login", "arguments": arguments}}]}


@pytest.mark.parametrize(
    ("body", "clean"),
    [
        (
            calls('{"user": "me", "password": "hunter2"}'),
            calls(f'{{"user": "me", "password": "{REDACTED}"}}'),
        ),
        (
            {"credentials": {"user": "u", "pin": 1234, "on": True}, "Secret": ["a", {"b": "c"}]},
            {
                "credentials": {"user": REDACTED, "pin": REDACTED, "on": True},
                "Secret": [REDACTED, {"b": REDACTED}],
            },
        ),
        *(
            (body, body)
            for body in (
                calls('{ "user": "me",  "n": 1.50 }'),
                {"max_tokens": 5, "logprobs": {"content": [{"token": "Hello", "bytes": [1]}]}},
                {"prompt_cache_key": "k"},
                schema(password={"type": "string", "description": "yours"}),
                {"text": "my password is in the drawer: https://example.com/a:b, mailto:me@x.y"},
            )
        ),
    ],
)
def test_values_of_credentials_are_redacted_and_others_stay(body, clean):
    assert redact(body, []) == clean


@pytest.mark.parametrize("value", ["EMPTY", "Bearer none", "Basic !!", ""])
def test_placeholders_are_no_secrets(value):
    assert not secrets_outside([(b"authorization", value.encode())], b"key=test&token=")


def test_login_that_is_no_base64_is_hidden():
    assert secrets_outside([(b"authorization", "Basic gehéim-77".encode())], b"") == {"gehéim-77"}
