"""From sources to a folder of queries: read, mask, drop duplicates, draw, split, write."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from specdec.common.config import read_model, write_model
from specdec.common.files import restore, whole_folder
from specdec.common.messages import Message
from specdec.common.provenance import CodeProvenance, code
from specdec.data.cleaning import (
    MASKS,
    Masker,
    NearDuplicates,
    conversation_id,
    query_id,
    sample_rank,
    split_of,
)
from specdec.data.collection import (
    REASON_CHARS,
    CollectReport,
    DropCounts,
    Earlier,
    SourceReport,
    card,
    kept_facts,
    whole_characters,
)
from specdec.data.config import CollectSettings
from specdec.data.conversation import (
    SPLITS,
    NoQueryError,
    Query,
    RawQuery,
    find_queries,
    read_queries,
    write_queries,
)
from specdec.data.sources import (
    DataSetIdentity,
    FileIdentity,
    Malformed,
    QuerySource,
    Record,
    open_source,
)

Show = Callable[[int, int, str], None]
Parts = list[FileIdentity | DataSetIdentity]

SCHEMA = "specdec-collect-1"
REPORT = "collect.json"
_PACKAGES = ("specdec", "datasets", "datasketch", "phonenumbers", "py3langid", "python-stdnum")
_SHOW_EVERY = 500
# Letters below which a language is a guess.
_TOLD_LETTERS = 20


def collect(
    sources: Sequence[str],
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
    opened = [
        open_source(
            name,
            form=settings.format,
            split=settings.split,
            subset=settings.subset,
            data_dir=data_dir,
        )
        for name in sources
    ]
    inputs = [[part.identity() for part in source.parts] for source in opened]
    fingerprint = _fingerprint(settings, opened, inputs)
    earlier = _report_of(out)
    if earlier is not None and earlier.fingerprint == fingerprint:
        return earlier
    splits = _splits_of(out, earlier, settings, append)
    collector = Collector(settings, splits)
    reports = [collector.read(*each, show) for each in zip(opened, inputs, strict=True)]
    for query in collector.kept(show):
        query = _tagged(query) if settings.tag_language else query
        splits[split_of(query.conversation, settings.held_out)].append(query)
    report = CollectReport(
        provenance=where,
        fingerprint=fingerprint,
        settings=settings,
        sources=reports,
        earlier=Earlier(fingerprint=earlier.fingerprint, kept=earlier.kept) if earlier else None,
        dropped=collector.drops.by_reason,
        masked={mask: collector.masker.counts[mask] for mask in MASKS},
        seconds=round(time.monotonic() - begun, 1),
        **kept_facts(splits, settings),
    )
    report.check_kept()
    with whole_folder(out, private=True) as partial:
        write_queries(splits, partial)
        write_model(partial / REPORT, report)
        (partial / "README.md").write_bytes(card(report))
    return report


def _fingerprint(
    settings: CollectSettings, sources: Sequence[QuerySource], inputs: Sequence[Parts]
) -> str:
    named = [
        {"name": source.name, "parts": [part.model_dump() for part in parts]}
        for source, parts in zip(sources, inputs, strict=True)
    ]
    text = json.dumps([SCHEMA, settings.model_dump(), named], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _report_of(out: Path) -> CollectReport | None:
    """The report of a folder; None if the folder is not there, or empty."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        return read_model(CollectReport, out / REPORT)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{str(out)!r} exists and holds no collected queries ({error}); give another --out"
        ) from error


def _splits_of(
    out: Path, earlier: CollectReport | None, settings: CollectSettings, append: bool
) -> dict[str, list[Query]]:
    """The queries that are there already, by split."""
    if earlier is None:
        return {split: [] for split in SPLITS}
    if not append:
        raise ValueError(
            f"{str(out)!r} holds queries of other sources or settings; give another --out, or "
            "--append to add to them"
        )
    if earlier.settings.held_out != settings.held_out:
        raise ValueError(
            f"held_out is {settings.held_out} but {str(out)!r} was split at "
            f"{earlier.settings.held_out}; give the same, so that no query moves"
        )
    return {split: read_queries(out, split) for split in SPLITS}


def _tagged(query: Query) -> Query:
    """The query with the language of its last turn, where this is long enough to tell."""
    import py3langid

    is_told = sum(map(str.isalpha, query.last_turn)) >= _TOLD_LETTERS
    return replace(query, language=py3langid.classify(query.last_turn)[0] if is_told else "")


