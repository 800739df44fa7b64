"""Masks for what must not leave a log: addresses, numbers that name people, and secrets."""

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from specdec.common.messages import Message
from specdec.common.secrets import API_KEY, PRIVATE_KEY, Text, take_secrets
from specdec.data.conversation import Query

EMAIL, PHONE, CARD, IBAN, SSN = ("<EMAIL>", "<PHONE>", "<CARD>", "<IBAN>", "<SSN>")

MASKS = (EMAIL, PHONE, CARD, IBAN, SSN, API_KEY, PRIVATE_KEY)

# Letters that words are set apart by: an address may stand between others without a space.
_L = r"A-Za-zÀ-ÖØ-öø-ʯͰ-ԯ"
_START = rf"(?<![{_L}0-9.%+-])(?!git@[\w.-]+:)"
_LABEL, _TLD = rf"[{_L}0-9-]{{1,63}}", rf"[{_L}]{{2,24}}(?![{_L}0-9])"
_NAME = rf"[{_L}0-9_.%+'-]{{1,64}}"
_AT = (
    r"(?:\s?[(\[{<]\s?(?:at|@|arroba|ät)\s?[)\]}>]\s?|\s?-at-\s?|\s+(?:@|AT|arroba)\s+"
    r"|\s+at\s+(?=[\w-]+\s+dot\s)|@(?=[^\s@]{1,63}?(?:\s+dot\s|\s?[(\[{])))"
)
_DOT = r"(?:[.。]|\s?[(\[{<]\s?(?:dot|punkt|punto|\.)\s?[)\]}>]\s?|\s?-dot-\s?|\s+(?:dot|DOT)\s+)"
_NO_FILE = (
    r"(?<!\.(?:txt|csv|pdf|log|xml|yml|zip|png|jpg))(?<!\.(?:html|json|yaml))(?<!\.(?:py|js|md))"
)
_EMAILS = (
    re.compile(rf"{_START}{_NAME}@(?:(?:{_LABEL}[.。]){{1,8}}{_TLD}|xn--[a-z0-9-]+)"),
    # "jane (at) mail (dot) org"; " at " alone where the name is no word, or a word tells of mail.
    re.compile(rf"{_START}{_NAME}{_AT}(?:{_LABEL}{_DOT}){{1,6}}{_TLD}"),
    re.compile(
        rf"{_START}[{_L}]+(?:[._][{_L}]+\d*|\d+){_NO_FILE}\s+at\s+(?:{_LABEL}\.){{1,6}}"
        r"(?:com|org|net|edu|gov|de|fr|es|it|nl|pl|br|pt|uk|ru|jp|cn|kr|in|ch|at|se|io|me)(?![\w-])"
    ),
    re.compile(
        r"\b(?:e-?mail|contact|reach|write(?:\s+to)?)\b[:\s]{1,3}(?:(?:is|me|us)\b:?\s+)?"
        rf"(?!(?:me|us|you|him|her|them|it|is)\b)(?P<secret>{_NAME}\s+at\s+(?:{_LABEL}\.){{1,6}}{_TLD})",
        re.IGNORECASE,
    ),
    # Of other scripts, whose words have no spaces between them.
    re.compile(r"(?<![\w.%+-])(?!git@)[\w.%+-]{1,64}@(?:[\w-]{1,63}[.。]){1,8}[^\W\d_]{2,24}"),
)
_CARD = re.compile(
    r"(?<![\d,-])(?<!\d\.)(?:\d(?:[ -]?\d){12,18}|\d{4}(?P<gap>\s?[.,/_·-]\s?|\s{1,3})"
    r"(?:\d{4}(?P=gap)\d{4}(?P=gap)\d{1,7}|\d{6}(?P=gap)\d{4,5}))(?!\d|[-.,]\d)"
)
# By their first digits: lengths that the issuer gives out.
_ISSUERS = (
    (re.compile(r"4"), {13, 16, 19}),
    (re.compile(r"5[1-5]|2(?:22[1-9]|2[3-9]|[3-6]|7[01]|720)"), {16}),
    (re.compile(r"3[47]"), {15}),
    (re.compile(r"3(?:0[0-5]|[68])"), {14}),
    (re.compile(r"6011|64[4-9]|65|62|35(?:2[89]|[3-8])"), {16, 17, 18, 19}),
)
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{2}\d{2}(?:[ -]?[A-Za-z0-9]){11,30}", re.ASCII)
_SSN = re.compile(
    r"(?<![\w-])(?!000|666|9)\d{3}(?P<gap>[- ])(?!00)\d\d(?P=gap)(?!0000)\d{4}(?![\w-])"
    r"|(?:\bssn|social security(?: number)?)\W{0,3}(?:is|no\.?|number|#)?\W{0,3}"
    r"(?P<secret>\d{9})(?!\d)",
    re.IGNORECASE,
)
_SEVEN_DIGITS = re.compile(r"\d(?:\D{0,3}\d){6}")
_ABROAD = re.compile(r"(?<![\d.,+-])00(?=[1-9][\d ()/.-]{7,})")
_CUED_NUMBER = re.compile(r"[+(]{0,2}\d(?:[ ()/.-]{0,3}\d){6,15}(?!\d)")
# Up to the number; other things than telephones have numbers too.
_PHONE_CUE = re.compile(
    r"(?:\b(?:phone|call|text|tel|mobile|cell|whatsapp|sms|fax|dial|ring)\b|telef[oó]no?|t[eé]l[eé]phone|téléfono"
    r"|\b(?:handy(?:nummer)?|rufnummer|mobil|m[oó]vil|celular|cellulare|portable|telefoon|puhelin|komórka)\b"
    r"|телефон|电话|手机|電話|携帯|전화|휴대폰)"
    r"(?:(?!order|invoice|ticket|account|reference|booking|case|tracking|\bid\b|#)\D){0,24}$",
    re.IGNORECASE,
)
_CUE_REACH = 40
_MIN_CUED_DIGITS = 9
_DATE = re.compile(r"(?:19|20)\d\d[-/.]\d\d?[-/.]\d\d?|\d\d?[-/.]\d\d?[-/.](?:19|20)?\d\d")

