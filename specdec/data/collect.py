"""From sources to a folder of queries: read, mask, drop duplicates, draw, split, write."""

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment
from pydantic import Field

from specdec.common.config import Config, Count, read_model, write_model
from specdec.common.files import restore, whole_folder
from specdec.common.messages import (
    Message,
    NoQueryError,
    Query,
    find_queries,
    read_queries,
    short_hash,
)
from specdec.common.provenance import CodeProvenance, code
from specdec.common.records import Record, Source
from specdec.data.cleaning import (
    MASKS,
    Masker,
    NearDuplicates,
    conversation_id,
    query_id,
    sample_rank,
    split_of,
)
from specdec.data.config import CollectSettings
from specdec.data.queries import (
    SPLITS,
    DataSetIdentity,
    FileIdentity,
    identify,
    open_source,
    write_queries,
)

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
_REPORT = "collect.json"
_PACKAGES = ("specdec", "datasets", "datasketch", "phonenumbers", "py3langid", "python-stdnum")
_SHOW_EVERY = 500
_NUM_EXAMPLES = 5
_QUOTE_CHARS, _REASON_CHARS, _READ_CHARS = 120, 300, 4000
_CARD = Path(__file__).with_name("collection_card.md.jinja")
_LOPSIDED_SHARE = 0.2  # of queries that begin alike: a split by conversation is lopsided
_TOLD_LETTERS = 20  # below which a language is a guess

Show = Callable[[int, int, str], None]


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

    schema_: Literal["specdec-collect-1"] = Field(default="specdec-collect-1", alias="schema")
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


