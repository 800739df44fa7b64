"""Requests and answers as a record keeps them: the parts that readers need, no credentials."""

import base64
import json
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import UnionType
from typing import Any
from urllib.parse import quote, unquote, unquote_plus

import yaml

from specdec.common.secrets import Text, find_secrets, pattern_parts

# Forms of `recorded_parts.yaml` by name; a bool is an int.
_FORMS: dict[str, Any] = {
    "text": str,
    "number": int | float,
    "plain": str | int | float,
    "object": dict,
    "word": re.compile("[A-Za-z_.-]{1,40}"),
}
_NAMES = {
    "<any>": re.compile("(?s).*"),
    "<count>": re.compile("[a-z_]{1,40}"),
    "<token_id>": re.compile(r"\d{1,9}"),
}


def _one_name_each(form: Any) -> Any:
    if not isinstance(form, dict):
        return form
    return {name: _one_name_each(each) for names, each in form.items() for name in names.split()}


_FORMS |= _one_name_each(
    yaml.safe_load(Path(__file__).with_name("recorded_parts.yaml").read_text("utf-8"))
)


def keep(value: Any, form: str) -> Any:
    """Cut a JSON value down to what is of a form; objects and lists lose their other parts."""
    return next(iter(_fitting(value, form)), {})


def _fitting(value: Any, form: Any) -> list[Any]:
    """Return what fits of a value as a list of one, or an empty list."""
    if value is None:
        return [None] if form else []
    if isinstance(form, str):
        tried = (_fitting(value, _FORMS[name]) for name in form.split(" | "))
        return next(filter(None, tried), [])
    if isinstance(form, re.Pattern):
        return [value] if isinstance(value, str) and form.fullmatch(value) else []
    if isinstance(form, dict) and isinstance(value, dict):
        pairs = ((name, _fitting(each, _form_of(name, form))) for name, each in value.items())
        return [{name: part for name, found in pairs for part in found}]
    if isinstance(form, list) and isinstance(value, list):
        items = [item for each in value for item in _fitting(each, form[0])]
        return [items] if items or not value else []
    is_type = isinstance(form, type | UnionType)
    return [value] if is_type and isinstance(value, form) else []


def _form_of(name: str, form: dict[str, Any]) -> Any:
    """Find the form of what goes under a name; nothing is of that of an unknown one."""
    kinds = (kind for kind, pattern in _NAMES.items() if kind in form and pattern.fullmatch(name))
    return form.get(name) or form.get(next(kinds, ""))


REDACTED = "[redacted]"

# What a name ends with, in lower case and without "-", "_" and a plural's "s".
_CREDENTIAL = re.compile(
    rf"(?:{pattern_parts()['password']}|(?:api|admin|access|secret|private|subscription|auth)key"
    r"|secret|credential|authorization|cookie"
    r"|(?:access|api|auth|authorization|bearer|id|refresh|security|session)token)$"
)
# In headers and queries these are credentials too; in a body they are log probabilities and tools.
_CREDENTIAL_OUTSIDE = re.compile(rf"{_CREDENTIAL.pattern}|(?:key|token|auth|sig|signature)$")
# Shorter ones are placeholders ("EMPTY", "none"), and common words would be torn out of the texts.
_LONG_ENOUGH = re.compile(r"(?s).{8,}|(?=.*\d)(?=.*[A-Za-z]).{6,7}")
# Of other headers a value that looks like a key is taken for one.
_PUBLIC_HEADER = re.compile(
    r"accept(?:-.*)?|cache-control|connection|content-(?:encoding|length|type)|date|expect|host|origin"
    r"|pragma|te|transfer-encoding|upgrade|user-agent|via|sec-(?:ch|fetch)-.*"
)
_KEY_LIKE = re.compile(r"(?=[^0-9]*[0-9])(?=[^A-Za-z]*[A-Za-z])[^\s,;=\"']{12,}|[^\s,;=\"'/:]{20,}")


def secrets_outside(
    headers: Iterable[tuple[bytes, bytes]], query: bytes, named_only: bool = False
) -> frozenset[str]:
    """Find credentials in the headers and the query string of a request or an answer."""
    found: list[str] = []
    for raw_name, raw_value in headers:
        name = raw_name.decode("latin-1").lower()
        try:
            value = raw_value.decode().strip()
        except UnicodeDecodeError:
            value = raw_value.decode("latin-1").strip()
        if _is_named(name, _CREDENTIAL_OUTSIDE):
            found += _cookies(value) if _plain(name).endswith("cookie") else _credentials(value)
        # An answer's id, say, only looks like a key.
        if not named_only and not _PUBLIC_HEADER.fullmatch(name):
            found += _KEY_LIKE.findall(value)
    for pair in re.split("[&;]", query.decode("latin-1")):
        name, _, value = pair.partition("=")
        if _is_named(unquote(name), _CREDENTIAL_OUTSIDE) or _KEY_LIKE.fullmatch(value):
            found += [value, unquote(value), unquote_plus(value)]
    return long_enough(found)


