"""Workloads: the requests that every arm is given alike, call by call, in groups.

A call is a list of requests that are served together. The prompts of a bench, the turns of a
conversation, long contexts and users at the same time all become such lists here.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from typing import Any

from specdec.bench.config import (
    BenchConfig,
    ConcurrentConfig,
    LongContextConfig,
    MultiTurnConfig,
    RunConfig,
    SingleTurnConfig,
)
from specdec.bench.prompts import encode_prompts, load_prompts, render
from specdec.common.messages import BenchPrompt, Message
from specdec.engine.decode import generate_baseline
from specdec.engine.interfaces import Target
from specdec.engine.text import tokenize

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Request:
    """A request that every arm is given alike; a user's requests stand in their order."""

    id: str
    domain: str
    prompt: list[int]
    max_new_tokens: int
    seed: int
    user: int = 0
    arrival_s: float | None = None  # None: as soon as this user's one before is answered

    @property
    def num_tokens(self) -> int:
        return len(self.prompt)

    @property
    def fingerprint(self) -> str:
        """A short hash of the prompt as the target reads it."""
        return fingerprint_of(self.prompt)


@dataclass(frozen=True)
class Group:
    """Calls whose results are one row of the table; `value` is its place on the axis."""

    name: str
    value: int
    calls: list[list[Request]]

    @property
    def requests(self) -> list[Request]:
        return [request for call in self.calls for request in call]

    def batches(self, rows: int) -> dict[int, int]:
        """Sizes of the batches of all calls, each with the most tokens of any, answer included."""
        longest = [
            max(each.num_tokens for each in call) + call[0].max_new_tokens for call in self.calls
        ]
        sizes = (
            min(rows, len(call) - first)
            for call in self.calls
            for first in range(0, len(call), rows)
        )
        return dict.fromkeys(sizes, max(longest))


