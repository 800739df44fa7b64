"""The line that is written for an exchange; docs/recording.schema.json describes it."""

import json
import re
from typing import Any

from specdec.proxy.allowed import REQUEST, RESPONSE, kept
from specdec.proxy.exchange import Exchange
from specdec.proxy.redaction import redact, secrets_inside


def encode(exchange: Exchange, secrets: frozenset[str]) -> bytes | None:
    """One line of JSON in ASCII with its line end; None if the request is no JSON object.

    Args:
        exchange: that is sealed.
        secrets: texts to be redacted besides the exchange's own credentials.
    """
    request = _request(exchange.request)
    if request is None:
        return None
    response, is_whole = exchange.answer.response() if exchange.answer else (None, False)
    # Of what is not kept, too: the answer may repeat it.
    model = _model(request, response)
    hidden = (secrets | exchange.secrets | secrets_inside(request)) - {model or ""}
    record = {
        "id": exchange.id,
        "time": exchange.time,
        "path": _endpoint(exchange.path),
        "model": model,
        "request": kept(request, REQUEST),
        "response": None if response is None else kept(response, RESPONSE),
        "status": exchange.status,
        "complete": is_whole and (exchange.ended or exchange.has_answer),
        "stream": exchange.is_stream,
        "latency_s": round(exchange.latency_s, 6),
        "ttft_s": None if exchange.ttft_s is None else round(exchange.ttft_s, 6),
    }
    # NaN is no JSON, and readers of the file would stumble over it.
    line = json.dumps(redact(record, hidden), allow_nan=False, separators=(",", ":"))
    return line.encode("ascii") + b"\n"


def _endpoint(path: str) -> str:
    """The path without its prefix, which may name a team or hold a key."""
    found = re.search(r"(/v1)?(/chat)?/completions/?$", path)
    return found[0] if found else ""


def _request(body: bytearray) -> dict[str, Any] | None:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _model(request: dict[str, Any], response: dict[str, Any] | None) -> str | None:
    """The name that the request asked for, else the one that answered."""
    named = (request.get("model"), (response or {}).get("model"))
    return next((name for name in named if isinstance(name, str) and name), None)
