"""Masks for what must not leave a log: addresses, numbers that name people, and keys."""

import re
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

EMAIL, PHONE, CARD, API_KEY, PRIVATE_KEY = (
    "<EMAIL>",
    "<PHONE>",
    "<CARD>",
    "<API_KEY>",
    "<KEY_BLOCK>",
)

MASKS = (EMAIL, PHONE, CARD, API_KEY, PRIVATE_KEY)

# One block without an end (a cut log line) is masked as far as its base64 goes.
_PEM = re.compile(
    r"-----BEGIN [A-Z0-9 ]{0,20}PRIVATE KEY-----"
    r"(?:.{0,8000}?-----END [A-Z0-9 ]{0,20}PRIVATE KEY-----|[A-Za-z0-9+/=\s\\]*)",
    re.DOTALL,
)
# What leads a secret is kept, so that the query still reads as it did.
_LED_SECRET = re.compile(
    r"(?P<lead>\b(?:bearer|basic)\s+)(?=[\w.~+/=-]*\d)[\w.~+/=-]{16,}"
    r"|(?P<scheme>\b[a-z][a-z0-9+.-]{1,15}://)[^\s/:@]{1,64}:[^\s/@]{1,128}(?=@)"
    r"|(?P<name>(?:api[_-]?key|secret|token|passw(?:or)?d)[\"']?\s{0,2}[:=]\s{0,2}[\"']?)"
    r"(?=[\w.~+/=-]*\d)(?=[\w.~+/=-]*[a-z])[\w.~+/=-]{16,}",
    re.IGNORECASE,
)
_PREFIXED_KEYS = re.compile(
    r"(?<![\w-])(?:"
    r"eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*"  # JSON web tokens
    r"|(?:sk|pk|rk)[-_](?=[\w-]*\d)[\w-]{20,}"  # OpenAI, Anthropic, Stripe
    r"|gh[opusr]_[A-Za-z0-9]{30,}|github_pat_\w{22,}|glpat-[\w-]{20,}"
    r"|(?:AKIA|ASIA)[0-9A-Z]{16}(?![0-9A-Z])"
    r"|hf_[A-Za-z0-9]{30,}|npm_[A-Za-z0-9]{36}|pypi-[\w-]{50,}"
    r"|xox[abeoprs]-[\w-]{10,}|xapp-[\w-]{10,}"
    r"|AIza[\w-]{35}|ya29\.[\w-]{20,}"
    r"|SG\.[\w-]{16,}\.[\w-]{16,}"
    r")"
)
_EMAIL = re.compile(r"(?<![\w.%+-])[\w.%+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}\b")
_CARD = re.compile(r"(?<![\d.,-])\d(?:[ -]?\d){12,18}(?![\d-]|[.,]\d)")
# By their first digits: lengths that the issuer gives out.
_ISSUERS = (
    (re.compile(r"4"), {13, 16, 19}),
    (re.compile(r"5[1-5]|2(?:22[1-9]|2[3-9]|[3-6]|7[01]|720)"), {16}),
    (re.compile(r"3[47]"), {15}),
    (re.compile(r"3(?:0[0-5]|[68])"), {14}),
    (re.compile(r"6011|64[4-9]|65|62|35(?:2[89]|[3-8])"), {16, 17, 18, 19}),
)
_SEVEN_DIGITS = re.compile(r"\d(?:\D{0,3}\d){6}")
# Up to the number; other things than telephones have numbers too.
_PHONE_CUE = re.compile(
    r"\b(?:phone|call|text|tel|mobile|cell|whatsapp|sms|fax|dial)\b"
    r"(?:(?!order|invoice|ticket|account|reference|booking|case|tracking|\bid\b|#)\D){0,24}$",
    re.IGNORECASE,
)
_CUE_REACH = 40
_MIN_CUED_DIGITS = 10

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
        text = self._replaced(_PEM, text, lambda _: PRIVATE_KEY)
        text = self._replaced(_PREFIXED_KEYS, text, lambda _: API_KEY)
        text = self._replaced(_LED_SECRET, text, _after_lead)
        text = self._replaced(_EMAIL, text, lambda _: EMAIL)
        text = self._replaced(_CARD, text, _without_card)
        return self._phones_masked(text)

    def _replaced(
        self, pattern: re.Pattern[str], text: str, put: Callable[[re.Match[str]], str]
    ) -> str:
        def count_and_put(match: re.Match[str]) -> str:
            new = put(match)
            if new != match[0]:
                self.counts[next(mask for mask in MASKS if mask in new)] += 1
            return new

        return pattern.sub(count_and_put, text)

    def _phones_masked(self, text: str) -> str:
        if not _SEVEN_DIGITS.search(text):  # the matcher is slow
            return text
        spans = self._phone_spans(text)
        self.counts[PHONE] += len(spans)
        ends = [(0, 0), *spans, (len(text), len(text))]
        return PHONE.join(text[before[1] : after[0]] for before, after in pairwise(ends))

    def _phone_spans(self, text: str) -> list[tuple[int, int]]:
        from phonenumbers import Leniency, PhoneNumberMatcher, is_valid_number

        spans = []
        for match in PhoneNumberMatcher(text, self._region, leniency=Leniency.POSSIBLE):
            digits = sum(character.isdigit() for character in match.raw_string)
            before = text[max(0, match.start - _CUE_REACH) : match.start]
            if _PHONE_CUE.search(before):
                found = digits >= _MIN_CUED_DIGITS or is_valid_number(match.number)
            else:
                found = not match.raw_string.isdigit() and is_valid_number(match.number)
            if found:
                spans.append((match.start, match.end))
        return spans


def _after_lead(match: re.Match[str]) -> str:
    return (match["lead"] or match["scheme"] or match["name"]) + API_KEY


def _without_card(match: re.Match[str]) -> str:
    """Masked up to the last gap that leaves a card number; a security code may follow one."""
    ends = [len(match[0]), *(gap.start() for gap in re.finditer(r"[ -]", match[0]))]
    for end in sorted(ends, reverse=True):
        if _is_card(match[0][:end]):
            return CARD + match[0][end:]
    return match[0]


def _is_card(text: str) -> bool:
    from stdnum import luhn

    digits = re.sub(r"\D", "", text)
    issued = any(start.match(digits) and len(digits) in sizes for start, sizes in _ISSUERS)
    return issued and luhn.is_valid(digits)