def fingerprint_of(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def make_groups(config: RunConfig, target: Target, progress: Progress) -> list[Group]:
    """Make the workload; `ValueError` for prompts that do not fit the context, or are too few."""
    prompts = load_prompts(**config.prompts.model_dump())
    if isinstance(config, BenchConfig):
        return [bench_group(config, prompts, target, progress)]
    make = _SUITES[type(config)]
    return list(make(config, _TextPool(prompts, target, config.seed), progress))


# --- A bench ---


def bench_group(
    config: BenchConfig, prompts: Sequence[BenchPrompt], target: Target, progress: Progress
) -> Group:
    """Every prompt and every later turn as a request, some of them a call."""
    prompts = unfold_turns(prompts, target, config.max_new_tokens, progress)
    ids = encode_prompts(prompts, target)
    size = config.prompts_per_call or config.batch_size
    calls: list[list[Request]] = []
    for first in range(0, len(prompts), size):
        # transformers pads: the longest prompt of a call decides how many tokens all arms may add.
        room = target.max_context_len - max(map(len, ids[first : first + size]))
        limit = min(config.max_new_tokens, room)
        call = [
            Request(prompt.id, prompt.domain, ids[place], limit, config.seed + place, place - first)
            for place, prompt in enumerate(prompts[first : first + size], first)
        ]
        calls.append(call)
    return Group("prompts", len(prompts), calls)


def unfold_turns(
    prompts: Sequence[BenchPrompt],
    target: Target,
    max_new_tokens: int,
    progress: Progress = lambda done, total, text: None,
) -> list[BenchPrompt]:
    """Make every follow-up a prompt of its own, asked after the target's own greedy answer.

    The answers are decoded before anything is measured, so that all arms are given the same turns.
    """
    unfolded: list[BenchPrompt] = []
    for done, prompt in enumerate(prompts):
        asked = replace(prompt, follow_ups=())
        unfolded.append(asked)
        if prompt.follow_ups:
            progress(done, len(prompts), "answers to first turns")
        for number, question in enumerate(prompt.follow_ups, 2):
            given = [render(asked, target.tokenizer)]
            (answer,) = _answers(target, given, max_new_tokens)
            turns = {"role": "assistant", "content": answer}, {"role": "user", "content": question}
            messages = (*asked.messages, *turns)
            asked = replace(asked, id=f"{prompt.id}-turn{number}", messages=messages)
            unfolded.append(asked)
    return unfolded


def _answers(target: Any, prompts: Any, max_new_tokens: int, batch_size: int = 1) -> list[str]:
    """Texts of the target's greedy answers, which a target that is elsewhere gives itself."""
    if hasattr(target, "answers"):
        return list(target.answers(prompts, max_new_tokens))
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    return [result.text for result in generate_baseline(target, prompts, **options)]


# --- Suites ---


class _TextPool:
    """Texts of a source, which become prompts as long as one wants.

    No text is cut, and none stands twice in a prompt. Seed and name of a prompt decide its length
    and its texts; requests have seeds of their own, one after the other.
    """

    def __init__(self, prompts: Sequence[BenchPrompt], target: Target, seed: int) -> None:
        if target.tokenizer is None:
            raise ValueError("suites join texts, but the target has no tokenizer; give one with it")
        self.texts, self.target, self._seed = list(prompts), target, seed
        self._domains = list(dict.fromkeys(prompt.domain for prompt in prompts))
        self._seeds = count(seed)

    def domain(self, index: int) -> str:
        return self._domains[index % len(self._domains)]

    def draw(self, name: str, low: int, high: int) -> int:
        """A number from the range that the name decides."""
        return random.Random(f"{self._seed} {name}").randint(low, high)

    def order(self, name: str, domain: str) -> list[BenchPrompt]:
        """All texts in an order that the name decides, those of the domain first."""
        random_order = random.Random(f"{self._seed} {name} order")
        shuffled = random_order.sample(self.texts, len(self.texts))
        return sorted(shuffled, key=lambda prompt: prompt.domain != domain)

    def prompt(
        self, name: str, domain: str, low: int, high: int, answers: Mapping[str, str] | None = None
    ) -> BenchPrompt:
        """A prompt of `low` to `high` tokens; a text that would go beyond is passed over.

        Without answers it is one user turn of texts, as many as a length drawn from the range
        takes; with them a conversation of all that fit, each text with its own answer.
        """
        goal = self.draw(f"{name} length", low, high) if answers is None else high
        best, length = BenchPrompt(name, domain), 0
        texts: list[BenchPrompt] = []
        for text in self.order(name, domain):
            longer = BenchPrompt(name, domain, _turns([*texts, text], answers))
            tokenizer = self.target.tokenizer
            longer_len = len(tokenize(render(longer, tokenizer), tokenizer))
            if longer_len <= high:
                best, length = longer, longer_len
                texts.append(text)
            if length >= goal:
                break
        if length < low:
            raise ValueError(
                f"prompt {name!r}: the {len(self.texts)} texts of the source give {length} tokens "
                f"within {low} to {high}; give a larger pool (prompts.source, prompts.num) or "
                "another range"
            )
        return best

    def request(self, prompt: BenchPrompt, max_new_tokens: int, **when: Any) -> Request:
        (ids,) = encode_prompts([prompt], self.target)
        seed = next(self._seeds)
        return Request(prompt.id, prompt.domain, ids, max_new_tokens, seed, **when)

    def calls(self, num: int, name: str, max_new_tokens: int, *limits: Any) -> list[list[Request]]:
        """Calls of one request; limits are those of `prompt`."""
        names = {f"{name}-{index}": self.domain(index) for index in range(num)}
        prompts = [self.prompt(name, domain, *limits) for name, domain in names.items()]
        return [[self.request(prompt, max_new_tokens)] for prompt in prompts]


def _turns(texts: Sequence[BenchPrompt], answers: Mapping[str, str] | None) -> tuple[Message, ...]:
    """One user turn of all texts, or turns with answers but for the last."""
    words = [text.messages[-1]["content"] if text.messages else text.text for text in texts]
    if answers is None:
        return ({"role": "user", "content": "\n\n".join(words)},)
    turns = (
        ({"role": "user", "content": question}, {"role": "assistant", "content": answers[text.id]})
        for text, question in zip(texts, words, strict=True)
    )
    return tuple(chain(*turns))[:-1]


def _single_turn(config: SingleTurnConfig, pool: _TextPool, progress: Progress) -> Iterator[Group]:
    for bucket in config.buckets:
        low, high = bucket.low, bucket.high
        calls = pool.calls(bucket.num, bucket.name, config.max_new_tokens, low, high)
        yield Group(f"{bucket.name} ({low}-{high})", high, calls)


def _multi_turn(config: MultiTurnConfig, pool: _TextPool, progress: Progress) -> Iterator[Group]:
    """A group for each turn; every turn is asked after the target's own greedy answers.

    A conversation is one text, its own follow-ups, then other texts of its domain.
    """
    talks = []
    for index in range(config.conversations):
        name, domain = f"talk-{index}", pool.domain(index)
        first, *others = pool.order(name, domain)
        later = [*first.follow_ups, *(_turns([text], None)[0]["content"] for text in others)]
        if len(later) < config.turns - 1:
            raise ValueError(
                f"config turns is {config.turns} but the {len(pool.texts)} texts of the source "
                f"give {1 + len(later)}; lower it, or give a larger pool (prompts.source, "
                "prompts.num)"
            )
        follow_ups = tuple(later[: config.turns - 1])
        talks.append(BenchPrompt(name, domain, _turns([first], None), follow_ups=follow_ups))
    try:
        turns = unfold_turns(talks, pool.target, config.max_new_tokens, progress)
        calls = [[pool.request(prompt, config.max_new_tokens)] for prompt in turns]
    except ValueError as error:
        raise ValueError(f"{error}; or lower turns or max_new_tokens") from error
    for turn in range(config.turns):
        yield Group(f"turn {turn + 1}", turn + 1, calls[turn :: config.turns])


def _long_context(
    config: LongContextConfig, pool: _TextPool, progress: Progress
) -> Iterator[Group]:
    """A group for each bin of positions: its prompts leave room in the bin for the answer alone."""
    room, new = pool.target.max_context_len, config.max_new_tokens
    limit = config.context_len or room
    if limit > room:
        raise ValueError(
            f"config context_len is {limit} but the target's context holds {room}; lower it"
        )
    if limit // config.bins <= new:
        raise ValueError(
            f"config bins is {config.bins}, which makes them {limit // config.bins} tokens wide, "
            f"but a bin must hold a prompt and max_new_tokens, {new}; lower one"
        )
    progress(0, 0, "answers to the pool's questions")
    asked = [replace(text, messages=_turns([text], None)) for text in pool.texts]
    ids = encode_prompts(asked, pool.target)
    found = _answers(pool.target, ids, new, batch_size=16)
    answers = {text.id: answer for text, answer in zip(asked, found, strict=True)}
    for place in range(config.bins):
        low, high = limit * place // config.bins, limit * (place + 1) // config.bins
        ends = max(1, low), high - new
        calls = pool.calls(config.num, f"context-{high}", new, *ends, answers)
        yield Group(f"{low} to {high}", high, calls)


def _concurrent(config: ConcurrentConfig, pool: _TextPool, progress: Progress) -> Iterator[Group]:
    """A group for each number of users; the first user asks the same among two as among sixteen."""
    users = []
    for user in range(max(config.users)):
        gaps, now_s, requests = random.Random(f"{config.seed} user{user} arrivals"), 0.0, []
        for number in range(config.requests_per_user):
            name = f"user{user}-{number}"
            prompt_len, answer_len = config.prompt_len, config.answer_len
            prompt = pool.prompt(name, pool.domain(user), prompt_len.low, prompt_len.high)
            limit = pool.draw(f"{name} answer", answer_len.low, answer_len.high)
            now_s += gaps.expovariate(config.rate)
            when = now_s if config.arrivals == "poisson" else None
            requests.append(pool.request(prompt, limit, user=user, arrival_s=when))
        users.append(requests)
    for num in config.users:
        # First requests of all users first: the order in which they arrive at the start.
        call = [request for turn in zip(*users[:num], strict=True) for request in turn]
        yield Group(f"{num} user{'s' * (num > 1)}", num, [call])


_SUITES: dict[type[RunConfig], Callable[..., Iterator[Group]]] = {
    SingleTurnConfig: _single_turn,
    MultiTurnConfig: _multi_turn,
    LongContextConfig: _long_context,
    ConcurrentConfig: _concurrent,
}
