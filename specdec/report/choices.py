"""What a feature store would take on the disk, by choice, as a table."""

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table


def choices_table(found: Sequence[dict[str, Any]], chosen: dict[str, Any]) -> Table:
    """One row a choice of taps, dtype and number of logits; the chosen one is marked.

    Args:
        found: of `FeatureExtraction.choices`.
        chosen: one of them.
    """
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("taps")
    table.add_column("dtype")
    for header in ("top-k", "bytes per token", "bytes"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("")
    for each in found:
        note = "chosen" if each == chosen else ""
        table.add_row(
            ",".join(map(str, each["taps"])) or "none",
            each["dtype"] if each["taps"] else "-",
            str(each["top_k"]),
            f"{each['bytes_per_token']:,.1f}",
            f"{each['bytes']:,}",
            ", ".join(filter(None, [note, "" if each["fits"] else "does not fit"])),
        )
    return table