PHONE_REGION = "US"


class Masker:
    """Replaces personal data and secrets by placeholders, and counts them.

    Digits alone are no phone number unless a word such as "call" stands before them, and no card
    number without an issuer's first digits, its length and a right check digit (Luhn), so that
    order numbers, dates and prices stay.

    Attributes:
        counts: of each placeholder, how often it was put.
    """

    def __init__(self, phone_region: str = PHONE_REGION):
        """Read national phone numbers as those of a region.

        Args:
            phone_region: two capital letters (ISO 3166); numbers with + are found anywhere.

        Raises:
            ValueError: a region that has no phone numbers.
        """
        from phonenumbers import SUPPORTED_REGIONS

        if phone_region not in SUPPORTED_REGIONS:
            raise ValueError(
                f"phone_region is {phone_region!r} but must be a region's two capital letters (US)"
            )
        self.counts: Counter[str] = Counter()
        self._region = phone_region

    def mask(self, text: str) -> str:
        """The text with a placeholder for every find."""
        read = Text(text)
        take_secrets(read)
        for pattern in _EMAILS:
            read.take(pattern, EMAIL)
        read.take(_IBAN, IBAN, _iban)
        read.take(_CARD, CARD, _card)
        read.take(_SSN, SSN)
        read.take(_CUED_NUMBER, PHONE, _cued)
        if _SEVEN_DIGITS.search(read.seen):  # the matcher is slow
            self._take_phones(read)
        self.counts.update(mask for _, _, mask in read.found)
        return read.masked()

    def _take_phones(self, read: Text) -> None:
        from phonenumbers import Leniency, PhoneNumberMatcher, is_valid_number

        # "0044 ..." is how "+44 ..." is dialed.
        dialed = _ABROAD.sub(" +", read.seen)
        for match in PhoneNumberMatcher(dialed, self._region, leniency=Leniency.POSSIBLE):
            is_cued = not match.raw_string.isdigit() or _cue_before(read.seen, match.start)
            if is_cued and is_valid_number(match.number):
                read.note(match.start, match.end, PHONE)


def _cued(match: re.Match[str]) -> tuple[int, int] | None:
    """A number behind a word such as "call", in whatever country it is written so."""
    digits = sum(map(str.isdigit, match[0]))
    is_phone = digits >= _MIN_CUED_DIGITS and not _DATE.match(match[0])
    return match.span() if is_phone and _cue_before(match.string, match.start()) else None


def _cue_before(text: str, start: int) -> bool:
    return bool(_PHONE_CUE.search(text[max(0, start - _CUE_REACH) : start]))


def _card(match: re.Match[str]) -> tuple[int, int] | None:
    """Up to the last gap that leaves a card number; a security code may follow one."""
    from stdnum import luhn

    ends = [len(match[0]), *(gap.start() for gap in re.finditer(r"\D+", match[0]))]
    for end in sorted(ends, reverse=True):
        digits = re.sub(r"\D", "", match[0][:end])
        issued = any(start.match(digits) and len(digits) in sizes for start, sizes in _ISSUERS)
        if issued and luhn.is_valid(digits):
            return match.start(), match.start() + end
    return None


def _iban(match: re.Match[str]) -> tuple[int, int] | None:
    """The longest beginning with right check digits; a word may follow a number."""
    from stdnum import iban

    for end in range(len(match[0]), 14, -1):
        if match[0][end - 1].isalnum() and iban.is_valid(match[0][:end]):
            return match.start(), match.start() + end
    return None


_HEX_DIGITS = 16


