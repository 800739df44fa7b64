"""The report of a collection (`collect.json`), its warnings, and its card (`README.md`)."""

from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from jinja2 import Environment
from pydantic import Field

from specdec.common.config import Config
from specdec.common.provenance import CodeProvenance
from specdec.data.cleaning import Masker
from specdec.data.config import CollectSettings
from specdec.data.conversation import Query
from specdec.data.sources import DataSetIdentity, FileIdentity

# In the order in which a record meets them.
REASONS = {
    "malformed": "lines that are no record",
    "refused": "requests that the server refused",
    "other_request": "requests of another kind, such as embeddings",
    "no_user_turn": "records without a user's turn",
    "not_text": "images, audio or token ids in place of text",
    "tools": "tool calls before the last user turn",
    "too_short": "shorter than min_chars",
    "too_long": "longer than max_chars",
    "duplicate": "the same as another",
    "near_duplicate": "nearly the same as another",
    "not_sampled": "more than num",
}
_NUM_EXAMPLES = 5
REASON_CHARS = 300
_QUOTE_CHARS, _READ_CHARS = 120, 4000
_CARD = Path(__file__).with_name("collection_card.md.jinja")
_SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M")
# Share of queries that begin alike from which a split by conversation is lopsided.
_LOPSIDED_SHARE = 0.2

Count = Annotated[int, Field(ge=0)]


class Example(Config):
    """A record that was dropped; its quote is masked and cut short."""

    where: str
    quote: str
    why: str


class Drop(Config):
    """Records that were dropped for one reason, and the first few of them."""

    count: Count = 0
    examples: list[Example] = Field(default_factory=list, max_length=_NUM_EXAMPLES)


class SplitCounts(Config):
    """Queries in each split."""

    train: Count
    held_out: Count


class SourceReport(Config):
    """A source, and what was in it."""

    name: str = Field(description="name as it was given")
    parts: list[FileIdentity | DataSetIdentity]
    records: Count = Field(description="lines, rows or items, malformed ones included")
    queries: Count = Field(description="queries that were new and of a fit length")
    malformed: Count


class Earlier(Config):
    """The folder that was added to."""

    fingerprint: str
    kept: SplitCounts


class Characters(Config):
    """Lengths of whole queries, all turns together."""

    median: int = Field(ge=1)
    max: int = Field(ge=1)


class CollectReport(Config):
    """`collect.json` of `specdec collect`."""

    schema_: Literal["specdec-collect-1"] = Field("specdec-collect-1", alias="schema")
    provenance: CodeProvenance
    fingerprint: str = Field(description="hash of settings and sources")
    settings: CollectSettings
    sources: list[SourceReport] = Field(min_length=1, description="in the order given")
    earlier: Earlier | None = Field(description="null for a new folder")
    dropped: dict[str, Drop] = Field(description="drops of this run by reason")
    masked: dict[str, Count] = Field(description="finds replaced in queries and answers")
    kept: SplitCounts
    domains: dict[str, SplitCounts] = Field(description="queries by domain, which may be empty")
    languages: dict[str, Count] = Field(description="queries by ISO 639 code, if told")
    characters: Characters | None
    warnings: list[str]
    seconds: float = Field(ge=0)

    def check_kept(self) -> None:
        """Refuse a collection without queries, and say where they went."""
        if self.kept.train or self.kept.held_out:
            return
        why = {reason: drop for reason, drop in self.dropped.items() if drop.count}
        counts = ", ".join(f"{drop.count} {reason}" for reason, drop in why.items())
        first = next((example for drop in why.values() for example in drop.examples), None)
        shown = f"; the first: {first.where}: {first.why} {first.quote!r}" if first else ""
        names = ", ".join(source.name for source in self.sources)
        raise ValueError(f"{names}: no query is left ({counts or 'no records'}){shown}")


