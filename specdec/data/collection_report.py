"""What a collection came to."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from specdec.data.collect_settings import CollectSettings
from specdec.data.query import Query

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
