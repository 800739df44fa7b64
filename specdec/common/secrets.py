"""Finds secrets in text: keys of known forms, key blocks, and what a name calls a secret."""

import base64
import html
import re
import unicodedata
from collections.abc import Callable
from functools import cache
from pathlib import Path

API_KEY, PRIVATE_KEY = "<API_KEY>", "<KEY_BLOCK>"

_RULES = Path(__file__).with_name("gitleaks_rules.txt")
# One character in other clothes: as URLs, JSON and HTML write it.
_ESCAPED = re.compile(
    r"(?:%|\\u00|\\x)(2[1-9A-Fa-f]|[3-7][0-9A-Fa-f])|&(?:#x[2-7][0-9A-Fa-f]|#\d{2,3}|commat);"
)
_CHARACTER = re.compile(_ESCAPED.pattern + "|.", re.DOTALL)
_DASHES = dict.fromkeys(map(ord, "‐‑‒–—―−﹣－"), "-")
_UNSEEN = dict.fromkeys([0xAD, *range(0x200B, 0x2010), *range(0x202A, 0x202F), 0x2060, 0xFEFF], "")
_BLANK = "\0"  # stands where something was found already, so that no later pattern finds it again

# A block without an end (a cut log line) is masked as far as its headers and its base64 go.
_KEY_BLOCK = re.compile(
    r"-{4,5} ?BEGIN (?P<kind>[A-Z0-9 ]{0,30}(?:PRIVATE KEY(?: BLOCK)?|PGP MESSAGE)) ?-{4,5}"
    r"(?:.{0,12000}?-{4,5} ?END (?P=kind) ?-{4,5}"
    r"|(?:(?:\s|\\[nr])*[\w-]{3,20}: [^\n\\]*)*[A-Za-z0-9+/=\s\\]*)"
    r"|PuTTY-User-Key-File-\d:(?:.{0,12000}?Private-MAC: *[0-9a-fA-F]+|[^\0]{0,12000})",
    re.DOTALL,
)
_SURE_KEY = re.compile(
    r"(?<![A-Za-z0-9])(?:sk-(?:ant|proj|or|svcacct|admin)-|gh[opusr]_|github_pat_|glpat-|gsk_|nvapi-"
    r"|dckr_pat_|r8_|hvs\.|xox[a-z]-)[\w-]{8,}",
    re.ASCII,
)
# Keys by how they begin, whatever their length: gitleaks' rules, of more vendors, are stricter.
# Digits among letters tell a key from a hyphenated word.
_KEY = re.compile(
    r"""(?<![A-Za-z0-9])(?:
    eyJ[\w-]{8,}(?:\.[\w-]*){2,4} | eyJ[\w+/-]{40,}={0,2}  # JSON web tokens, signed or encrypted
    | (?:sk|pk|rk|fk|csk|gsk|xai|nvapi|r8|hf|pplx|fw|tgp|tvly|pcsk|lsv2|jina|e2b|fc|re|phx|phc
      |voyage|pa|api_org|gh[opusr]|github_pat|gl[a-z]{1,5}|dckr_(?:pat|oat)|npm|pypi|rubygems
      |xox[a-z](?:\.xox[bp])?|xapp|hv[sbr]|dapi|do[opr]_v1|dp\.[a-z]{2,5}|lin_(?:api|oauth)|secret
      |ntn|PMAK|shp[a-z]{2}|sq0[a-z]{3}|HRKU|NR[A-Z]{2}|sntry[su]|sb[ap]|sb_(?:secret|publishable)
      |tskey|whsec|key|figd|apify_api|pul|pscale|bkua|vcp|nfp|rnd|CFPAT|pnu|rdme|xkeysib|xsmtpsib
      |dt0c01|ico|duffel|waka|ops|sgp|fo1|fm2|ls|api|tok|AQ|SG|ya29|GOCSPX)
      [-_.] [\w.=-]{18,}
    | (?:sk|rk|xai|hf|hv[sbr]|pplx|tgp|npm|whsec|tskey|PMAK|shp[a-z]{2}|sq0[a-z]{3}|gls?[ac])
      [-_.] [\w.=-]{10,}
    | [a-z]{2,12}[-_](?:live|test|prod|proj|pat|key|secret|token|v\d)[-_]
      (?=[\w-]{0,99}\d) [A-Za-z0-9_-]{24,}
    | (?:AIza|1//0|EAA|LTAI|AT(?:ATT3|CTT3|BB)|ABSK|AGE-SECRET-KEY-1) [\w+/-]{16,}
    | (?:AKIA|ASIA|ABIA|ACCA|AROA|AIDA)[0-9A-Z]{16}(?![0-9A-Za-z])
    | (?:AC|SK|dapi)[0-9a-f]{32}(?![0-9A-Za-z]) | [0-9a-f]{32}-us\d{1,2}(?!\d)
    | s\.(?=\w*\d)[A-Za-z0-9]{24}(?![0-9A-Za-z]) | \d{15,16}\|[\w-]{27,40}
    | (?:bot)?\d{8,10}:[\w-]{35}(?![\w-]) | [MNO][\w-]{23,27}\.[\w-]{6}\.[\w-]{27,40}
    )[A-Za-z0-9_=-]*""",
    re.VERBOSE | re.ASCII,
)
_HOOK = re.compile(
    r"(?:hooks\.slack\.com/(?:services|workflows|triggers)|discord(?:app)?\.com/api/(?:v\d+/)?webhooks"
    r"|webhook\.office\.com/webhookb2|api\.telegram\.org)/(?P<secret>[\w@:/+-]{12,})",
    re.IGNORECASE,
)
_LOGIN = re.compile(
    r"(?<![A-Za-z0-9])[a-z][a-z0-9+.-]{1,18}://"
    r"(?P<secret>[^\s/:@\"'<>\0]{0,128}:[^\s/\"'<>\0]{1,128}"
    r"|(?=[\w.~-]{0,128}\d)[\w.~-]{12,128})(?=@)",
    re.IGNORECASE,
)
_AWS_SECRET = re.compile(
    r"(?<![A-Za-z0-9/+=])(?=[^\0]{0,39}[A-Z])(?=[^\0]{0,39}[a-z])(?=[^\0]{0,39}[0-9/+])"
    r"(?P<secret>[A-Za-z0-9/+]{40})(?![A-Za-z0-9/+=])"
)
_AWS_NEAR = re.compile(r"A[KS]IA[0-9A-Z]{16}|aws|secret.?access", re.IGNORECASE)
_BASIC = re.compile(
    r"(?<![A-Za-z0-9])basic[ ]+(?P<secret>[A-Za-z0-9+/_-]{6,}={0,2})", re.IGNORECASE
)
_VALUE = r"[^\s\0\"'`<>,;，。、；「」『』“”„«»()\[\]{}\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]"
_NO_VALUE = (
    r"(?!(?:your|my|the|some|new|old|insert|enter|example|dummy|placeholder|changeme|redacted)"
    r"[-_]?\w*\b"
    r"|[xX*.•_-]+(?![\w])|[$%{<\[])"
)
# After "bearer" alone a word is prose.
_BEARER = re.compile(
    r"(?<![A-Za-z0-9])(?i:bearer|ssws)[: ]{1,3}"
    r"(?![A-Za-z]?[a-z]{0,18}(?:[-.][a-z]+)*[.:]?(?![\w~.+/=-]))"
    rf"(?i:{_NO_VALUE})(?P<secret>[\w.~+/=-]{{8,}})",
    re.ASCII,
)
_AUTHORIZATION = re.compile(
    r"authorization\\?[\"']?\s{0,2}[:=]\s{0,2}\\?[\"']?(?:bearer|basic|token|api-?key|key"
    r"|digest|negotiate|ntlm|aws4-hmac-sha256|hmac|oauth|splunk|genie-?key|bot)[ ]+"
    rf"{_NO_VALUE}(?P<secret>[^\n\"'\\\0]{{6,}})",
    re.IGNORECASE | re.ASCII,
)
_COOKIE = re.compile(
    r"cookie\\?[\"']?\s{0,2}:\s{0,2}\\?[\"']?(?=[\w.-]+=)(?P<secret>[^\n\"'\\\0]{8,})",
    re.IGNORECASE,
)
# What follows is kept apart from what leads to it, so that a query still reads as it did.
PASSWORD = (
    r"(?:pass(?:word|wd|phrase|code|wort)s?|pswd|psw|pwd|kennwort|losungswort"
    r"|contrase(?:[nñ]|ny)a|clave(?:\s+de\s+\w+)?|mots?[\s_-]?de[\s_-]?passe|mdp|senha"
    r"|palavra[\s_-]?passe|parol[aăe](?:\sd['’]ordine)?|has[lł]o|wachtwoord|[sş]ifre(?:m|niz)?"
    r"|l[öo]senord|passord|adgangskode|salasana|heslo|jelsz[óo]"
    r"|пароль|пароля|κωδικός|كلمة\s(?:المرور|السر)|סיסמה|पासवर्ड|mật\s*khẩu"
    r"|密[码碼]|口令|パスワード|暗証番号|비밀번호|비번|암호|รหัสผ่าน)"
)
_IS = (
    r"(?:[\"'`*\s\\]{0,4}(?:[:=→⇒]|:=|=>|->)[*]{0,2}|>(?=[^<\s]{3,80}</)|\s[-|]\s"
    r"|\s[(\[]|\((?=[\"'])|['’]s\s"
    r"|\s{0,2}(?:は|が|是|为|為|는|은|이)\s{0,2}[:=]?"
    r"|(?:\s+[^\s.:=;!?]{1,20}){0,4}?\s+(?:is|was|ist|lautet|es|est|è|é|jest|to|är|er|on|je"
    r"|este|olarak|это|,?\s?c['’]est|है|ist\snun|is\s+now|is\s+set\s+to|to\s+be|to)\s*:?"
    r"|(?:\s+[^\s.:=;!?]{1,20}){1,3}\s?[:=]"
    r"|\s+(?=[\"'`„“«「]?[^\s:=]{0,80}[A-Za-z])(?=[\"'`„“«「]?[^\s:=]{0,80}\d)"
    r"(?=[^\s:=]{6,}(?![^\s.!?])|[\"'`„“«「]))"
)
_NAMED_PASSWORD = re.compile(
    rf"(?:{PASSWORD}{_IS}|(?<![a-z])(?:pass|pw|pin(?:\s?code)?)(?:[\"'\s]{{0,3}}[:=]|\sis\s))"
    r"\s{0,2}(?:\\?[\"'`“„«「『]\s?(?P<secret>[^\n\"'`“”»」』\\\0]{3,80})[\"'`“”»」』\\]"
    rf"|{_NO_VALUE}(?P<bare>(?={_VALUE}{{0,80}}[\d!@#$%^&*+~]){_VALUE}{{4,80}}))",
    re.IGNORECASE,
)
_PASSWORD_BEFORE = re.compile(
    rf"(?<![^\s\"'`(])(?P<secret>(?={_VALUE}{{0,80}}[\d!@#$%^&*+~]){_VALUE}{{4,80}})[\"'`]?\s+(?:as|is|was)\s+"
    r"(?:my|the|our|your|his|her|a)\s+(?:\w+\s+){0,2}(?:password|passphrase|passcode)\b",
    re.IGNORECASE,
)
_NAMED_KEY = re.compile(
    r"(?:(?:api|access|secret|private|auth|admin|account|shared[_-]?access|subscription"
    r"|signing|encryption|master|service|client|storage|license|app|bot|deploy|functions)?"
    r"[_\s.-]?(?<![a-z])(?:key|token|secret|credentials?|pat|auth)(?![a-z])"
    r"|(?:api|access|secret|private|auth|account|client|shared[_-]?access|app|session|bearer"
    r"|refresh)(?:key|token|secret|signature)|authorization|(?<=[?&])(?:sig|code|auth|[\w-]*signature|x-amz-credential))"
    r"(?:[\"'\s\\]{0,4}(?:[:=>]|:=|=>)|\s+is:?(?=\s))\s{0,2}\\?[\"'`]?"
    rf"{_NO_VALUE}(?P<secret>[\w.~+/=%-]{{8,}}+)(?!\()",
    re.IGNORECASE | re.ASCII,
)
# NAME=value lines and Name=value; lists: what they call a secret needs no digit.
_SETTING = re.compile(
    r"(?:(?<![A-Za-z0-9])[A-Z][A-Z0-9_]{0,60}_(?:(?:KEY|TOKEN|PAT|AUTH)(?==)|SECRET(?:_KEY)?"
    r"|PASS|PASSWORD|PASSWD|PWD|PASSPHRASE|CREDENTIALS?|DSN)|(?<=[;?&])\s?(?i:password|passwd|pwd|accountkey|sharedaccesskey)"
    r"|(?<![A-Za-z0-9])(?:PASSWORD|SECRET(?:_KEY)?|TOKEN|PGPASSWORD))"
    r"[ ]?[:=][ ]?\\?[\"']?" + _NO_VALUE + r"(?P<secret>[^\s\"'\\;\0$()<>\[\]{},]{6,})"
)
_COMMAND = re.compile(
    r"(?:(?<![\w-])--?(?:[a-z-]{0,30}-)?(?:password|passwd|token|secret|api-?key)"
    r"(?:=|[ ](?=\S{0,80}[\d!@#$%^&*]))|\bsshpass\s+-p\s?"
    r"|\bcurl\b[^\n\0]{0,200}?\s(?:-u|--user)[= ]?[\"']?[^\s:\"']{1,64}:"
    r"|\bmysql(?:dump|admin)?\b[^\n\0]{0,100}?\s-p|\blogin\s+\S{1,64}\s+password\s"
    r"|\b(?:identified\s+by|with\s+password|encrypted\s+password)\s(?=[\"']))\s?[\"']?"
    rf"{_NO_VALUE}(?P<secret>[^\s\"'`$<>{{}}\\\0]{{3,}})",
    re.IGNORECASE,
)
# Words that stand where a value would: types, defaults, and what code calls its own variables.
_PLACEHOLDER = re.compile(
    r"(?:pass(?:word|wd|code)?|pwd|secret|token|key|string|str|text|bytes|int|number|boolean|bool"
    r"|null|none|nil|true|false|undefined|required|optional|hidden|empty|unknown|change_?me|default"
    r"|example|test|todo|tbd|n/?a|username|user|input|value|env|type|name|self|request|config"
    r"|settings|args|getpass|redacted|masked|[x*.•#-]+|\[?redacted\]?|\d{1,3}|\d+-\w+"
    r"|(?:sha|md|base|aes|utf-?|oauth|ipv|v|web|http|html|python|win|rfc)[\d._-]+(?:[-_]\w+)?"
    r"|[\w-]*(?:_|\.)(?:password|passwd|pwd|secret|token|key|pass)"
    r"|(?:self|os|request|req|config|settings|args|process|env|options|params|data|form|user|this"
    r"|app)\.[\w.]+)",
    re.IGNORECASE,
)


