"""What `specdec collect` is told to do with what it reads."""

from dataclasses import dataclass

from specdec.data.conversation import TURNS
from specdec.data.masking import PHONE_REGION
from specdec.data.records import FORMATS


@dataclass(frozen=True)
class CollectSettings:
    """How queries are read, cleaned and split.

    Attributes:
        format: of files, one of `FORMATS`; None to tell it from suffix and content.
        column: of a record that holds the query or the conversation; None to find it.
        split: of a data set; None for train.
        subset: of a data set of the hub.
        turns: of a conversation, those that become queries, one of `TURNS`.
        domain: of all queries; None to take each record's `domain_field`.
        domain_field: of a record that holds the domain.
        mask: whether personal data and secrets are masked.
        phone_region: whose national phone numbers are known.
        min_chars: of the last user turn, without the white space around it.
        max_chars: of the whole query.
        near_duplicates: Jaccard similarity from which a query is dropped; 0 keeps near-duplicates.
        held_out: share of conversations that is held out.
        num: of queries, drawn by hash; None for all.
        seed: of the draw.
        tag_language: whether languages are told.
        max_bad: malformed lines that are skipped before the run stops.

    Raises:
        ValueError: a setting out of its range.
    """

    format: str | None = None
    column: str | None = None
    split: str | None = None
    subset: str | None = None
    turns: str = "all"
    domain: str | None = None
    domain_field: str = "domain"
    mask: bool = True
    phone_region: str = PHONE_REGION
    min_chars: int = 1
    max_chars: int = 32_000
    near_duplicates: float = 0.8
    held_out: float = 0.1
    num: int | None = None
    seed: int = 0
    tag_language: bool = False
    max_bad: int = 100

    def __post_init__(self) -> None:
        _check(self.format is None or self.format in FORMATS, "format", self.format, FORMATS)
        _check(self.turns in TURNS, "turns", self.turns, TURNS)
        _check(self.min_chars >= 1, "min_chars", self.min_chars, "at least 1")
        _check(self.max_chars >= self.min_chars, "max_chars", self.max_chars, "at least min_chars")
        _check(0 <= self.near_duplicates <= 1, "near_duplicates", self.near_duplicates, "in 0 to 1")
        _check(0 <= self.held_out < 1, "held_out", self.held_out, "a share, at least 0, below 1")
        _check(self.num is None or self.num >= 1, "num", self.num, "at least 1")
        _check(self.max_bad >= 0, "max_bad", self.max_bad, "at least 0")


def _check(holds: bool, name: str, value: object, rule: object) -> None:
    if not holds:
        wanted = f"one of {', '.join(rule)}" if isinstance(rule, tuple) else rule
        raise ValueError(f"{name} is {value!r} but must be {wanted}")