def secrets_inside(body: Any) -> frozenset[str]:
    """Find credentials in a JSON body, so that an answer that repeats them is redacted as well."""
    redaction = _Redaction(())
    redaction.apply(body)
    return long_enough(part for secret in redaction.secrets for part in _credentials(secret))


def long_enough(texts: Iterable[str]) -> frozenset[str]:
    """Keep those texts that can be looked for in others without tearing words out of them."""
    return frozenset(filter(_LONG_ENOUGH.fullmatch, texts))


def redact(value: Any, secrets: Iterable[str]) -> Any:
    """Replace what goes under a credential's name, keys of known forms and named passwords.

    The `secrets` and whatever was found are replaced wherever they are repeated, too.
    """
    redaction = _Redaction(secrets)
    clean = redaction.apply(value)
    return _Redaction(redaction.secrets, only_repeated=True).apply(clean)


class _Redaction:
    def __init__(self, secrets: Iterable[str], only_repeated: bool = False) -> None:
        self.secrets = {*secrets, *(quote(secret, safe="") for secret in secrets)}
        # The longest first: one secret may be a part of another.
        self._known = sorted(long_enough(self.secrets), key=len, reverse=True)
        self._only_repeated = only_repeated

    def apply(self, value: Any, hide: bool = False) -> Any:
        """Put `[redacted]` for credentials, or for all of the value if it is to be hidden."""
        if isinstance(value, dict):
            return self._object(value, hide and not _is_schema(value))
        if isinstance(value, list):
            return [self.apply(each, hide) for each in value]
        if hide and value != "" and type(value) in (str, int, float):
            self.secrets.update([value] if isinstance(value, str) else ())
            return REDACTED
        return self._json(value) if isinstance(value, str) else value

    def _object(self, value: dict[str, Any], hide: bool) -> dict[str, Any]:
        # {"name": "password", "value": "..."} names its value too.
        names = [value.get(key) for key in ("name", "key", "header")]
        names_value = any(isinstance(n, str) and _is_named(n, _CREDENTIAL) for n in names)
        clean = {}
        for key, each in value.items():
            is_secret = hide or (names_value and key == "value")
            if not self._only_repeated:
                is_key = isinstance(each, str) and _KEY_LIKE.fullmatch(each)
                pattern = _CREDENTIAL_OUTSIDE if is_key else _CREDENTIAL
                is_secret = is_secret or _is_named(key, pattern)
            clean[self._text(key)] = self.apply(each, is_secret)
        return clean

    def _json(self, text: str) -> str:
        """Redact JSON in a string, as tool calls have it; it stays as written if it is clean."""
        given = None
        with suppress(ValueError, RecursionError):
            given = json.loads(text) if text.lstrip()[:1] in ("{", "[") else None
        clean = self.apply(given)
        return self._text(text if clean == given else json.dumps(clean, ensure_ascii=False))

    def _text(self, text: str) -> str:
        for secret in self._known:
            text = text.replace(secret, REDACTED)
        if self._only_repeated:
            return text
        read = Text(text)
        find_secrets(read)
        found = [text[start:end] for start, end, _ in read.found]
        # Of a login in a URL, the password alone as well.
        self.secrets.update(found, (each.partition(":")[2] for each in found))
        return read.masked(REDACTED)


def _cookies(value: str) -> list[str]:
    """Find values of cookies; short ones are settings, and so are a new cookie's attributes."""
    values = (pair.partition("=")[2].strip() for pair in value.split(";"))
    return [value for value in values if len(value) >= 16]


def _credentials(value: str) -> list[str]:
    """Return a credential as it stands, or without its scheme, and what is encoded in it."""
    scheme, _, token = value.partition(" ")
    if scheme.lower() not in ("basic", "bearer", "token", "apikey", "key"):
        return [value]
    found = [token.strip()]
    if scheme.lower() == "basic":
        with suppress(ValueError):
            login = base64.b64decode(found[0], validate=True).decode("utf-8", "replace")
            found += [login, login.partition(":")[2]]
    return found


def _is_named(name: str, pattern: re.Pattern[str]) -> bool:
    return bool(pattern.search(_plain(name)))


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "").removesuffix("s")


def _is_schema(value: dict[str, Any]) -> bool:
    """Tell a tool's parameter that is called, say, "password", without any values."""
    types = ("string", "number", "integer", "boolean", "array", "object", "null")
    is_typed = value.get("type") in types or "$ref" in value
    return is_typed and value.keys() <= _FORMS["schema"].keys() - {"enum"}
