"""Credentials: never in the folder, whatever way they come."""

import json

import pytest
from fake_upstream import chat, delta, event, streaming
from starlette.responses import JSONResponse

from specdec.proxy.redaction import REDACTED, redact, secrets_outside

SECRET = "sk-live-0a1b2c3d4e5f"


@pytest.mark.parametrize(
    "options",
    [
        {"headers": {"authorization": f"Bearer {SECRET}"}},
        {"headers": {"x-api-key": SECRET}},
        {"headers": {"Api-Key": SECRET}},
        {"headers": {"x-admin-key": SECRET}},
        {"headers": {"cookie": f"lang=en; session={SECRET}"}},
        {"headers": {"proxy-authorization": f"Bearer {SECRET}"}},
        {"params": {"api_key": SECRET, "key": "1"}},
        {"params": {"access_token": SECRET}},
        {"json": chat("x", api_key=SECRET)},
        {"json": chat("x", extra_body={"provider": [{"Authorization": f"Bearer {SECRET}"}]})},
        {"json": chat("x", api_keys=[SECRET])},
        {"json": chat(f"see https://me:{SECRET}@host/x")},
        {"json": chat("x"), "headers": {"authorization": "Basic bWU6c2stbGl2ZS0wYTFiMmMzZDRlNWY="}},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("streamed", [False, True])
def test_a_credential_is_nowhere_in_the_folder_even_if_the_answer_repeats_it(
    proxy, upstream, options, streamed
):
    text = f"wrong key {SECRET}!"

    async def repeat(request):
        return JSONResponse({"error": {"message": text}}, 401)

    upstream.answer = streaming([delta(content=text), event("[DONE]")]) if streamed else repeat
    sent = {"json": chat("x"), **options}
    with proxy.client() as client:
        response = client.post("/v1/chat/completions", **sent)
    assert SECRET in response.text
    assert len(proxy.records()) == 1
    for path in proxy.folder.iterdir():
        assert SECRET.encode() not in path.read_bytes()
        assert b"bWU6c2stbGl2ZS0" not in path.read_bytes()


def test_a_new_cookie_that_the_answer_repeats_is_hidden_and_its_attributes_are_not(proxy, upstream):
    async def respond(request):
        body = {"error": f"{SECRET} from example.com"}
        cookie = f"id={SECRET}; Domain=example.com; Path=/"
        return JSONResponse(body, headers={"set-cookie": cookie})

    upstream.answer = respond
    proxy.ask()
    assert proxy.records()[0]["response"] == {"error": f"{REDACTED} from example.com"}


def test_what_is_no_credential_stays():
    body = {
        "max_tokens": 5,
        "logprobs": {"content": [{"token": "Hello", "bytes": [1]}]},
        "prompt_cache_key": "k",
        "tools": [
            {
                "function": {
                    "name": "login",
                    "parameters": {
                        "properties": {"password": {"type": "string", "description": "yours"}}
                    },
                }
            }
        ],
        "text": "my password is in the drawer: https://example.com/a:b and mailto:me@x.y",
    }
    assert redact(body, []) == body


def test_credentials_in_the_arguments_of_tool_calls_are_hidden():
    def calls(arguments):
        return {"tool_calls": [{"function": {"name": "login", "arguments": arguments}}]}

    clean = '{ "user": "me",  "n": 1.50 }'
    assert redact(calls(clean), []) == calls(clean)
    assert redact(calls('{"user": "me", "password": "hunter2"}'), []) == calls(
        json.dumps({"user": "me", "password": REDACTED})
    )
    assert redact(calls("not json " + SECRET), [SECRET]) == calls("not json " + REDACTED)


def test_numbers_and_whole_objects_under_a_credential_are_hidden():
    body = {"credentials": {"user": "u", "pin": 1234, "on": True}, "Secret": ["a", {"b": "c"}]}
    assert redact(body, []) == {
        "credentials": {"user": REDACTED, "pin": REDACTED, "on": True},
        "Secret": [REDACTED, {"b": REDACTED}],
    }


@pytest.mark.parametrize("value", ["EMPTY", "Bearer none", "Basic !!", ""])
def test_placeholders_are_not_torn_out_of_texts(value):
    assert not secrets_outside([(b"authorization", value.encode())], b"key=test&token=")


def test_a_login_that_is_no_base64_is_hidden_as_it_stands():
    assert secrets_outside([(b"authorization", "Basic gehéim-77".encode())], b"") == {"gehéim-77"}
