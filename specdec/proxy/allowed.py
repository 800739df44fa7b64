"""What a record holds of a request and of its answer: what readers of recordings need, no more."""

from typing import Any

_DROPPED = object()


class _Leaf:
    """A value of some plain types; null is one of each."""

    def __init__(self, *types: type) -> None:
        self.types = (*types, type(None))


def _numbers(*names: str) -> dict[str, Any]:
    return dict.fromkeys(names, _NUMBER)


_TEXT, _NUMBER, _PLAIN = _Leaf(str), _Leaf(int, float, bool), _Leaf(str, int, float, bool)
# A form is a leaf, {name: form} with "*" for any name, [form], or a tuple of which one fits.
_ANYTHING: dict[str, Any] = {}
_ANYTHING["*"] = (_PLAIN, _ANYTHING, [(_PLAIN, _ANYTHING)])
_COUNTS: dict[str, Any] = {}
_COUNTS["*"] = (_NUMBER, _COUNTS)
SCHEMA: dict[str, Any] = dict.fromkeys(("title", "description", "$ref", "format"), _TEXT)
SCHEMA |= {
    **_numbers("minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems"),
    **{name: {"*": SCHEMA} for name in ("properties", "$defs", "definitions")},
    **{name: [SCHEMA] for name in ("anyOf", "oneOf", "allOf", "prefixItems")},
    **dict.fromkeys(("items", "additionalProperties"), (SCHEMA, _NUMBER)),
    "type": (_TEXT, [_TEXT]),
    "required": [_TEXT],
    "enum": [_PLAIN],
}
_FUNCTION = {
    "name": _TEXT,
    "description": _TEXT,
    "parameters": SCHEMA,
    "arguments": (_TEXT, _ANYTHING),
    "strict": _NUMBER,
}
_CALL = {"id": _TEXT, "type": _TEXT, "index": _NUMBER, "function": _FUNCTION}
_MESSAGE = {
    # Images, sound and files stay out; the types of such parts show that they were there.
    "content": (_TEXT, [(_TEXT, {"type": _TEXT, "text": _TEXT})]),
    "tool_calls": [_CALL],
    "function_call": _FUNCTION,
    **dict.fromkeys(("role", "tool_call_id", "reasoning", "reasoning_content", "refusal"), _TEXT),
}
REQUEST: dict[str, Any] = {
    **dict.fromkeys(("model", "suffix", "reasoning_effort"), _TEXT),
    **_numbers("temperature", "top_p", "top_k", "min_p", "typical_p", "presence_penalty"),
    **_numbers("frequency_penalty", "repetition_penalty", "length_penalty", "seed", "n", "best_of"),
    **_numbers("max_tokens", "max_completion_tokens", "min_tokens", "ignore_eos", "logprobs"),
    **_numbers("top_logprobs", "echo", "stream", "parallel_tool_calls", "skip_special_tokens"),
    **_numbers("add_generation_prompt", "continue_final_message"),
    **{name: {"*": _NUMBER} for name in ("stream_options", "logit_bias")},
    **dict.fromkeys(("tool_choice", "function_call"), (_TEXT, _CALL | _FUNCTION)),
    "messages": [_MESSAGE],
    "prompt": (_TEXT, [_TEXT]),  # token ids would hide from every pattern what they spell
    "stop": (_TEXT, [_TEXT]),
    "tools": [_CALL],
    "functions": [_FUNCTION],
    "response_format": {
        "type": _TEXT,
        "json_schema": {"name": _TEXT, "description": _TEXT, "strict": _NUMBER, "schema": SCHEMA},
    },
}
RESPONSE: dict[str, Any] = {
    **dict.fromkeys(("id", "object", "model"), _TEXT),
    "created": _NUMBER,
    "choices": [
        {
            "index": _NUMBER,
            "text": _TEXT,
            "message": _MESSAGE,
            **dict.fromkeys(("finish_reason", "stop_reason"), _PLAIN),
        }
    ],
    **dict.fromkeys(("usage", "timings"), _COUNTS),
    "error": (_TEXT, dict.fromkeys(("message", "type", "code", "param"), _PLAIN)),
}


def kept(value: Any, form: Any) -> Any:
    """What of a JSON value is of a form; an object or a list loses its other parts."""
    found = _kept(value, form)
    return {} if found is _DROPPED else found


def _kept(value: Any, form: Any) -> Any:
    if isinstance(form, tuple):
        tried = (_kept(value, each) for each in form)
        return next((found for found in tried if found is not _DROPPED), _DROPPED)
    if isinstance(form, _Leaf):
        return value if isinstance(value, form.types) else _DROPPED
    if isinstance(form, dict) and isinstance(value, dict):
        parts = {key: _kept(each, form.get(key, form.get("*", ()))) for key, each in value.items()}
        return {key: part for key, part in parts.items() if part is not _DROPPED}
    if isinstance(form, list) and isinstance(value, list):
        items = (_kept(each, form[0]) for each in value)
        found = [item for item in items if item is not _DROPPED]
        return found if found or not value else _DROPPED
    return None if value is None and form else _DROPPED
