"""How many tokens a suite's prompts and answers have."""

from dataclasses import dataclass


@dataclass
class LengthBucket:
    """Prompts of `low` to `high` tokens, both included, and how many of them."""

    name: str = ""
    low: int = 1
    high: int = 64
    num: int = 6


def usual_buckets() -> list[LengthBucket]:
    """Short, medium and long prompts."""
    return [
        LengthBucket("short", 1, 48),
        LengthBucket("medium", 128, 256),
        LengthBucket("long", 512, 1024),
    ]


@dataclass
class LengthRange:
    """Lengths drawn evenly from `low` to `high` tokens, both included."""

    low: int = 16
    high: int = 256
