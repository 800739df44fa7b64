"""Clean queries: masks for personal data and secrets, near-duplicates, the split and the draw."""

import json
import re
import unicodedata
from collections import Counter
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from zlib import crc32

import numpy as np

from specdec.common.messages import Message, Query, short_hash
from specdec.common.secrets import (
    API_KEY,
    KEY_BLOCK,
    Check,
    Rule,
    Span,
    Text,
    find_secrets,
    read_rules,
)

if TYPE_CHECKING:  # datasketch is an extra
    from datasketch import MinHash

PHONE = "<PHONE>"
MASKS = ("<EMAIL>", PHONE, "<CARD>", "<IBAN>", "<SSN>", API_KEY, KEY_BLOCK)
_RULES = Path(__file__).with_name("personal_rules.toml")

# First digits and lengths of cards that the issuers give out.
_ISSUED = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}"
    r"|3[47]\d{13}|3(?:0[0-5]\d|[68]\d\d)\d{10}|(?:6011|64[4-9]\d|65\d\d|62\d\d|352[89]|35[3-8]\d)\d{12,15}"
)
_SEVEN_DIGITS = re.compile(r"\d(?:\D{0,3}\d){6}")
_ABROAD = re.compile(r"(?<![\d.,+-])00(?=[1-9][\d ()/.-]{7,})")
_DATE = re.compile(r"(?:19|20)\d\d[-/.]\d\d?[-/.]\d\d?|\d\d?[-/.]\d\d?[-/.](?:19|20)?\d\d")
# Up to the number; other things than telephones have numbers too.
_PHONE_CUE = re.compile(
    r"(?:\b(?:phone|call|text|tel|mobile|cell|whatsapp|sms|fax|dial|ring)\b|telef[oó]no?|t[eé]l[eé]phone|téléfono"
    r"|\b(?:handy(?:nummer)?|rufnummer|mobil|m[oó]vil|celular|cellulare|portable|telefoon|puhelin|komórka)\b"
    r"|телефон|电话|手机|電話|携帯|전화|휴대폰)"
    r"(?:(?!order|invoice|ticket|account|reference|booking|case|tracking|\bid\b|#)\D){0,24}$",
    re.IGNORECASE,
)
_CUE_REACH, _MIN_CUED_DIGITS = 40, 9
_SHINGLE_LEN, _NUM_PERM = 5, 64
_WEIGHTS = (0.1, 0.9)  # of false positives, which are compared exactly, and of negatives
_SLACK = 3.0  # standard errors of the estimate below the threshold: comparing is a waste


class Masker:
    """Replaces personal data and secrets by placeholders, and counts them.

    Digits alone are no phone number unless a word such as "call" stands before them, and no card
    number without an issuer's first digits, its length and a right check digit (Luhn), so that
    order numbers, dates and prices stay.
    """

    def __init__(self, phone_region: str = "US"):
        from phonenumbers import SUPPORTED_REGIONS

        if phone_region not in SUPPORTED_REGIONS:
            raise ValueError(f"phone_region is {phone_region!r} but must be a region, such as US")
        self.counts: Counter[str] = Counter()
        self._region = phone_region

    def mask(self, text: str) -> str:
        read = Text(text)
        find_secrets(read)
        for rule in _personal_rules():
            read.find(rule)
        if _SEVEN_DIGITS.search(read.seen):  # the matcher is slow
            self._find_phones(read)
        self.counts.update(mask for _, _, mask in read.found)
        return read.masked()

    def _find_phones(self, read: Text) -> None:
        from phonenumbers import Leniency, PhoneNumberMatcher, is_valid_number

        # "0044 ..." is how "+44 ..." is dialed.
        dialed = _ABROAD.sub(" +", read.seen)
        for match in PhoneNumberMatcher(dialed, self._region, leniency=Leniency.POSSIBLE):
            is_cued = not match.raw_string.isdigit() or _follows_cue(read.seen, match.start)
            if is_cued and is_valid_number(match.number):
                read.note(match.start, match.end, PHONE)


@cache
def _personal_rules() -> list[Rule]:
    checks: dict[str, Check] = {"called": _called, "card": _card, "iban": _iban}
    return read_rules(_RULES, checks)["rules"]


def _called(match: re.Match[str]) -> Span | None:
    digits = sum(map(str.isdigit, match[0]))
    is_phone = digits >= _MIN_CUED_DIGITS and not _DATE.match(match[0])
    return match.span() if is_phone and _follows_cue(match.string, match.start()) else None


def _follows_cue(text: str, start: int) -> bool:
    return bool(_PHONE_CUE.search(text[max(0, start - _CUE_REACH) : start]))