class Collector:
    """Queries as they come in, and what became of the others."""

    def __init__(self, settings: CollectSettings, earlier: dict[str, list[Query]]):
        self.drops = DropCounts(settings.phone_region)
        self.masker = Masker(settings.phone_region)
        self._settings = settings
        self._earlier = [query for queries in earlier.values() for query in queries]
        self._seen = {query.id for query in self._earlier}
        self._found: list[Query] = []

    def read(self, source: QuerySource, parts: Parts, show: Show) -> SourceReport:
        """Take in a source, whose parts have been identified, and count what is in it."""
        malformed = self.drops.by_reason["malformed"]
        queries_before, malformed_before, number = len(self._found), malformed.count, 0
        for number, found in enumerate(source, 1):
            if isinstance(found, Malformed):
                self._refuse(found)
            else:
                self._take(found, source.name if source.named else "")
            if number % _SHOW_EVERY == 0:
                show(source.done_percent, 100, f"% of {source.name}")
        return SourceReport(
            name=whole_characters(source.name),
            parts=parts,
            records=number,
            queries=len(self._found) - queries_before,
            malformed=malformed.count - malformed_before,
        )

    def kept(self, show: Show) -> list[Query]:
        """The drawn queries that no other one nearly repeats, in the order they came in."""
        settings = self._settings
        near = NearDuplicates(settings.near_duplicates) if settings.near_duplicates else None
        if near:
            for query in self._earlier:
                near.seen(query)
        # By hash and not by place: what is kept must not change with the order of the sources.
        order = sorted(
            range(len(self._found)), key=lambda i: sample_rank(self._found[i].id, settings.seed)
        )
        kept: list[int] = []
        for number, index in enumerate(order):
            if len(kept) == settings.num:
                break
            query = self._found[index]
            other = near.seen(query) if near else None
            if other is None:
                kept.append(index)
            else:
                twin = f"like {other.source}: {other.last_turn}"
                self.drops.add("near_duplicate", query.source, query.last_turn, twin)
            if number % _SHOW_EVERY == 0:
                show(number, len(order), "compared")
        show(len(order), len(order), "compared")
        dropped = self.drops.by_reason
        dropped["not_sampled"].count = len(order) - len(kept) - dropped["near_duplicate"].count
        return [self._found[index] for index in sorted(kept)]

    def _refuse(self, line: Malformed) -> None:
        self.drops.add("malformed", line.where, line.text, line.reason)
        if self.drops.by_reason["malformed"].count > self._settings.max_bad:
            quote = self.drops.quote(line.text)
            reason = self.drops.quote(line.reason, REASON_CHARS)
            raise ValueError(
                f"more than max_bad={self._settings.max_bad} malformed lines; the last is "
                f"{line.where}: {reason}: {quote!r}; mend the file, name its --format or --column, "
                "or raise --max-bad"
            )

    def _take(self, record: Record, source_name: str) -> None:
        settings, asked = self._settings, list[RawQuery]()
        try:
            for each in find_queries(_column(record.value, settings.column), settings.turns):
                asked.append(each)
        except NoQueryError as error:  # the turns before it stand
            self.drops.add(error.reason, record.where, _shown(record.value))
        except (ValueError, RecursionError) as error:
            self._refuse(Malformed(record.where, _shown(record.value), str(error)))
            return
        where = whole_characters(record.where)
        mask = self.masker.mask if settings.mask else str

        @cache  # the queries of a conversation repeat each other's turns
        def text(given: str) -> str:
            return mask(whole_characters(given))

        @cache
        def turn(role: str, content: str) -> Message:
            return {"role": role, "content": text(content)}

        domain = whole_characters(_domain(record.value, settings, source_name))
        if settings.domain is None:  # a record's own may be a customer's address
            domain = text(domain)
        for each in asked:
            if self._fits(each, where):
                messages = tuple(turn(m["role"], m["content"]) for m in each.messages)
                answer = None if each.answer is None else text(each.answer)
                self._add(RawQuery(messages, text(each.text), answer), domain, where)

    def _fits(self, asked: RawQuery, where: str) -> bool:
        texts = [turn["content"] for turn in asked.messages] or [asked.text]
        length = sum(map(len, texts))
        if len(texts[-1].strip()) < self._settings.min_chars:
            self.drops.add("too_short", where, texts[-1])
        elif length > self._settings.max_chars:
            self.drops.add("too_long", where, texts[-1], f"{length} characters")
        else:
            return True
        return False

    def _add(self, asked: RawQuery, domain: str, where: str) -> None:
        name = query_id(asked.messages, asked.text)
        conversation = conversation_id(asked.messages, asked.text)
        query = Query(
            name, asked.messages, asked.text, asked.answer, domain, "", where, conversation
        )
        if name in self._seen:
            self.drops.add("duplicate", where, query.last_turn)
        else:
            self._seen.add(name)
            self._found.append(query)


def _column(value: Any, column: str | None) -> Any:
    if column is None:
        return value
    if not isinstance(value, dict) or column not in value:
        keys = sorted(map(str, value))[:12] if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"it has no column {column!r} but {keys}")
    return value[column]


def _domain(record: Any, settings: CollectSettings, source_name: str) -> str:
    if settings.domain is not None:
        return settings.domain
    given = record.get(settings.domain_field) if isinstance(record, dict) else None
    return source_name if given is None else str(given)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
