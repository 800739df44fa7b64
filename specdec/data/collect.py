"""From sources to a folder of queries: read, mask, drop duplicates, draw, split, write."""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from specdec.common.files import restore, whole_folder
from specdec.common.messages import Message
from specdec.common.provenance import code
from specdec.data.cleaning import (
    MASKS,
    PHONE_REGION,
    Masker,
    NearDuplicates,
    conversation_id,
    query_id,
    sample_rank,
    split_of,
)
from specdec.data.conversation import (
    SPLITS,
    TURNS,
    Asked,
    NoQueryError,
    Query,
    asked_in,
    read_queries,
    write_queries,
)
from specdec.data.sources import FORMATS, Malformed, QuerySource, Record, open_source


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
_QUOTE_CHARS, _REASON_CHARS, _READ_CHARS = 120, 300, 4000


def whole_characters(text: str) -> str:
    """The text without halves of characters, which logs that cut it hold and no file takes."""
    return text.encode(errors="replace").decode()


class Tally:
    """Counts of drops by reason, and the first few of each.

    Attributes:
        counts: by a name of `REASONS`.
        examples: by reason, {"where", "quote", "why"}; quotes are masked and cut short.
    """

    def __init__(self, phone_region: str = PHONE_REGION) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[dict[str, str]]] = {}
        self._masker = Masker(phone_region)

    def drop(self, reason: str, where: str, text: str, why: str = "") -> None:
        """Count one, and keep it if it is among the first.

        Args:
            reason: a name of `REASONS`.
            where: it stands in its source.
            text: of it.
            why: more than the reason says.
        """
        self.counts[reason] += 1
        kept = self.examples.setdefault(reason, [])
        if len(kept) < _NUM_EXAMPLES:
            kept.append({"where": where, "quote": self.quote(text), "why": self.reason(why)})

    def quote(self, text: str) -> str:
        """The beginning of a text on one line, masked."""
        return self._shown(text, _QUOTE_CHARS)

    def reason(self, text: str) -> str:
        """The same of a reason, which may quote its record."""
        return self._shown(text, _REASON_CHARS)

    def _shown(self, text: str, length: int) -> str:
        shown = " ".join(self._masker.mask(whole_characters(text[:_READ_CHARS])).split())
        return shown if len(shown) <= length else f"{shown[: length - 1]}…"

    def report(self) -> dict[str, Any]:
        """By reason, count and examples; reasons that did not occur have a count of 0."""
        return {
            reason: {"count": self.counts[reason], "examples": self.examples.get(reason, [])}
            for reason in REASONS
        }


_SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
)


def write_card(report: dict[str, Any], path: Path) -> None:
    """Write a README.md with a header as the hub reads it.

    Args:
        report: as `collect.json` holds it.
        path: of the file.
    """
    from huggingface_hub import DatasetCardData

    total = sum(report["kept"].values())
    header = DatasetCardData(
        pretty_name="Collected queries",
        language=_common(report["languages"]) or None,
        size_categories=next((name for size, name in _SIZES if total < size), "n>10M"),
        task_categories="text-generation",
        tags=["specdec", "speculative-decoding", "queries"],
    )
    parts = [_opening(report), _kept(report), _sources(report), _dropped(report), _making(report)]
    text = f"---\n{header.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"
    path.write_bytes(text.encode(errors="replace"))


def _common(languages: dict[str, int]) -> list[str]:
    """Of at least one query in a hundred; the others are mostly guessed wrong."""
    return sorted(name for name, n in languages.items() if 100 * n >= sum(languages.values()))


def _opening(report: dict[str, Any]) -> str:
    kept = report["kept"]
    masks = ", ".join(f"`{m}` {n} times" for m, n in report["masked"].items() if n)
    masked = (
        f"Masked: {masks or 'nothing'}." if report["settings"]["mask"] else "Nothing is masked."
    )
    return (
        "# Collected queries\n\n"
        f"{kept['train']} queries to train on and {kept['held_out']} held out, collected by "
        f"`specdec collect`. {masked} Masks find what has a known form; they are no proof that "
        "nothing personal is left. Recorded answers are for reference: drafters are trained on "
        "the target's own."
    )


def _kept(report: dict[str, Any]) -> str:
    rows = [(name or "(none)", n["train"], n["held_out"]) for name, n in report["domains"].items()]
    languages = ", ".join(f"{name} {count}" for name, count in report["languages"].items())
    told = f"\n\nLanguages, as told by py3langid: {languages}." if languages else ""
    warnings = "".join(f"\n- {warning}" for warning in report["warnings"])
    warned = f"\n\nMind:\n{warnings}" if warnings else ""
    return "## Kept\n\n" + _table(("domain", "train", "held out"), rows) + told + warned


