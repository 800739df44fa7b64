"""Masks for what must not leave a log: addresses, numbers that name people, and secrets."""

import re
from collections import Counter

from specdec.data.secrets import API_KEY, PRIVATE_KEY, Text, take_secrets

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
