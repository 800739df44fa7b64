"""Counters of speculative decoding from a server's /metrics, which most engines name alike."""

import re
from collections import Counter
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import httpx

_NAME = re.compile(r"(?:vllm|llamacpp|specdec)[:_]spec_decode_num_(\w+?)(?:_total)?(?<!_created)")


@dataclass(frozen=True)
class Counters:
    """Counts since the server started; their difference tells of a time between.

    Attributes:
        num_drafts: steps that verified a draft.
        num_drafted: tokens drafted; None where the server does not count them, as SGLang.
        num_accepted: tokens accepted; None likewise.
        accepted_per_position: tokens accepted at position 1, 2, ... of a draft.
    """

    num_drafts: int
    num_drafted: int | None
    num_accepted: int | None
    accepted_per_position: tuple[int, ...] = ()

    def __sub__(self, before: "Counters | None") -> "Counters":
        """Count what came after `before`; a server that had drafted nothing yet has None."""
        if before is None:
            return self
        places = (self.accepted_per_position, before.accepted_per_position)
        return Counters(
            self.num_drafts - before.num_drafts,
            None if self.num_drafted is None else self.num_drafted - (before.num_drafted or 0),
            None if self.num_accepted is None else self.num_accepted - (before.num_accepted or 0),
            tuple(now - then for now, then in zip_longest(*places, fillvalue=0)),
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

    totals, places, num_calls = Counter[str](), Counter[int](), None
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if found := _NAME.fullmatch(sample.name):
                if "position" in sample.labels:
                    places[int(sample.labels["position"])] += int(sample.value)
                else:
                    totals[found[1]] += int(sample.value)
            elif sample.name == "sglang:spec_verify_calls_total":
                num_calls = (num_calls or 0) + int(sample.value)
    if "drafts" not in totals:
        return None if num_calls is None else Counters(num_calls, None, None)
    deep = tuple(places[place] for place in range(max(places, default=-1) + 1))
    return Counters(totals["drafts"], totals["draft_tokens"], totals["accepted_tokens"], deep)
