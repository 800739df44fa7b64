"""Reading, cleaning and drawing queries."""

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

from specdec.bench.prompt import Message
from specdec.data.collect_settings import CollectSettings
from specdec.data.conversation import Asked, NoQueryError, asked_in
from specdec.data.duplicates import NearDuplicates
from specdec.data.masking import Masker
from specdec.data.query import Query
from specdec.data.query_source import QuerySource
from specdec.data.records import Malformed, Record
from specdec.data.split import conversation_id, query_id, sample_rank
from specdec.data.tally import Tally, whole_characters

Show = Callable[[int, int, str], None]
_SHOW_EVERY = 500


class Collector:
    """Queries as they come in, and what became of the others.

    Attributes:
        tally: of what was dropped.
    """

    def __init__(self, settings: CollectSettings, earlier: dict[str, list[Query]]):
        """Know the queries that are there already."""
        self.tally = Tally(settings.phone_region)
        self._settings, self._masker = settings, Masker(settings.phone_region)
        self._earlier = [query for queries in earlier.values() for query in queries]
        self._seen = {query.id for query in self._earlier}
        self._found: list[Query] = []

    @property
    def masked(self) -> Counter[str]:
        """How often each mask was put, in all queries that were read."""
        return self._masker.counts

    def read(self, source: QuerySource, show: Show) -> dict[str, int]:
        """Take in a source; returns its numbers of records, of queries, and of malformed lines.

        Raises:
            ValueError: more malformed lines than are allowed in all.
        """
        before, malformed, number = len(self._found), self.tally.counts["malformed"], 0
        for number, found in enumerate(source, 1):
            if isinstance(found, Malformed):
                self._refuse(found)
            else:
                self._take(found, source.name if source.named else "")
            if number % _SHOW_EVERY == 0:
                show(source.done_percent, 100, f"% of {source.name}")
        return {
            "records": number,
            "queries": len(self._found) - before,
            "malformed": self.tally.counts["malformed"] - malformed,
        }

    def _refuse(self, line: Malformed) -> None:
        self.tally.drop("malformed", line.where, line.text, line.reason)
        if self.tally.counts["malformed"] > self._settings.max_bad:
            quote, reason = self.tally.quote(line.text), self.tally.reason(line.reason)
            raise ValueError(
                f"more than max_bad={self._settings.max_bad} malformed lines; the last is "
                f"{line.where}: {reason}: {quote!r}; mend the file, name its --format or --column, "
                "or raise --max-bad"
            )

    def _take(self, record: Record, name: str) -> None:
        settings, asked = self._settings, []
        try:
            for each in asked_in(_column(record.value, settings.column), settings.turns):
                asked.append(each)
        except NoQueryError as error:  # the turns before it stand
            self.tally.drop(error.reason, record.where, _shown(record.value))
        except (ValueError, RecursionError) as error:
            self._refuse(Malformed(record.where, _shown(record.value), str(error)))
            return
        where = whole_characters(record.where)
        cleaning = _Cleaning(self._masker.mask if settings.mask else str)
        domain = whole_characters(_domain(record.value, settings, name))
        if settings.domain is None:  # a record's own may be a customer's address
            domain = cleaning.text(domain)
        for each in asked:
            self._add(each, domain, where, cleaning)

    def _add(self, asked: Asked, domain: str, where: str, cleaning: "_Cleaning") -> None:
        texts = [turn["content"] for turn in asked.messages] or [asked.text]
        if len(texts[-1].strip()) < self._settings.min_chars:
            self.tally.drop("too_short", where, texts[-1])
            return
        if sum(map(len, texts)) > self._settings.max_chars:
            self.tally.drop("too_long", where, texts[-1], f"{sum(map(len, texts))} characters")
            return
        asked = cleaning.apply(asked)
        name = query_id(asked.messages, asked.text)
        if name in self._seen:
            self.tally.drop("duplicate", where, texts[-1])
            return
        self._seen.add(name)
        conversation = conversation_id(asked.messages, asked.text)
        self._found.append(
            Query(name, asked.messages, asked.text, asked.answer, domain, "", where, conversation)
        )

    def kept(self, show: Show) -> list[Query]:
        """The drawn queries that no other one nearly repeats, in the order they came in."""
        settings = self._settings
        near = NearDuplicates(settings.near_duplicates) if settings.near_duplicates else None
        if near:
            for query in self._earlier:
                near.seen(query)
        # By hash and not by place: what is kept must not change with the order of the sources.
        order = sorted(
            range(len(self._found)), key=lambda i: sample_rank(self._found[i].id, settings.seed)
        )
        kept: list[int] = []
        for number, index in enumerate(order):
            if len(kept) == settings.num:
                break
            query = self._found[index]
            other = near.seen(query) if near else None
            if other is None:
                kept.append(index)
            else:
                twin = f"like {other.source}: {other.last_turn}"
                self.tally.drop("near_duplicate", query.source, query.last_turn, twin)
            if number % _SHOW_EVERY == 0:
                show(number, len(order), "compared")
        show(len(order), len(order), "compared")
        left = len(order) - len(kept) - self.tally.counts["near_duplicate"]
        self.tally.counts["not_sampled"] = left
        return [self._found[index] for index in sorted(kept)]


class _Cleaning:
    """Of one record; its queries repeat each other's turns, which are cleaned and kept once."""

    def __init__(self, mask: Callable[[str], str]):
        self._mask = mask
        self._texts: dict[str, str] = {}
        self._turns: dict[tuple[str, str], Message] = {}

    def apply(self, asked: Asked) -> Asked:
        answer = None if asked.answer is None else self.text(asked.answer)
        return Asked(tuple(map(self._turn, asked.messages)), self.text(asked.text), answer)

    def text(self, text: str) -> str:
        if text not in self._texts:
            self._texts[text] = self._mask(whole_characters(text))
        return self._texts[text]

    def _turn(self, turn: Message) -> Message:
        key = turn["role"], turn["content"]
        if key not in self._turns:
            self._turns[key] = {"role": turn["role"], "content": self.text(turn["content"])}
        return self._turns[key]


def _column(value: Any, column: str | None) -> Any:
    if column is None:
        return value
    if not isinstance(value, dict) or column not in value:
        keys = sorted(map(str, value))[:12] if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"it has no column {column!r} but {keys}")
    return value[column]


def _domain(record: Any, settings: CollectSettings, name: str) -> str:
    if settings.domain is not None:
        return settings.domain
    given = record.get(settings.domain_field) if isinstance(record, dict) else None
    return name if given is None else str(given)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