def _span(match: re.Match[str]) -> tuple[int, int]:
    """Where the group that holds the secret is; all of it where there is none."""
    found = match.groupdict()
    return match.span(next((name for name in ("secret", "bare") if found.get(name)), 0))


class Text:
    """A text as patterns read it: in plain characters, with what was found blotted out.

    Attributes:
        seen: the text in NFKC, with ASCII dashes, without invisible characters and escapes.
        found: (start, end, mask) of each find, as places in the original.
    """

    def __init__(self, original: str) -> None:
        self.original = original
        self.seen, self._starts, self._ends = _plain(original)
        self.found: list[tuple[int, int, str]] = []

    def take(
        self,
        pattern: re.Pattern[str],
        mask: str,
        span: Callable[[re.Match[str]], tuple[int, int] | None] = _span,
    ) -> None:
        """Note what a pattern finds: where `span` says that the secret is."""
        parts: list[str] = []
        place, match = 0, pattern.search(self.seen)
        while match:
            resume, found = match.end(), span(match)
            if found is not None and found[0] < found[1]:
                self.note(*found, mask)
                parts += [self.seen[place : found[0]], _BLANK * (found[1] - found[0])]
                place = resume = found[1]  # what is behind a find may be one of its own
            match = pattern.search(self.seen, resume)
        self.seen = "".join([*parts, self.seen[place:]])

    def note(self, start: int, end: int, mask: str) -> None:
        """Note a find at places of `seen`."""
        if self._starts:
            start, end = self._starts[start], self._ends[end - 1]
        self.found.append((start, end, mask))

    def masked(self, mask: str | None = None) -> str:
        """The original with its mask, or with a given one, for every find."""
        parts, place = [], 0
        for start, end, own in sorted(self.found):
            parts += [self.original[place : max(start, place)], mask or own]
            place = max(end, place)
        return "".join([*parts, self.original[place:]])


