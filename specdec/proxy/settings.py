"""What the proxy records, and how much of it."""

import re
from dataclasses import dataclass
from pathlib import Path

MIB = 1024**2
_UNITS = {"": 1, "k": 1024, "m": MIB, "g": 1024**3, "t": 1024**4}


@dataclass(frozen=True)
class Settings:
    """Settings of a recording.

    Attributes:
        out: folder of the records; made if it is not there.
        sample: share of the requests that is recorded, from 0 to 1.
        max_body_bytes: larger requests, and larger answers, are served but not recorded.
        max_file_bytes: a file that would grow beyond it is followed by the next one.
        max_total_bytes: of all files in `out`; recording stops there, serving does not.
        max_held_bytes: memory for all requests and answers that are not written yet.
        max_wait_s: longest that the end of an answer waits for its record to reach the disk.

    Raises:
        ValueError: a share outside 0 to 1, or a size below one byte.
    """

    out: Path
    sample: float = 1.0
    max_body_bytes: int = 8 * MIB
    max_file_bytes: int = 256 * MIB
    max_total_bytes: int = 10 * 1024 * MIB
    max_held_bytes: int = 256 * MIB
    max_wait_s: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= self.sample <= 1:
            raise ValueError(
                f"--sample {self.sample} is no share; give 0 (nothing) to 1 (every request)"
            )
        for name in ("max_body_bytes", "max_file_bytes", "max_total_bytes", "max_held_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)} but must be at least 1")


def parse_size(text: str) -> int:
    """Bytes from "4096", "512K", "8M", "256MiB" or "1.5G"; units are powers of 1024.

    Raises:
        ValueError: no such size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if found is None:
        raise ValueError(f"{text!r} is no size; give bytes or a unit, as 8M, 256MiB or 1.5G")
    return int(float(found[1]) * _UNITS[found[2]])
