"""The card of collected queries: what they are, for the people who use them."""

from pathlib import Path
from typing import Any

from specdec.data.tally import REASONS

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