def plain(text: str) -> str:
    """The text without what near-duplicates differ in: case, width and runs of white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def query_id(messages: tuple[Message, ...], text: str) -> str:
    """A hash of exactly this query."""
    return _digest(json.dumps([messages, text], sort_keys=True))


def conversation_id(messages: tuple[Message, ...], text: str) -> str:
    """A hash that all queries of one conversation share, and those that differ in a number.

    It is that of the first user's turn, without case, punctuation and the values of numbers.
    """
    first = next((turn["content"] for turn in messages if turn["role"] == "user"), text)
    words = re.sub(r"[\W_]+", " ", re.sub(r"\d+(?:[.,]\d+)*", "0", plain(first))).strip()
    return _digest(words or first)


def split_of(conversation: str, held_out: float) -> str:
    """ "train" or "held_out", by the conversation's hash alone.

    What is held out at a share is held out at every larger one too.

    Args:
        conversation: as `conversation_id` names it.
        held_out: share of conversations that are, in 0 to 1.
    """
    return "held_out" if int(conversation, 16) < held_out * 16**_HEX_DIGITS else "train"


def sample_rank(query: str, seed: int) -> str:
    """What a sample is ordered by: its first 500 are among its first 2,000.

    Args:
        query: as `query_id` names it.
        seed: another one gives another sample.
    """
    return _digest(f"{seed}:{query}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_HEX_DIGITS]


_SHINGLE_LEN = 5
_NUM_PERM = 64
# Missed ones cost more than candidates that the exact comparison then refuses.
_FALSE_POSITIVE_WEIGHT, _FALSE_NEGATIVE_WEIGHT = 0.1, 0.9
# Standard errors of the estimate below the threshold, from which comparing is a waste.
_SLACK = 3.0


class NearDuplicates:
    """Queries that were seen, and whether another one is nearly one of them.

    Two queries are near-duplicates if both their last user turns and all that stands before these
    have at least `threshold` of their runs of five characters in common (Jaccard similarity).
    Comparing the turns apart keeps the turns of one long conversation, and questions behind the
    same long instructions. System messages are not compared.

    Source: Broder 1997, On the resemblance and containment of documents.
    """

    def __init__(self, threshold: float):
        """Start with no queries.

        Args:
            threshold: least similarity of near-duplicates, above 0 and at most 1.
        """
        from datasketch import MinHash, MinHashLSH

        weights = (_FALSE_POSITIVE_WEIGHT, _FALSE_NEGATIVE_WEIGHT)
        self._threshold = threshold
        self._index = MinHashLSH(min(threshold, 0.99), _NUM_PERM, weights=weights)
        self._blank = MinHash(_NUM_PERM, hashfunc=crc32)
        self._queries: list[Query] = []
        self._signatures: list[NDArray[np.uint32]] = []

    def seen(self, query: Query) -> Query | None:
        """The earlier query that this one nearly repeats; without any it is added, and None."""
        context, last = _parts(query)
        signature = self._signature(context, last)
        for candidate in self._candidates(signature):
            its_context, its_last = _parts(self._queries[candidate])
            alike = min(_similarity(its_last, last), _similarity(its_context, context))
            if alike >= self._threshold:
                return self._queries[candidate]
        self._add(query, signature)
        return None

    def _add(self, query: Query, signature: NDArray[np.uint32]) -> None:
        self._index.insert(len(self._queries), self._hashed(signature), check_duplication=False)
        self._queries.append(query)
        self._signatures.append(signature)

    def _candidates(self, signature: NDArray[np.uint32]) -> Sequence[int]:
        found = sorted(self._index.query(self._hashed(signature)))
        if not found:
            return found
        shares = np.mean(np.stack([self._signatures[i] for i in found]) == signature, axis=1)
        error = (self._threshold * (1 - self._threshold) / (_NUM_PERM / 2)) ** 0.5
        least = self._threshold - _SLACK * error
        return [i for i, share in zip(found, shares, strict=True) if share >= least]

    def _signature(self, context: str, last: str) -> NDArray[np.uint32]:
        """Hashes of both parts in turn, so that a band of them agrees only where both parts do."""
        latter = self._minima(last)
        if not context:
            return latter
        both = np.empty(_NUM_PERM, np.uint32)
        both[0::2], both[1::2] = latter[: _NUM_PERM // 2], self._minima(context)[: _NUM_PERM // 2]
        return both

    def _minima(self, text: str) -> NDArray[np.uint32]:
        sketch = self._blank.copy()
        sketch.update_batch([run.encode() for run in _shingles(text)])
        return sketch.hashvalues

    def _hashed(self, signature: NDArray[np.uint32]) -> Any:
        """The signature as datasketch takes it."""
        sketch = self._blank.copy()
        sketch.hashvalues = signature
        return sketch


def _parts(query: Query) -> tuple[str, str]:
    """What stands before the last turn, and the turn; comparable texts of both."""
    before = (turn["content"] for turn in query.messages[:-1] if turn["role"] != "system")
    return plain(" ".join(before)), plain(query.last_turn)


def _shingles(text: str) -> set[str]:
    return {text[i : i + _SHINGLE_LEN] for i in range(max(1, len(text) - _SHINGLE_LEN + 1))}


def _similarity(one: str, other: str) -> float:
    if one == other:
        return 1.0
    first, second = _shingles(one), _shingles(other)
    return len(first & second) / len(first | second)
