"""Names of queries, and the split that each stays in for good."""

import hashlib
import json
import re
import unicodedata

from specdec.bench.prompt import Message

_HEX_DIGITS = 16


def plain(text: str) -> str:
    """The text without what near-duplicates differ in: case, width and runs of white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def query_id(messages: tuple[Message, ...], text: str) -> str:
    """A hash of exactly this query."""
    return _digest(json.dumps([messages, text], sort_keys=True))


def conversation_id(messages: tuple[Message, ...], text: str) -> str:
    """A hash that all queries of one conversation share, and those that differ in a number.

    It is that of the first user's turn, without case, punctuation and the values of numbers.
    """
    first = next((turn["content"] for turn in messages if turn["role"] == "user"), text)
    words = re.sub(r"[\W_]+", " ", re.sub(r"\d+(?:[.,]\d+)*", "0", plain(first))).strip()
    return _digest(words or first)


def split_of(conversation: str, held_out: float) -> str:
    """ "train" or "held_out", by the conversation's hash alone.

    What is held out at a share is held out at every larger one too.

    Args:
        conversation: as `conversation_id` names it.
        held_out: share of conversations that are, in 0 to 1.
    """
    return "held_out" if int(conversation, 16) < held_out * 16**_HEX_DIGITS else "train"


def sample_rank(query: str, seed: int) -> str:
    """What a sample is ordered by: its first 500 are among its first 2,000.

    Args:
        query: as `query_id` names it.
        seed: another one gives another sample.
    """
    return _digest(f"{seed}:{query}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_HEX_DIGITS]
