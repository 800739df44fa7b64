"""Find secrets in text: keys of known forms, key blocks, and values that a name calls a secret."""

import base64
import html
import re
import tomllib
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

API_KEY, KEY_BLOCK = "<API_KEY>", "<KEY_BLOCK>"

Span = tuple[int, int]
Check = Callable[[re.Match[str]], Span | None]

_RULES = Path(__file__).with_name("secret_rules.toml")
_GITLEAKS = Path(__file__).with_name("gitleaks_rules.txt")
# One character as URLs, JSON and HTML escape it.
_ESCAPED = re.compile(
    r"(?:%|\\u00|\\x)(2[1-9A-Fa-f]|[3-7][0-9A-Fa-f])|&(?:#x[2-7][0-9A-Fa-f]|#\d{2,3}|commat);"
)
_CHARACTER = re.compile(_ESCAPED.pattern + "|.", re.DOTALL)
_DASHES = dict.fromkeys(map(ord, "‐‑‒–—―−﹣－"), "-")
_UNSEEN = dict.fromkeys([0xAD, *range(0x200B, 0x2010), *range(0x202A, 0x202F), 0x2060, 0xFEFF], "")
_BLANK = "\0"  # stands where something was found already, so that no later pattern finds it again


@dataclass(frozen=True)
class Rule:
    pattern: re.Pattern[str]
    mask: str
    words: tuple[str, ...] = ()  # a text without any of them, in lower case, is not searched
    # Span to mask, or None for a match that is none.
    check: Check = lambda match: secret_span(match)


class Text:
    """A text in plain characters (`seen`), in which what was found is blotted out.

    `found` holds the (start, end, mask) of each find, as places in the original.
    """

    def __init__(self, original: str) -> None:
        self.original = original
        self.seen, self._starts, self._ends = _plain(original)
        self.found: list[tuple[int, int, str]] = []
        self._lower = self.seen.lower()

    def find(self, rule: Rule) -> None:
        if rule.words and not any(word in self._lower for word in rule.words):
            return
        parts: list[str] = []
        place, match = 0, rule.pattern.search(self.seen)
        while match:
            resume, span = match.end(), rule.check(match)
            if span is not None and span[0] < span[1]:
                self.note(*span, rule.mask)
                parts += [self.seen[place : span[0]], _BLANK * (span[1] - span[0])]
                place = resume = span[1]  # what is behind a find may be one of its own
            match = rule.pattern.search(self.seen, resume)
        self.seen = "".join([*parts, self.seen[place:]])

    def note(self, start: int, end: int, mask: str) -> None:
        if self._starts:
            start, end = self._starts[start], self._ends[end - 1]
        self.found.append((start, end, mask))

    def masked(self, mask: str | None = None) -> str:
        """Put its mask, or a given one, in the place of every find."""
        parts, place = [], 0
        for start, end, own in sorted(self.found):
            parts += [self.original[place : max(start, place)], mask or own]
            place = max(end, place)
        return "".join([*parts, self.original[place:]])


def find_secrets(text: Text) -> None:
    for rule in _secret_rules():
        text.find(rule)


def read_rules(path: Path, checks: Mapping[str, Check]) -> dict[str, list[Rule]]:
    """Read sections of rules from a TOML file, whose form `secret_rules.toml` describes."""
    parts = pattern_parts(path)

    def rule(row: dict[str, Any]) -> Rule:
        pattern, words = _filled(row["pattern"], parts), tuple(row.get("words", ()))
        check = checks[row["check"]] if "check" in row else secret_span
        return Rule(re.compile(pattern), row.get("mask", API_KEY), words, check)

    sections = tomllib.loads(path.read_text("utf-8"))
    return {name: [rule(row) for row in rows] for name, rows in sections.items() if name != "parts"}


@cache
def pattern_parts(path: Path = _RULES) -> dict[str, str]:
    parts: dict[str, str] = {}
    for name, text in tomllib.loads(path.read_text("utf-8"))["parts"].items():
        parts[name] = _filled(text, parts)
    return parts


def _filled(pattern: str, parts: Mapping[str, str]) -> str:
    """Put parts into a pattern, and take out its layout."""
    joined = "".join(line.lstrip() for line in pattern.split("\n"))
    return re.sub(r"@(\w+)@", lambda part: parts[part[1]], joined)


def secret_span(match: re.Match[str]) -> Span:
    """The span of the group that holds the secret; the whole match without such a group."""
    found = match.groupdict()
    return match.span(next((name for name in ("secret", "bare") if found.get(name)), 0))


@cache
def _secret_rules() -> list[Rule]:
    checks: dict[str, Check] = {
        "login": _login,
        "named": _named,
        "named_key": lambda match: _named(match) if _random(match, shortest=6) else None,
        "random": _random,
    }
    own = read_rules(_RULES, checks)
    return [*own["before"], *_gitleaks_rules(), *own["after"]]


def _gitleaks_rules() -> list[Rule]:
    """The vendored rules; ASCII classes let a key end, and begin, beside a letter of any script."""
    rules = []
    for line in _GITLEAKS.read_text("utf-8").splitlines():
        if not line.startswith("#"):
            _, words, pattern = line.split("\t")
            whole = re.compile(rf"(?<![A-Za-z0-9])(?:{pattern})[A-Za-z0-9_-]*", re.ASCII)
            rules.append(Rule(whole, API_KEY, tuple(words.split())))
    return rules


def _plain(text: str) -> tuple[str, list[int], list[int]]:
    """The text in plain characters, and where each one starts and ends in the original."""
    if text.isascii() and not _ESCAPED.search(text):
        return text, [], []
    plain, starts, ends = list[str](), list[int](), list[int]()
    for match in _CHARACTER.finditer(text):
        new = chr(int(match[1], 16)) if match[1] else html.unescape(match[0])
        if not new.isascii():
            new = unicodedata.normalize("NFKC", new.translate(_DASHES)).translate(_UNSEEN)
            new = "".join(str(unicodedata.decimal(c, c)) for c in new)
        plain.append(new)
        starts += [match.start()] * len(new)
        ends += [match.end()] * len(new)
    return "".join(plain), starts, ends


def _login(match: re.Match[str]) -> Span | None:
    try:
        login = base64.b64decode(match["secret"] + "=" * (-len(match["secret"]) % 4)).decode()
    except ValueError:
        return None
    return match.span("secret") if ":" in login and login.isprintable() else None


def _random(match: re.Match[str], shortest: int = 10) -> Span | None:
    """Accept a key, and no name made of words."""
    span = secret_span(match)
    runs = re.split(r"[^A-Za-z0-9]+", match.string[slice(*span)])
    return span if any(_is_random(run, shortest) for run in runs) else None


def _is_random(run: str, shortest: int) -> bool:
    changes = len(re.findall(r"(?<=[a-z])[A-Z]|(?<=[A-Z])[a-z]", run))
    is_mixed = re.search(r"[A-Za-z]\d|\d[A-Za-z]", run) or changes > max(3, len(run) / 3)
    return bool(is_mixed and len(run) >= shortest) or (
        len(run) >= 16 and run.isalpha() and not changes
    )


def _named(match: re.Match[str]) -> Span | None:
    """Accept a value that is no placeholder, without the punctuation behind it."""
    start, end = secret_span(match)
    value = match.string[start:end].rstrip(" .,:?")
    placeholder = pattern_parts()["placeholder"]
    if len(set(value)) < 3 or re.fullmatch(placeholder, value, re.IGNORECASE):
        return None
    return start, start + len(value)