def take_secrets(text: Text) -> None:
    """Find keys, key blocks and passwords."""
    text.take(_KEY_BLOCK, PRIVATE_KEY)
    for led in (_AUTHORIZATION, _BEARER, _COOKIE, _LOGIN, _HOOK):
        text.take(led, API_KEY)
    lower = text.seen.lower()
    for words, rule in _rules():
        if any(word in lower for word in words):
            text.take(rule, API_KEY)
    text.take(_SURE_KEY, API_KEY)
    text.take(_KEY, API_KEY, _random)
    text.take(_BASIC, API_KEY, _basic)
    for named in (_COMMAND, _NAMED_PASSWORD, _PASSWORD_BEFORE, _SETTING):
        text.take(named, API_KEY, _named)
    text.take(_NAMED_KEY, API_KEY, _named_key)
    if _AWS_NEAR.search(text.original):
        text.take(_AWS_SECRET, API_KEY)


@cache
def _rules() -> tuple[tuple[tuple[str, ...], re.Pattern[str]], ...]:
    """The words that a text must hold, and the pattern, of each vendored rule.

    ASCII classes let a key end, and begin, beside a letter of another script.
    """
    rows = (line.split("\t") for line in _RULES.read_text("utf-8").splitlines() if line[:1] != "#")
    return tuple(
        (tuple(words.split()), re.compile(rf"(?<![A-Za-z0-9])(?:{rule})[A-Za-z0-9_-]*", re.ASCII))
        for _, words, rule in rows
    )