def whole_characters(text: str) -> str:
    """The text without halves of characters, which logs that cut it hold and no file takes."""
    return text.encode(errors="replace").decode()


class DropCounts:
    """Counts of drops by reason, and the first few of each."""

    def __init__(self, phone_region: str) -> None:
        self.by_reason = {reason: Drop() for reason in REASONS}
        self._masker = Masker(phone_region)

    def add(self, reason: str, where: str, text: str, why: str = "") -> None:
        """Count one, and keep it if it is among the first."""
        drop = self.by_reason[reason]
        drop.count += 1
        if len(drop.examples) < _NUM_EXAMPLES:
            why = self.quote(why, REASON_CHARS)
            example = Example(where=whole_characters(where), quote=self.quote(text), why=why)
            drop.examples.append(example)

    def quote(self, text: str, max_chars: int = _QUOTE_CHARS) -> str:
        """The beginning of a text, or of a reason that may quote it, masked and on one line."""
        shown = " ".join(self._masker.mask(whole_characters(text[:_READ_CHARS])).split())
        return shown if len(shown) <= max_chars else f"{shown[: max_chars - 1]}…"


def kept_facts(splits: dict[str, list[Query]], settings: CollectSettings) -> dict[str, Any]:
    """The facts of a report about the queries that are kept."""
    queries = [query for found in splits.values() for query in found]
    domains = sorted({query.domain for query in queries})
    by_domain = {split: Counter(q.domain for q in found) for split, found in splits.items()}
    sizes = sorted(sum(len(t["content"]) for t in q.messages) + len(q.text) for q in queries)
    lengths = Characters(median=sizes[len(sizes) // 2], max=sizes[-1]) if sizes else None
    return {
        "kept": SplitCounts(**{split: len(found) for split, found in splits.items()}),
        "domains": {d: SplitCounts(**{s: by_domain[s][d] for s in splits}) for d in domains},
        "languages": dict(Counter(q.language for q in queries if q.language).most_common()),
        "characters": lengths,
        "warnings": _warnings(splits, settings),
    }


def _warnings(splits: dict[str, list[Query]], settings: CollectSettings) -> list[str]:
    """Warnings that a user should read before training on the queries."""
    warnings = []
    total = sum(map(len, splits.values()))
    if settings.num is not None and total < settings.num:
        warnings.append(f"{total} queries were there, fewer than num={settings.num}")
    held = {query.domain for query in splits["held_out"]}
    if settings.held_out:
        for domain in sorted({query.domain for query in splits["train"]} - held):
            warnings.append(f"no query of domain {domain!r} is held out; collect more of it")
    starts = Counter(q.conversation for found in splits.values() for q in found).most_common(1)
    if starts and total > 1 and starts[0][1] > _LOPSIDED_SHARE * total:
        warnings.append(
            f"{starts[0][1]} of {total} queries begin with the same user turn and are all in one "
            "split; move fixed examples into the system message to have them split"
        )
    return warnings


def card(report: CollectReport) -> bytes:
    """Make a README.md with a header as the hub reads it."""
    total, told = report.kept.train + report.kept.held_out, report.languages
    # The others are mostly guessed wrong.
    common = sorted(name for name, count in told.items() if 100 * count >= sum(told.values()))
    size = next((name for n, name in enumerate(_SIZES, 3) if total < 10**n), "n>10M")
    environment = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["cell"] = _cell
    text = environment.from_string(_CARD.read_text("utf-8")).render(
        r=report,
        languages=common,
        size=size,
        reasons=REASONS,
        masked=[f"`{mask}` {count} times" for mask, count in report.masked.items() if count],
        told=[f"{name} {count}" for name, count in told.items()],
        settings=[f"{name}={value}" for name, value in report.settings if value is not None],
    )
    return text.encode(errors="replace")


def _cell(value: Any) -> str:
    """Text that neither ends the cell nor is taken for a tag."""
    return str(value).replace("|", "\\|").replace("<", "&lt;")
