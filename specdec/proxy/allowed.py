"""The parts of a request and of its answer that a record keeps: those that readers need."""

import re
from types import UnionType
from typing import Any

_DROPPED = object()

# A form is a type, a pattern of texts, {name: form} with patterns for names, [form], or a tuple of
# forms, of which the first that fits counts. Null is of every form.
_TEXT, _NUMBER, _PLAIN = str, int | float, str | int | float  # a bool is an int
_WORD = re.compile("[A-Za-z_.-]{1,40}")  # of a protocol, such as a role
_ANY_NAME, _NAME_OF_COUNT, _TOKEN_ID = map(re.compile, ("(?s).*", "[a-z_]{1,40}", r"\d{1,9}"))
_COUNTS: dict[Any, Any] = {}
_COUNTS[_NAME_OF_COUNT] = (_NUMBER, _COUNTS)


def _all(names: str, form: Any) -> dict[Any, Any]:
    return dict.fromkeys(names.split(), form)


SCHEMA: dict[Any, Any] = {}
SCHEMA |= {
    **_all("title description $ref", _TEXT),
    **_all("minimum maximum minLength maxLength minItems maxItems", _NUMBER),
    **_all("properties $defs definitions", {_ANY_NAME: SCHEMA}),
    **_all("anyOf oneOf allOf prefixItems", [SCHEMA]),
    **_all("items additionalProperties", (SCHEMA, _NUMBER)),
    "type": (_WORD, [_WORD]),
    "format": _WORD,
    "required": [_TEXT],
    "enum": [_PLAIN],
}
_FUNCTION = {
    **_all("name description", _TEXT),
    "parameters": SCHEMA,
    "arguments": str | dict,
    "strict": _NUMBER,
}
_CALL = {"id": _TEXT, "type": _WORD, "index": _NUMBER, "function": _FUNCTION}
_MESSAGE = {
    # Images, sound and files stay out; the types of such parts show that they were there.
    "content": (_TEXT, [(_TEXT, {"type": _WORD, "text": _TEXT})]),
    "tool_calls": [_CALL],
    "function_call": _FUNCTION,
    **_all("tool_call_id reasoning reasoning_content refusal", _TEXT),
    "role": _WORD,
}
REQUEST: dict[str, Any] = {
    **_all("model suffix", _TEXT),
    "reasoning_effort": _WORD,
    **_all("temperature top_p top_k min_p typical_p presence_penalty frequency_penalty", _NUMBER),
    **_all("repetition_penalty length_penalty seed n best_of max_tokens min_tokens", _NUMBER),
    **_all("max_completion_tokens ignore_eos logprobs top_logprobs echo stream", _NUMBER),
    **_all("parallel_tool_calls skip_special_tokens add_generation_prompt", _NUMBER),
    "continue_final_message": _NUMBER,
    "logit_bias": {_TOKEN_ID: _NUMBER},
    "stream_options": _all("include_usage continuous_usage_stats", _NUMBER),
    **_all("tool_choice function_call", (_WORD, _CALL | _FUNCTION)),
    "messages": [_MESSAGE],
    "prompt": (_TEXT, [_TEXT]),  # token ids would hide from every pattern what they spell
    "stop": (_TEXT, [_TEXT]),
    "tools": [_CALL],
    "functions": [_FUNCTION],
    "response_format": {
        "type": _WORD,
        "json_schema": {"name": _TEXT, "description": _TEXT, "strict": _NUMBER, "schema": SCHEMA},
    },
}
_CHOICE = {
    "index": _NUMBER,
    "text": _TEXT,
    "message": _MESSAGE,
    "finish_reason": _WORD,
    "stop_reason": _PLAIN,
}
RESPONSE: dict[str, Any] = {
    **_all("id model", _TEXT),
    "object": _WORD,
    "created": _NUMBER,
    "choices": [_CHOICE],
    **_all("usage timings", _COUNTS),
    "error": (_TEXT, _all("message type code param", _PLAIN)),
}


def keep(value: Any, form: Any) -> Any:
    """The parts of a JSON value that are of a form; an object or a list loses its other parts."""
    found = _kept(value, form)
    return {} if found is _DROPPED else found


def _kept(value: Any, form: Any) -> Any:
    if value is None:
        return None if form else _DROPPED
    if isinstance(form, tuple):
        tried = (_kept(value, each) for each in form)
        return next((found for found in tried if found is not _DROPPED), _DROPPED)
    if isinstance(form, dict) and isinstance(value, dict):
        parts = {key: _kept(each, _form_of(key, form)) for key, each in value.items()}
        return {key: part for key, part in parts.items() if part is not _DROPPED}
    if isinstance(form, list) and isinstance(value, list):
        items = (_kept(each, form[0]) for each in value)
        found = [item for item in items if item is not _DROPPED]
        return found if found or not value else _DROPPED
    if isinstance(form, re.Pattern):
        return value if isinstance(value, str) and form.fullmatch(value) else _DROPPED
    is_type = isinstance(form, type | UnionType)
    return value if is_type and isinstance(value, form) else _DROPPED


def _form_of(name: str, form: dict[Any, Any]) -> Any:
    """The form of what goes under a name; one that nothing fits if the name is unknown."""
    if name in form:
        return form[name]
    patterns = (key for key in form if isinstance(key, re.Pattern) and key.fullmatch(name))
    return next((form[key] for key in patterns), ())