def _sources(report: dict[str, Any]) -> str:
    names = ("source", "records", "queries", "malformed")
    rows = [(s["name"], *(s[name] for name in names[1:])) for s in report["sources"]]
    earlier = report["earlier"]
    before = f"\n\n{sum(earlier['kept'].values())} were there before." if earlier else ""
    return "## Sources\n\n" + _table(names, rows) + before


def _dropped(report: dict[str, Any]) -> str:
    drops = [(name, drop) for name, drop in report["dropped"].items() if drop["count"]]
    if not drops:
        return "## Dropped\n\nNothing."
    rows = [
        (REASONS[name], drop["count"], drop["examples"][0]["quote"] if drop["examples"] else "")
        for name, drop in drops
    ]
    return "## Dropped\n\n" + _table(("why", "how many", "for example"), rows)


def _making(report: dict[str, Any]) -> str:
    where = report["provenance"]
    settings = ", ".join(f"{k}={v}" for k, v in report["settings"].items() if v is not None)
    return (
        "## How it was made\n\n"
        f"{where['date']}, specdec {where['versions']['specdec']}, fingerprint "
        f"{report['fingerprint']}. Settings: {settings}. More is in `collect.json`."
    )


def _table(names: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [names, ("---",) * len(names), *rows]
    return "\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    """Text that neither ends the cell nor is taken for a tag."""
    return str(value).replace("|", "\\|").replace("<", "&lt;")


# Share of queries that begin alike from which a split by conversation is lopsided.
_CROWD = 0.2


def kept_counts(splits: dict[str, list[Query]]) -> dict[str, Any]:
    """Counts of what is kept: by split, by domain and language, and how long it is."""
    queries = [query for found in splits.values() for query in found]
    domains = sorted({query.domain for query in queries})
    by_domain = {split: Counter(q.domain for q in found) for split, found in splits.items()}
    sizes = sorted(sum(len(t["content"]) for t in q.messages) + len(q.text) for q in queries)
    return {
        "kept": {split: len(found) for split, found in splits.items()},
        "domains": {name: {s: by_domain[s][name] for s in splits} for name in domains},
        "languages": dict(Counter(q.language for q in queries if q.language).most_common()),
        "characters": {"median": sizes[len(sizes) // 2], "max": sizes[-1]} if sizes else None,
    }


def warnings_of(splits: dict[str, list[Query]], settings: CollectSettings) -> list[str]:
    """What a user should know before training on the queries."""
    warnings = []
    total = sum(map(len, splits.values()))
    if settings.num is not None and total < settings.num:
        warnings.append(f"{total} queries were there, fewer than num={settings.num}")
    held = Counter(query.domain for query in splits["held_out"])
    for domain in sorted({query.domain for query in splits["train"]} - set(held)):
        if settings.held_out:
            warnings.append(f"no query of domain {domain!r} is held out; collect more of it")
    starts = Counter(q.conversation for found in splits.values() for q in found).most_common(1)
    if starts and total > 1 and starts[0][1] > _CROWD * total:
        warnings.append(
            f"{starts[0][1]} of {total} queries begin with the same user turn and are all in one "
            "split; move fixed examples into the system message to have them split"
        )
    return warnings


def check_kept(report: dict[str, Any], sources: Sequence[str]) -> None:
    """Refuse a collection without queries, and say where they went.

    Raises:
        ValueError: nothing is kept.
    """
    if any(report["kept"].values()):
        return
    why = {reason: drop for reason, drop in report["dropped"].items() if drop["count"]}
    counts = ", ".join(f"{drop['count']} {reason}" for reason, drop in why.items())
    first = next((example for drop in why.values() for example in drop["examples"]), None)
    shown = f"; the first: {first['where']}: {first['why']} {first['quote']!r}" if first else ""
    raise ValueError(f"{', '.join(sources)}: no query is left ({counts or 'no records'}){shown}")


Show = Callable[[int, int, str], None]
_SHOW_EVERY = 500


class Collector:
    """Queries as they come in, and what became of the others.

    Attributes:
        tally: of what was dropped.
    """

    def __init__(self, settings: CollectSettings, earlier: dict[str, list[Query]]):
        """Know the queries that are there already."""
        self.tally = Tally(settings.phone_region)
        self._settings, self._masker = settings, Masker(settings.phone_region)
        self._earlier = [query for queries in earlier.values() for query in queries]
        self._seen = {query.id for query in self._earlier}
        self._found: list[Query] = []

    @property
    def masked(self) -> Counter[str]:
        """How often each mask was put, in all queries that were read."""
        return self._masker.counts

    def read(self, source: QuerySource, show: Show) -> dict[str, int]:
        """Take in a source; returns its numbers of records, of queries, and of malformed lines.

        Raises:
            ValueError: more malformed lines than are allowed in all.
        """
        before, malformed, number = len(self._found), self.tally.counts["malformed"], 0
        for number, found in enumerate(source, 1):
            if isinstance(found, Malformed):
                self._refuse(found)
            else:
                self._take(found, source.name if source.named else "")
            if number % _SHOW_EVERY == 0:
                show(source.done_percent, 100, f"% of {source.name}")
        return {
            "records": number,
            "queries": len(self._found) - before,
            "malformed": self.tally.counts["malformed"] - malformed,
        }

    def _refuse(self, line: Malformed) -> None:
        self.tally.drop("malformed", line.where, line.text, line.reason)
        if self.tally.counts["malformed"] > self._settings.max_bad:
            quote, reason = self.tally.quote(line.text), self.tally.reason(line.reason)
            raise ValueError(
                f"more than max_bad={self._settings.max_bad} malformed lines; the last is "
                f"{line.where}: {reason}: {quote!r}; mend the file, name its --format or --column, "
                "or raise --max-bad"
            )

    def _take(self, record: Record, name: str) -> None:
        settings, asked = self._settings, []
        try:
            for each in asked_in(_column(record.value, settings.column), settings.turns):
                asked.append(each)
        except NoQueryError as error:  # the turns before it stand
            self.tally.drop(error.reason, record.where, _shown(record.value))
        except (ValueError, RecursionError) as error:
            self._refuse(Malformed(record.where, _shown(record.value), str(error)))
            return
        where = whole_characters(record.where)
        cleaning = _Cleaning(self._masker.mask if settings.mask else str)
        domain = whole_characters(_domain(record.value, settings, name))
        if settings.domain is None:  # a record's own may be a customer's address
            domain = cleaning.text(domain)
        for each in asked:
            self._add(each, domain, where, cleaning)

    def _add(self, asked: Asked, domain: str, where: str, cleaning: "_Cleaning") -> None:
        texts = [turn["content"] for turn in asked.messages] or [asked.text]
        if len(texts[-1].strip()) < self._settings.min_chars:
            self.tally.drop("too_short", where, texts[-1])
            return
        if sum(map(len, texts)) > self._settings.max_chars:
            self.tally.drop("too_long", where, texts[-1], f"{sum(map(len, texts))} characters")
            return
        asked = cleaning.apply(asked)
        name = query_id(asked.messages, asked.text)
        if name in self._seen:
            self.tally.drop("duplicate", where, texts[-1])
            return
        self._seen.add(name)
        conversation = conversation_id(asked.messages, asked.text)
        self._found.append(
            Query(name, asked.messages, asked.text, asked.answer, domain, "", where, conversation)
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
                self.tally.drop("near_duplicate", query.source, query.last_turn, twin)
            if number % _SHOW_EVERY == 0:
                show(number, len(order), "compared")
        show(len(order), len(order), "compared")
        left = len(order) - len(kept) - self.tally.counts["near_duplicate"]
        self.tally.counts["not_sampled"] = left
        return [self._found[index] for index in sorted(kept)]


class _Cleaning:
    """Of one record; its queries repeat each other's turns, which are cleaned and kept once."""

    def __init__(self, mask: Callable[[str], str]):
        self._mask = mask
        self._texts: dict[str, str] = {}
        self._turns: dict[tuple[str, str], Message] = {}

    def apply(self, asked: Asked) -> Asked:
        answer = None if asked.answer is None else self.text(asked.answer)
        return Asked(tuple(map(self._turn, asked.messages)), self.text(asked.text), answer)

    def text(self, text: str) -> str:
        if text not in self._texts:
            self._texts[text] = self._mask(whole_characters(text))
        return self._texts[text]

    def _turn(self, turn: Message) -> Message:
        key = turn["role"], turn["content"]
        if key not in self._turns:
            self._turns[key] = {"role": turn["role"], "content": self.text(turn["content"])}
        return self._turns[key]


def _column(value: Any, column: str | None) -> Any:
    if column is None:
        return value
    if not isinstance(value, dict) or column not in value:
        keys = sorted(map(str, value))[:12] if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"it has no column {column!r} but {keys}")
    return value[column]


