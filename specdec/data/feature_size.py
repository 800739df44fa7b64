"""How large a feature store would be, and which choices make it smaller."""

from dataclasses import dataclass, replace

from specdec.data.feature_layout import DTYPES, Counts, FeatureLayout
from specdec.data.tap_names import resolve_taps

TOP_KS = (0, 16, 64, 256)
TAP_SETS = ("none", "eagle", "eagle3", "eagle3,eagle")


@dataclass(frozen=True)
class Choice:
    """A way to store the same rows.

    Attributes:
        layout: what is kept.
        num_bytes: of the whole store, without the headers of its files.
        bytes_per_token: of all tokens, prompts included.
    """

    layout: FeatureLayout
    num_bytes: int
    bytes_per_token: float

    @classmethod
    def of(cls, layout: FeatureLayout, counts: Counts) -> "Choice":
        """This layout for rows with these counts."""
        size = layout.num_bytes(counts)
        return cls(layout, size, size / counts.tokens)

    @property
    def label(self) -> str:
        """As options of the command."""
        layout = self.layout
        taps = ",".join(map(str, layout.taps)) or "none"
        return f"--taps {taps} --dtype {layout.dtype} --top-k {layout.top_k}"


def choices(layout: FeatureLayout, counts: Counts) -> list[Choice]:
    """The given layout among others: tap sets by dtypes by numbers of logits, smallest first."""
    tap_sets = {resolve_taps(names, layout.num_layers) for names in TAP_SETS} | {layout.taps}
    top_ks = {top_k for top_k in (*TOP_KS, layout.top_k) if top_k <= layout.vocab_size}
    found = []
    for taps in tap_sets:
        for top_k in top_ks:
            if not top_k and layout.num_layers not in taps:
                continue  # there would be no way to get logits
            # Without taps their dtype makes no difference.
            dtypes = DTYPES if taps else {layout.dtype}
            changes = [replace(layout, taps=taps, top_k=top_k, dtype=dtype) for dtype in dtypes]
            found += [Choice.of(changed, counts) for changed in changes]
    return sorted(found, key=lambda choice: (choice.num_bytes, choice.label))


def cheaper(layout: FeatureLayout, counts: Counts, free: int) -> list[Choice]:
    """Of every set of these taps the largest choice that fits, or the smallest if none does.

    None of them keeps more logits than the given layout.
    """
    best: dict[tuple[int, ...], Choice] = {}
    chosen = Choice.of(layout, counts)
    for choice in choices(layout, counts):  # smallest first
        other = choice.layout
        is_part = set(other.taps) <= set(layout.taps) and other.top_k <= layout.top_k
        is_better = other.taps not in best or choice.num_bytes <= free
        if is_part and is_better and choice.num_bytes < chosen.num_bytes:
            best[other.taps] = choice
    return sorted(best.values(), key=lambda choice: -choice.num_bytes)


def refuse_what_does_not_fit(
    needed: int, free: int, where: str, layout: FeatureLayout, counts: Counts
) -> None:
    """Refuse a store that the disk cannot hold.

    Args:
        needed: bytes that are still to be written.
        free: bytes of the disk.
        where: the store's folder, for the message.
        layout: asked for.
        counts: of all rows.

    Raises:
        ValueError: it does not fit; says what would take less.
    """
    if needed <= free:
        return
    chosen = Choice.of(layout, counts)
    others = "; ".join(
        f"{each.label}: {each.bytes_per_token:,.1f} bytes per token, {each.num_bytes:,} bytes"
        f"{'' if each.num_bytes <= free else ', still too many'}"
        for each in cheaper(layout, counts, free)
    )
    raise ValueError(
        f"the store needs {needed:,} bytes ({chosen.bytes_per_token:,.1f} per token) but only "
        f"{free:,} are free at {where!r}; give another --out, or store less: "
        f"{others or 'fewer rows'}"
    )
