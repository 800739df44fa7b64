"""What decides the answers of a run, and what makes two runs the same one."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from specdec.data.dialogue import TURNS
from specdec.data.query import SPLITS, Query
from specdec.sampling_config import SamplingConfig


@dataclass(frozen=True)
class AnswerSettings:
    """What decides the answers.

    Attributes:
        temperatures: each query gets one of them, by hash of its id.
        top_p: of the sampled ones.
        max_new_tokens: of an answer.
        turns: "last" answers the last user turn with the recorded context, "all" every user turn
            after the target's own earlier answers.
        seed: of temperatures and samples.

    Raises:
        ValueError: a value breaks its rule.
    """

    temperatures: tuple[float, ...] = (0.0,)
    top_p: float = 1.0
    max_new_tokens: int = 512
    turns: str = "last"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperatures:
            raise ValueError("temperatures is empty; give at least one, 0 for greedy answers")
        for temperature in self.temperatures:
            SamplingConfig(temperature, top_p=self.top_p, seed=self.seed)
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens} but must be at least 1")
        if self.turns not in TURNS:
            raise ValueError(f"turns is {self.turns!r} but must be one of {', '.join(TURNS)}")

    def values(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return {**asdict(self), "temperatures": list(self.temperatures)}


def run_identity(queries: dict[str, list[Query]], settings: AnswerSettings) -> dict[str, Any]:
    """What must be the same for a run to go on in a folder, by name."""
    hashes = {f"{split}_queries": _query_hash(queries[split]) for split in SPLITS}
    return {**hashes, **settings.values()}


def _query_hash(queries: Iterable[Query]) -> str:
    whole = hashlib.sha256()
    for query in queries:
        whole.update(json.dumps([query.id, query.messages, query.text]).encode() + b"\n")
    return whole.hexdigest()[:16]


def template_hash(tokenizer: Any) -> str | None:
    """Of the chat template; None where there is none."""
    template = getattr(tokenizer, "chat_template", None)
    return hashlib.sha256(json.dumps(template).encode()).hexdigest()[:16] if template else None