def _domain(record: Any, settings: CollectSettings, name: str) -> str:
    if settings.domain is not None:
        return settings.domain
    given = record.get(settings.domain_field) if isinstance(record, dict) else None
    return name if given is None else str(given)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


SCHEMA = "specdec-collect-1"
REPORT = "collect.json"
_PACKAGES = ("specdec", "datasets", "datasketch", "phonenumbers", "py3langid", "python-stdnum")

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
) -> dict[str, Any]:
    """Write the queries of the sources into a folder, with a card and a report.

    Args:
        sources: as `open_source` takes them.
        out: folder to make. One that holds the same is left as it is.
        settings: of reading, cleaning and splitting.
        append: add to the queries that `out` holds.
        data_dir: folder with the files of named sources.
        show: called with things done, things in all, and a text.

    Returns:
        What `collect.json` in the folder says; docs/collect.schema.json describes it.

    Raises:
        FileNotFoundError: a source does not exist.
        ValueError: too many malformed lines, no query, or a folder that holds something else.
        OSError: the disk is full; the folder is as it was before.
    """
    begun, where = time.monotonic(), code(_PACKAGES)
    restore(out)
    opened = [_opened(name, settings, data_dir) for name in sources]
    inputs = [{"name": s.name, "parts": [part.identity() for part in s.parts]} for s in opened]
    fingerprint = _fingerprint(asdict(settings), inputs)
    earlier = _report_of(out)
    if earlier is not None and earlier["fingerprint"] == fingerprint:
        return earlier
    splits = _splits_of(out, earlier, settings, append)
    collector = Collector(settings, splits)
    counts = [collector.read(source, show) for source in opened]
    found = _tagged(collector.kept(show)) if settings.tag_language else collector.kept(show)
    for query in found:
        splits[split_of(query.conversation, settings.held_out)].append(query)
    report = {
        "schema": SCHEMA,
        "provenance": where,
        "fingerprint": fingerprint,
        "settings": asdict(settings),
        "sources": [{**given, **count} for given, count in zip(inputs, counts, strict=True)],
        "earlier": earlier and {key: earlier[key] for key in ("fingerprint", "kept")},
        "dropped": collector.tally.report(),
        "masked": {mask: collector.masked[mask] for mask in MASKS},
        **kept_counts(splits),
        "warnings": warnings_of(splits, settings),
        "seconds": round(time.monotonic() - begun, 1),
    }
    check_kept(report, sources)
    with whole_folder(out, private=True) as partial:
        write_queries(splits, partial)
        (partial / REPORT).write_bytes(_json(report))
        write_card(report, partial / "README.md")
    return report


