"""Counters of speculative decoding from a server's /metrics, which most engines name alike."""

import re
from collections import Counter
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import httpx

_NAME = re.compile(  # SGLang counts its "verify calls" alone
    r"(vllm|llamacpp|specdec|sglang)[:_]spec_(?:decode_num|verify)_(\w+?)(?:_total)?(?<!_created)"
)


@dataclass(frozen=True)
class Counters:
    """Counts since the server started; their difference tells of a time between.

    Attributes:
        num_drafts: steps that verified a draft.
        num_drafted: tokens drafted; 0 where the server does not count them, as SGLang.
        num_accepted: tokens accepted; None likewise.
        accepted_per_position: tokens accepted at position 1, 2, ... of a draft.
        engine: the name before all names, by whose rules was counted.
    """

    num_drafts: int
    num_drafted: int = 0
    num_accepted: int | None = None
    accepted_per_position: tuple[int, ...] = ()
    engine: str = ""

    def __sub__(self, before: "Counters | None") -> "Counters":
        """Count what came after `before`; a server that had drafted nothing yet has None."""
        if before is None:
            return self
        places = (self.accepted_per_position, before.accepted_per_position)
        return Counters(
            self.num_drafts - before.num_drafts,
            self.num_drafted - before.num_drafted,
            None if self.num_accepted is None else self.num_accepted - (before.num_accepted or 0),
            tuple(now - then for now, then in zip_longest(*places, fillvalue=0)),
            self.engine,
        )


def read_counters(url: str, client: Any = httpx) -> Counters | None:
    """Read the counters of the server at this URL, with or without its /v1; None if it has none.

    Raises:
        RuntimeError: nobody answers.
    """
    address = f"{url.rstrip('/').removesuffix('/v1')}/metrics"
    try:
        reply = client.get(address, timeout=10.0)
    except httpx.HTTPError as error:
        what = f"{type(error).__name__} {error}".strip()
        raise RuntimeError(f"{address} does not answer ({what}); is the server up?") from error
    return parse_counters(reply.text) if reply.is_success else None


def parse_counters(text: str) -> Counters | None:
    """Add up the counters of all models and ranks on a page of /metrics."""
    from prometheus_client.parser import text_string_to_metric_families

    engine, totals, places = "", Counter[str](), Counter[int]()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if found := _NAME.fullmatch(sample.name):
                engine = found[1]
                if "position" in sample.labels:
                    places[int(sample.labels["position"])] += int(sample.value)
                else:
                    totals[found[2]] += int(sample.value)
    if (num_drafts := totals.get("drafts", totals.get("calls"))) is None:
        return None
    deep = tuple(places[place] for place in range(len(places)))
    accepted = totals.get("accepted_tokens")
    return Counters(num_drafts, totals["draft_tokens"], accepted, deep, engine)