def collect(
    names: Sequence[str],
    out: Path,
    settings: CollectSettings,
    *,
    append: bool = False,
    data_dir: Path | None = None,
    show: Show = lambda done, total, text: None,
) -> CollectReport:
    """Write the queries of the sources into a folder, with a card and a report."""
    begun, where = time.monotonic(), CodeProvenance(**code(_PACKAGES))
    restore(out)
    sources = [open_source(name, settings, data_dir) for name in names]
    zeros = dict.fromkeys(("records", "queries", "malformed"), 0)
    reports = [
        SourceReport(name=_whole(source.name), parts=[*map(identify, source.parts)], **zeros)
        for source in sources
    ]
    inputs = [each.model_dump(include={"name", "parts"}) for each in reports]
    facts = ["specdec-collect-1", settings.model_dump(), inputs]
    fingerprint = short_hash(json.dumps(facts, sort_keys=True))
    earlier = _report_of(out)
    if earlier and earlier.fingerprint == fingerprint:
        return earlier
    if earlier and not append:
        what = "queries of other sources or settings; give another --out, or --append"
        raise ValueError(f"{str(out)!r} holds {what}")
    if earlier and earlier.settings.held_out != settings.held_out:
        fix = f"{earlier.settings.held_out} in {str(out)!r}; give it, so that no query moves"
        raise ValueError(f"held_out is {settings.held_out} but was {fix}")
    splits = {split: read_queries(out, split) if earlier else [] for split in SPLITS}
    collector = _Collector(settings, [query for found in splits.values() for query in found])
    for each in zip(sources, reports, strict=True):
        collector.read(*each, show)
    for query in collector.kept(show):
        splits[split_of(query.conversation, settings.held_out)].append(query)
    queries = [query for found in splits.values() for query in found]
    if not queries:
        dropped = collector.dropped.items()
        reasons = ", ".join(f"{drop.count} {reason}" for reason, drop in dropped if drop.count)
        first = next((example for _, drop in dropped for example in drop.examples), None)
        shown = f"; the first: {first.where}: {first.why} {first.quote!r}" if first else ""
        raise ValueError(f"{', '.join(names)}: no query is left ({reasons or 'no records'}){shown}")
    by_domain = {split: Counter(q.domain for q in found) for split, found in splits.items()}
    domains = sorted({query.domain for query in queries})
    sizes = sorted(sum(len(t["content"]) for t in q.messages) + len(q.text) for q in queries)
    report = CollectReport(
        provenance=where,
        fingerprint=fingerprint,
        settings=settings,
        sources=reports,
        earlier=Earlier(fingerprint=earlier.fingerprint, kept=earlier.kept) if earlier else None,
        dropped=collector.dropped,
        masked={mask: collector.masker.counts[mask] for mask in MASKS},
        kept=SplitCounts(**{split: len(found) for split, found in splits.items()}),
        domains={d: SplitCounts(**{s: by_domain[s][d] for s in splits}) for d in domains},
        languages=dict(Counter(q.language for q in queries if q.language).most_common()),
        characters=Characters(median=sizes[len(sizes) // 2], max=sizes[-1]),
        warnings=_warnings(splits, settings),
        seconds=round(time.monotonic() - begun, 1),
    )
    with whole_folder(out, private=True) as partial:
        write_queries(splits, partial)
        write_model(partial / _REPORT, report)
        (partial / "README.md").write_bytes(_card(report))
    return report


def _report_of(out: Path) -> CollectReport | None:
    """Read the report of a folder; None if the folder is not there, or empty."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        return read_model(CollectReport, out / _REPORT)
    except (OSError, ValueError) as error:
        what = f"holds no collected queries ({error}); give another --out"
        raise ValueError(f"{str(out)!r} {what}") from error


class _Collector:
    """Queries as they come in, and what became of the others."""

    def __init__(self, settings: CollectSettings, earlier: list[Query]):
        self.dropped = {reason: Drop() for reason in REASONS}
        self.masker, self._quoter = Masker(settings.phone_region), Masker(settings.phone_region)
        self._settings, self._earlier = settings, earlier
        self._seen = {query.id for query in earlier}
        self._found: list[Query] = []

    def read(self, source: Source, report: SourceReport, show: Show) -> None:
        malformed = self.dropped["malformed"]
        queries_before, malformed_before = len(self._found), malformed.count
        size = max(1, sum(part.size for part in source.parts))
        for record in source:
            report.records += 1
            self._take(record, source.name if source.named else "")
            if report.records % _SHOW_EVERY == 0:
                done = 100 * sum(part.done for part in source.parts) // size
                show(done, 100, f"% of {source.name}")
        report.queries = len(self._found) - queries_before
        report.malformed = malformed.count - malformed_before

    def kept(self, show: Show) -> list[Query]:
        """Draw queries that no other one nearly repeats; they keep the order they came in."""
        settings, found = self._settings, self._found
        near = NearDuplicates(settings.near_duplicates) if settings.near_duplicates else None
        if near:
            for query in self._earlier:
                near.seen(query)
        # By hash and not by place: what is kept must not change with the order of the sources.
        order = sorted(range(len(found)), key=lambda i: sample_rank(found[i].id, settings.seed))
        kept: list[int] = []
        for number, index in enumerate(order):
            if len(kept) == settings.num:
                break
            query = found[index]
            if other := near.seen(query) if near else None:
                twin = f"like {other.source}: {other.last_turn}"
                self._drop("near_duplicate", query.source, query.last_turn, twin)
            else:
                kept.append(index)
            if number % _SHOW_EVERY == 0:
                show(number, len(order), "compared")
        show(len(order), len(order), "compared")
        num_near = self.dropped["near_duplicate"].count
        self.dropped["not_sampled"].count = len(order) - len(kept) - num_near
        return [_tagged(found[i]) if settings.tag_language else found[i] for i in sorted(kept)]

    def _take(self, record: Record, source_name: str) -> None:
        settings, where, asked = self._settings, _whole(record.where), list[Query]()
        try:
            if record.fault:
                raise ValueError(record.fault)
            for each in find_queries(_column(record.value, settings.column), settings.turns):
                asked.append(each)
        except NoQueryError as error:  # the turns before it stand
            self._drop(error.reason, where, record.value)
        except (ValueError, RecursionError) as error:
            self._drop("malformed", where, record.value, str(error))
            return
        mask = self.masker.mask if settings.mask else str

        @cache  # the queries of a conversation repeat each other's turns
        def text(given: str) -> str:
            return mask(_whole(given))

        @cache
        def turn(role: str, content: str) -> Message:
            return {"role": role, "content": text(content)}

        domain = settings.domain
        if domain is None:  # a record's own may be a customer's address
            row = record.value if isinstance(record.value, dict) else {}
            own = row.get(settings.domain_field)
            domain = text(source_name if own is None else str(own))
        for each in asked:
            texts = [message["content"] for message in each.messages] or [each.text]
            length = sum(map(len, texts))
            if len(texts[-1].strip()) < settings.min_chars:
                self._drop("too_short", where, texts[-1])
                continue
            if length > settings.max_chars:
                self._drop("too_long", where, texts[-1], f"{length} characters")
                continue
            found = tuple(turn(m["role"], m["content"]) for m in each.messages), text(each.text)
            answer = None if each.answer is None else text(each.answer)
            query = Query(query_id(*found), *found, answer, _whole(domain), source=where)
            if query.id in self._seen:
                self._drop("duplicate", where, query.last_turn)
            else:
                self._seen.add(query.id)
                self._found.append(replace(query, conversation=conversation_id(*found)))

    def _drop(self, reason: str, where: str, value: Any, why: str = "") -> None:
        """Count a record that is dropped, and keep it if it is among the first."""
        drop = self.dropped[reason]
        drop.count += 1
        is_last = reason == "malformed" and drop.count > self._settings.max_bad
        if len(drop.examples) == _NUM_EXAMPLES and not is_last:
            return
        is_text = isinstance(value, str)
        quote = value if is_text else json.dumps(value, ensure_ascii=False, default=str)
        quote, why = self._quote(quote, _QUOTE_CHARS), self._quote(why, _REASON_CHARS)
        if is_last:
            raise ValueError(
                f"more than max_bad={self._settings.max_bad} malformed lines, as {where}: {why}: "
                f"{quote!r}; mend them, name their --format or --column, or raise --max-bad"
            )
        drop.examples.append(Example(where=where, quote=quote, why=why))

    def _quote(self, text: str, max_chars: int) -> str:
        shown = " ".join(self._quoter.mask(_whole(text[:_READ_CHARS])).split())
        return shown if len(shown) <= max_chars else f"{shown[: max_chars - 1]}…"


def _whole(text: str) -> str:
    """Replace halves of characters, which logs that cut it hold and no file takes."""
    return text.encode(errors="replace").decode()


def _column(value: Any, column: str | None) -> Any:
    if column is None:
        return value
    if not isinstance(value, dict) or column not in value:
        keys = sorted(map(str, value))[:12] if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"it has no column {column!r} but {keys}")
    return value[column]


def _tagged(query: Query) -> Query:
    """Add the language of the last turn, where this is long enough to tell."""
    import py3langid

    is_told = sum(map(str.isalpha, query.last_turn)) >= _TOLD_LETTERS
    return replace(query, language=py3langid.classify(query.last_turn)[0] if is_told else "")


def _warnings(splits: dict[str, list[Query]], settings: CollectSettings) -> list[str]:
    warnings = []
    total = sum(map(len, splits.values()))
    if settings.num is not None and total < settings.num:
        warnings.append(f"{total} queries were there, fewer than num={settings.num}")
    if settings.held_out:
        domains = [{query.domain for query in splits[split]} for split in SPLITS]
        for domain in sorted(domains[0] - domains[1]):
            warnings.append(f"no query of domain {domain!r} is held out; collect more of it")
    starts = Counter(query.conversation for found in splits.values() for query in found)
    largest = starts.most_common(1)[0][1]
    if total > 1 and largest > _LOPSIDED_SHARE * total:
        warnings.append(
            f"{largest} of {total} queries begin with the same user turn and are all in one "
            "split; move fixed examples into the system message to have them split"
        )
    return warnings


def _card(report: CollectReport) -> bytes:
    environment = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    # Text that neither ends the cell nor is taken for a tag.
    environment.filters["cell"] = lambda v: str(v).replace("|", "\\|").replace("<", "&lt;")
    template = environment.from_string(_CARD.read_text("utf-8"))
    return template.render(r=report, reasons=REASONS).encode(errors="replace")
