"""What was dropped and why, with examples that are safe to show."""

from collections import Counter
from typing import Any

from specdec.data.masking import PHONE_REGION, Masker

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
