"""Credentials: found by the names they go under, and removed wherever their text appears."""

import base64
import binascii
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import parse_qsl, unquote

REDACTED = "[redacted]"

# What a name ends with, in lower case and without "-", "_" and a plural's "s".
_ENDINGS = (
    "apikey",
    "adminkey",
    "accesskey",
    "secretkey",
    "privatekey",
    "subscriptionkey",
    "authkey",
    "password",
    "passwd",
    "passphrase",
    "secret",
    "credential",
    "authorization",
    "cookie",
    "accesstoken",
    "apitoken",
    "authtoken",
    "authorizationtoken",
    "bearertoken",
    "idtoken",
    "refreshtoken",
    "securitytoken",
    "sessiontoken",
)
# In headers and queries these are credentials too; in a body they are log probabilities and tools.
_ENDINGS_OUTSIDE = (*_ENDINGS, "key", "token", "auth", "sig", "signature")
# Shorter ones are placeholders ("EMPTY", "none"), and common words would be torn out of the texts.
_SHORTEST = 8
_SHORTEST_COOKIE = 16
_SCHEMES = ("basic", "bearer", "token", "apikey", "key")
_IN_URL = re.compile(r"(?<=://)[^\s/@:]*:[^\s/@]+(?=@)")


def secrets_outside(headers: Iterable[tuple[bytes, bytes]], query: bytes) -> frozenset[str]:
    """Credentials in the headers and the query string of a request or an answer."""
    found: list[str] = []
    for raw_name, raw_value in headers:
        name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1").strip()
        if _is_named(name, _ENDINGS_OUTSIDE):
            found += _cookies(value) if _plain(name).endswith("cookie") else _parts(value)
    for name, value in parse_qsl(query.decode("latin-1")):
        if _is_named(name, _ENDINGS_OUTSIDE):
            found.append(value)
    for pair in query.decode("latin-1").split("&"):
        name, _, value = pair.partition("=")
        if _is_named(unquote(name), _ENDINGS_OUTSIDE):
            found.append(value)
    return long_enough(found)


def secrets_inside(body: Any) -> frozenset[str]:
    """Credentials in a JSON body, so that an answer that repeats them is redacted as well."""
    return long_enough(_hidden(body, False))


def long_enough(texts: Iterable[str]) -> frozenset[str]:
    """Those texts that can be looked for in other texts without tearing words out of them."""
    return frozenset(text for text in texts if len(text) >= _SHORTEST)


def redact(value: Any, secrets: Iterable[str]) -> Any:
    """A JSON value without credentials.

    What goes under a credential's name is replaced, as are the `secrets` in any other text and
    what stands before the `@` of a URL.
    """
    # The longest first: one secret may be a part of another.
    return _Redaction(sorted(secrets, key=len, reverse=True)).apply(value, hide=False)


class _Redaction:
    def __init__(self, secrets: list[str]) -> None:
        self._secrets = secrets

    def apply(self, value: Any, hide: bool) -> Any:
        if isinstance(value, dict):
            hide = hide and not _is_schema(value)
            return {self._text(key): self._member(key, each, hide) for key, each in value.items()}
        if isinstance(value, list):
            return [self.apply(each, hide) for each in value]
        if isinstance(value, str):
            return REDACTED if hide and value else self._text(value)
        return REDACTED if hide and _is_number(value) else value

    def _member(self, key: str, value: Any, hide: bool) -> Any:
        hide = hide or _is_named(key, _ENDINGS)
        if key == "arguments" and isinstance(value, str) and not hide:
            return self._arguments(value)
        return self.apply(value, hide)

    def _arguments(self, text: str) -> str:
        """Arguments of a tool call: JSON in a string, left as it was written if it is clean."""
        try:
            given = json.loads(text)
        except (ValueError, RecursionError):
            return self._text(text)
        clean = self.apply(given, hide=False)
        return text if clean == given else json.dumps(clean, ensure_ascii=False)

    def _text(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, REDACTED)
        return _IN_URL.sub(REDACTED, text) if "://" in text else text


def _hidden(value: Any, hide: bool) -> Iterator[str]:
    """Strings under the names of credentials."""
    if isinstance(value, dict):
        hide = hide and not _is_schema(value)
        for key, each in value.items():
            yield from _hidden(each, hide or _is_named(key, _ENDINGS))
    elif isinstance(value, list):
        for each in value:
            yield from _hidden(each, hide)
    elif hide and isinstance(value, str):
        yield from _parts(value)


def _cookies(value: str) -> list[str]:
    """Values of cookies; the short ones are settings, and so are a new cookie's attributes."""
    values = (pair.partition("=")[2].strip() for pair in value.split(";"))
    return [value for value in values if len(value) >= _SHORTEST_COOKIE]


def _parts(value: str) -> list[str]:
    """A credential as it stands, without its scheme, and what is encoded in it."""
    scheme, _, token = value.partition(" ")
    if scheme.lower() not in _SCHEMES:
        return [value]
    if scheme.lower() != "basic":
        return [token.strip()]
    try:
        login = base64.b64decode(token, validate=True).decode("utf-8", "replace")
    except binascii.Error:
        return [token.strip()]
    return [token.strip(), login, login.partition(":")[2]]


def _is_named(name: str, endings: tuple[str, ...]) -> bool:
    return _plain(name).endswith(endings)


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "").removesuffix("s")


def _is_schema(value: dict[str, Any]) -> bool:
    """A tool's description of a parameter that is called, say, "password"."""
    return isinstance(value.get("type"), str) or "$ref" in value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