def _plain(text: str) -> tuple[str, list[int], list[int]]:
    """The text in plain characters, and of each where it starts and ends in the original."""
    if text.isascii() and not _ESCAPED.search(text):
        return text, [], []
    plain: list[str] = []
    starts: list[int] = []
    ends: list[int] = []
    for match in _CHARACTER.finditer(text):
        new = chr(int(match[1], 16)) if match[1] else html.unescape(match[0])
        if not new.isascii():
            new = unicodedata.normalize("NFKC", new.translate(_DASHES)).translate(_UNSEEN)
            new = "".join(str(unicodedata.decimal(c, c)) for c in new)
        plain.append(new)
        starts += [match.start()] * len(new)
        ends += [match.end()] * len(new)
    return "".join(plain), starts, ends


def _basic(match: re.Match[str]) -> tuple[int, int] | None:
    """Base64 of `user:password`."""
    try:
        login = base64.b64decode(match["secret"] + "=" * (-len(match["secret"]) % 4)).decode()
    except ValueError:
        return None
    return match.span("secret") if ":" in login and login.isprintable() else None


def _random(match: re.Match[str], shortest: int = 10) -> tuple[int, int] | None:
    """A key, and no name made of words."""
    span = _span(match)
    runs = re.split(r"[^A-Za-z0-9]+", match.string[slice(*span)])
    return span if any(_is_random(run, shortest) for run in runs) else None


def _is_random(run: str, shortest: int) -> bool:
    changes = len(re.findall(r"(?<=[a-z])[A-Z]|(?<=[A-Z])[a-z]", run))
    is_mixed = re.search(r"[A-Za-z]\d|\d[A-Za-z]", run) or changes > max(3, len(run) / 3)
    return bool(is_mixed and len(run) >= shortest) or (
        len(run) >= 16 and run.isalpha() and not changes
    )


def _named_key(match: re.Match[str]) -> tuple[int, int] | None:
    return _named(match) if _random(match, shortest=6) else None


def _named(match: re.Match[str]) -> tuple[int, int] | None:
    start, end = _span(match)
    value = match.string[start:end].rstrip(" .,:?")
    if not value or _PLACEHOLDER.fullmatch(value) or len(set(value)) < 3:
        return None
    return start, start + len(value)
