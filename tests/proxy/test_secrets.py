"""Wherever a secret stands in a request or an answer, it is not in the folder of recordings."""

import base64
import gzip
import json

import pytest
from fake_upstream import answer, chat, delta, event, json_answer, streaming

from specdec.proxy.redaction import REDACTED, redact, secrets_outside

KEY = "sk-proj-" + "Qm7vT2xK9" * 3  # of a known form
PLAIN = "tr0ub4dor-and-3"  # only its place says that it is a secret
BASIC = base64.b64encode(f"me:{PLAIN}".encode()).decode()
CHAT = "/v1/chat/completions"


def turn(content, **more):
    return {"messages": [{"role": "user", "content": content, **more}]}


def call(arguments, name="f"):
    function = {"name": name, "arguments": arguments}
    said = {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "function": function}]}
    return {"messages": [said, {"role": "user", "content": "go on"}]}


def tool(schema):
    return {"tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}]}


def prop(**schema):
    return tool({"type": "object", "properties": {"p": {"type": "string", **schema}}})


BODIES = {
    **{
        f"at {name}": {name: PLAIN} for name in ("user", "metadata", "x", "logit_bias", "seed", "n")
    },
    **{f"in {name}": {name: {"a": [PLAIN]}} for name in ("metadata", "extra_body", "x", "tools")},
    **{f"as {name}": {name: KEY} for name in ("model", "stop", "suffix", "prompt", "tool_choice")},
    "stop list": {"stop": ["a", KEY]},
    "prompts": {"prompt": ["a", f"b {KEY}"]},
    "token ids": {"prompt": list(PLAIN.encode())},
    "an unknown key": {PLAIN: 1},
    "a nested key": {"extra_body": {"x": {PLAIN: [1]}}},
    "the name of an argument": call(json.dumps({KEY: 1})),
    "content": turn(f"use {KEY}, please"),
    "a role": {"messages": [{"role": PLAIN, "content": "x"}]},
    "a token's id": {"logit_bias": {PLAIN: 1}},
    "a name of an option": {"stream_options": {PLAIN: True}},
    "a type": turn([{"type": PLAIN, "text": "x"}]),
    "a name": turn("x", name=PLAIN),
    "an unknown field of a turn": turn("x", cache={"id": PLAIN}),
    "a part": turn([{"type": "text", "text": KEY}]),
    "an image": turn([{"type": "image_url", "image_url": {"url": f"https://h/i?sig={PLAIN}"}}]),
    "image data": turn([{"type": "image_url", "image_url": {"url": "data:text/plain," + PLAIN}}]),
    "a file": turn([{"type": "file", "file": {"file_data": PLAIN, "filename": PLAIN}}]),
    "sound": turn([{"type": "input_audio", "input_audio": {"data": PLAIN}}]),
    "a password in words": turn(f"my password is {PLAIN}. Is it good?"),
    "a login in a text": turn(f"git clone https://me:{PLAIN}@host/x"),
    "a header in a text": turn(f"curl -H 'Authorization: Basic {BASIC}' h"),
    "arguments": call(json.dumps({"url": "x", "password": PLAIN})),
    "deep arguments": call(json.dumps({"a": [{"credentials": {"b": [PLAIN]}}]})),
    "JSON within arguments": call(json.dumps({"body": json.dumps({"api_key": PLAIN})})),
    "broken arguments": call('{"api_key": "' + PLAIN),
    "named arguments": call(json.dumps({"headers": [{"name": "X-Api-Key", "value": PLAIN}]})),
    "arguments with a type": call(json.dumps({"secret": {"type": "string", "value": PLAIN}})),
    "an argument called token": call(json.dumps({"token": PLAIN})),
    "arguments that are no text": call({"passwd": PLAIN}),
    "a function's name": call("{}", name=KEY),
    "a tool's answer": {"messages": [{"role": "tool", "content": json.dumps({"secret": PLAIN})}]},
    "a call's id": {"messages": [{"role": "tool", "tool_call_id": KEY, "content": "x"}]},
    **{
        f"a schema's {name}": prop(**{name: PLAIN}) for name in ("default", "const", "example", "x")
    },
    "a schema's examples": prop(examples=[PLAIN]),
    "a schema's enum": prop(enum=[KEY]),
    "a schema's description": prop(description=f"use {KEY}"),
    "a schema's property": tool({"type": "object", "properties": {KEY: {"type": "string"}}}),
    "a password's enum": tool({"properties": {"password": {"type": "string", "enum": [PLAIN]}}}),
    "a tool's server": {"tools": [{"type": "mcp", "server_url": PLAIN, "headers": {"a": PLAIN}}]},
    "a format": {"response_format": {"type": "json_schema", "json_schema": {"name": KEY}}},
    "a format's schema": {"response_format": {"json_schema": {"schema": {"default": PLAIN}}}},
    "escaped": turn(f"key {KEY.replace('-', '%2D')}"),
    "beside other letters": turn(f"密钥{KEY}谢谢"),
    "web search": {"web_search_options": {"user_location": PLAIN}},
    "prediction": {"prediction": {"type": "content", "content": PLAIN}},
}
SENT = {
    "a bearer": {"headers": {"authorization": f"Bearer {PLAIN}"}},
    "a bare authorization": {"headers": {"authorization": PLAIN}},
    "basic": {"headers": {"authorization": f"Basic {BASIC}"}},
    "another header": {"headers": {"x-team": PLAIN}},
    "a header with more": {"headers": {"x-signed": f"Credential={PLAIN}, Signed=a"}},
    "a short cookie": {"headers": {"cookie": f"a=1; s={PLAIN}"}},
    "a query": {"params": {"api_key": PLAIN}},
    "another query": {"params": {"team": PLAIN}},
    **{f"header {name}": {"headers": {name: PLAIN}} for name in ("x-api-key", "Api-Key")},
    "an admin key": {"headers": {"x-admin-key": PLAIN}},
    "a proxy's login": {"headers": {"proxy-authorization": f"Bearer {PLAIN}"}},
    "queries": {"params": {"access_token": PLAIN, "key": "1"}},
    "a key": {"json": chat("x", api_key=PLAIN)},
    "keys": {"json": chat("x", api_keys=[PLAIN])},
    "deep": {"json": chat("x", extra_body={"provider": [{"Authorization": f"Bearer {PLAIN}"}]})},
}


# Its place says that it is a secret, so the answer may not repeat it either.
REPEATED = {
    *SENT,
    *(name for name in BODIES if name.endswith(("arguments", "in words", "a tool's answer"))),
}


def leaks(line):
    return [secret for secret in (KEY, KEY[8:], PLAIN, BASIC) if secret.encode() in line]


def test_secret_is_recorded_nowhere_it_was_sent(proxy, upstream):
    found = {}
    with proxy.client() as client:
        for number, place in enumerate([*BODIES, *SENT], 1):
            said = PLAIN if place in REPEATED else ""
            parts = (f"you said {said[:6]}", said[6:])
            upstream.answer = streaming([*(delta(content=part) for part in parts), event("[DONE]")])
            options = {"json": {**chat("x"), **BODIES.get(place, {})}, **SENT.get(place, {})}
            response = client.post(CHAT, **options)
            assert response.status_code == 200
            lines = proxy.lines()
            assert len(lines) == number, place
            found[place] = leaks(lines[-1])
    assert {place: secrets for place, secrets in found.items() if secrets} == {}


@pytest.mark.parametrize(
    "path", [f"/{KEY}{CHAT}", f"/team/{PLAIN}{CHAT}", f"/k={PLAIN}/completions"]
)
def test_secret_in_the_path_is_not_recorded(proxy, upstream, path):
    proxy.ask(chat("x"), path)
    assert proxy.records()[0]["path"] == path[path.rindex(CHAT if CHAT in path else "/comp") :]
    assert leaks(proxy.lines()[0]) == []


ANSWERS = {
    "content": answer(f"it is {KEY}"),
    "an unknown field": answer("x", provider={"account": PLAIN}),
    "a fingerprint": answer("x", system_fingerprint=PLAIN),
    "log probabilities": {"choices": [{"text": "x", "logprobs": {"tokens": [PLAIN]}}]},
    "an error": {"error": {"message": f"wrong key {KEY}", "detail": PLAIN}},
    "another error": {"detail": [{"input": PLAIN}]},
    "headers": {"error": {"message": "x", "headers": {"authorization": PLAIN}}},
    "arguments": {
        "choices": [
            {"message": {"tool_calls": [{"function": {"arguments": f'{{"password":"{PLAIN}"}}'}}]}}
        ]
    },
    "sound": {"choices": [{"message": {"audio": {"data": PLAIN}, "annotations": [PLAIN]}}]},
    "usage": answer("x", usage={"prompt_tokens": 1, "cost": PLAIN, PLAIN: 1}),
    "a reason": {"choices": [{"text": "x", "finish_reason": PLAIN}]},
    "text": {"choices": [{"index": 0, "text": KEY, "prompt_logprobs": [PLAIN]}]},
}


def test_secret_is_recorded_nowhere_it_was_answered(proxy, upstream):
    found = {}
    for place, body in ANSWERS.items():
        upstream.answer = json_answer(body, 400 if "error" in body else 200)
        proxy.ask(chat("x"))
        assert proxy.records()[-1]["response"] is not None
        found[place] = leaks(proxy.lines()[-1])
    assert {place: secrets for place, secrets in found.items() if secrets} == {}


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
                prop(type="string", description="yours"),
                tool({"properties": {"password": {"type": "string", "description": "yours"}}}),
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
