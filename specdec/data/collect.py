"""From sources to a folder of queries: read, mask, drop duplicates, draw, split, write."""

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from specdec.data.collect_settings import CollectSettings
from specdec.data.collection_card import write_card
from specdec.data.collection_report import check_kept, kept_counts, warnings_of
from specdec.data.collector import Collector, Show
from specdec.data.masking import MASKS
from specdec.data.query import SPLITS, Query, read_queries, write_queries
from specdec.data.query_source import QuerySource, open_source
from specdec.data.split import split_of
from specdec.files import restore, whole_folder
from specdec.provenance import code

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