def _json(report: dict[str, Any]) -> bytes:
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    return text.encode(errors="replace")  # names of files may hold what is no Unicode


def _opened(name: str, settings: CollectSettings, data_dir: Path | None) -> QuerySource:
    return open_source(
        name,
        form=settings.format,
        split=settings.split,
        subset=settings.subset,
        data_dir=data_dir,
    )


def _fingerprint(settings: dict[str, Any], inputs: list[dict[str, Any]]) -> str:
    text = json.dumps([SCHEMA, settings, inputs], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _report_of(out: Path) -> dict[str, Any] | None:
    """What the folder says of itself; None if it is not there, or empty."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        report = json.loads((out / REPORT).read_text())
    except (OSError, ValueError):
        report = None
    if not isinstance(report, dict) or report.get("schema") != SCHEMA:
        raise ValueError(f"{str(out)!r} exists and holds no collected queries; give another --out")
    return report


def _splits_of(
    out: Path, earlier: dict[str, Any] | None, settings: CollectSettings, append: bool
) -> dict[str, list[Query]]:
    """The queries that are there already, by split."""
    if earlier is None:
        return {split: [] for split in SPLITS}
    if not append:
        raise ValueError(
            f"{str(out)!r} holds queries of other sources or settings; give another --out, or "
            "--append to add to them"
        )
    if earlier["settings"]["held_out"] != settings.held_out:
        raise ValueError(
            f"held_out is {settings.held_out} but {str(out)!r} was split at "
            f"{earlier['settings']['held_out']}; give the same, so that no query moves"
        )
    return {split: read_queries(out, split) for split in SPLITS}


def _tagged(queries: Iterable[Query]) -> list[Query]:
    """With the languages of their last turns, where these are long enough to tell."""
    import py3langid

    tagged = []
    for query in queries:
        told = sum(map(str.isalpha, query.last_turn)) >= _TOLD_LETTERS
        language = py3langid.classify(query.last_turn)[0] if told else ""
        tagged.append(replace(query, language=language))
    return tagged