def _card(match: re.Match[str]) -> Span | None:
    """Accept digits up to the last gap that leaves a card number; a security code may follow."""
    from stdnum import luhn

    ends = [len(match[0]), *(gap.start() for gap in re.finditer(r"\D+", match[0]))]
    for end in sorted(ends, reverse=True):
        digits = re.sub(r"\D", "", match[0][:end])
        if _ISSUED.fullmatch(digits) and luhn.is_valid(digits):
            return match.start(), match.start() + end
    return None


def _iban(match: re.Match[str]) -> Span | None:
    """Accept the longest beginning with right check digits; a word may follow a number."""
    from stdnum import iban

    for end in range(len(match[0]), 14, -1):
        if match[0][end - 1].isalnum() and iban.is_valid(match[0][:end]):
            return match.start(), match.start() + end
    return None


def _plain(text: str) -> str:
    """Drop what near-duplicates differ in: case, width and runs of white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def query_id(messages: tuple[Message, ...], text: str) -> str:
    return short_hash(json.dumps([messages, text], sort_keys=True))


def conversation_id(messages: tuple[Message, ...], text: str) -> str:
    """Hash the first user's turn, without case, punctuation and the values of numbers."""
    first = next((turn["content"] for turn in messages if turn["role"] == "user"), text)
    words = re.sub(r"[\W_]+", " ", re.sub(r"\d+(?:[.,]\d+)*", "0", _plain(first))).strip()
    return short_hash(words or first)


def split_of(conversation: str, held_out: float) -> str:
    """Split by hash alone: a larger share holds out all that a smaller one does."""
    return "held_out" if int(conversation, 16) < held_out * 16 ** len(conversation) else "train"


def sample_rank(query: str, seed: int) -> str:
    """Make the key that orders a draw: its first 500 are among its first 2,000."""
    return short_hash(f"{seed}:{query}")


class NearDuplicates:
    """Queries that were seen, and whether another one is nearly one of them.

    Two queries are near-duplicates if both their last user turns and all that stands before these
    have at least `threshold` of their runs of five characters in common (Jaccard similarity).
    Comparing them apart keeps the turns of one long conversation. System messages do not count.

    Source: Broder 1997, On the resemblance and containment of documents.
    """

    def __init__(self, threshold: float):
        from datasketch import MinHash, MinHashLSH

        self._threshold = threshold
        error = (threshold * (1 - threshold) / (_NUM_PERM / 2)) ** 0.5
        self._least_estimate = threshold - _SLACK * error
        self._index = MinHashLSH(min(threshold, 0.99), _NUM_PERM, weights=_WEIGHTS)
        self._blank = MinHash(_NUM_PERM, hashfunc=crc32)
        self._seen: list[tuple[Query, MinHash]] = []

    def seen(self, query: Query) -> Query | None:
        """Find the earlier query that this one nearly repeats; without any it is added."""
        context, last = _parts(query)
        sketch = self._sketch(context, last)
        for index in sorted(self._index.query(sketch)):
            earlier, its_sketch = self._seen[index]
            if its_sketch.jaccard(sketch) < self._least_estimate:
                continue
            pairs = zip(_parts(earlier), (context, last), strict=True)
            if all(_similarity(*pair) >= self._threshold for pair in pairs):
                return earlier
        self._index.insert(len(self._seen), sketch, check_duplication=False)
        self._seen.append((query, sketch))
        return None

    def _sketch(self, context: str, last: str) -> "MinHash":
        """Take hashes of both parts in turn: a band of them agrees only where both parts do."""
        sketch = self._minima(last)
        if context:
            both = np.empty_like(sketch.hashvalues)
            both[0::2] = sketch.hashvalues[: _NUM_PERM // 2]
            both[1::2] = self._minima(context).hashvalues[: _NUM_PERM // 2]
            sketch.hashvalues = both
        return sketch

    def _minima(self, text: str) -> "MinHash":
        sketch = self._blank.copy()
        sketch.update_batch([run.encode() for run in _shingles(text)])
        return sketch


def _parts(query: Query) -> tuple[str, str]:
    before = (turn["content"] for turn in query.messages[:-1] if turn["role"] != "system")
    return _plain(" ".join(before)), _plain(query.last_turn)


def _shingles(text: str) -> set[str]:
    return {text[i : i + _SHINGLE_LEN] for i in range(max(1, len(text) - _SHINGLE_LEN + 1))}


def _similarity(one: str, other: str) -> float:
    if one == other:
        return 1.0
    first, second = _shingles(one), _shingles(other)
    return len(first & second) / len(first | second)
