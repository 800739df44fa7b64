"""Workloads: the requests that every arm is given alike, call by call, in groups.

A call is a list of requests that are served together. The prompts of a bench, the turns of a
conversation, long contexts and users at the same time all become such lists here.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from specdec.bench.config import (
    BenchConfig,
    ConcurrentConfig,
    LongContextConfig,
    MultiTurnConfig,
    RunConfig,
    SingleTurnConfig,
)
from specdec.bench.prompts import encode_prompts, load_prompts, render
from specdec.common.messages import BenchPrompt
from specdec.engine.decode import generate_baseline
from specdec.engine.interfaces import Target
from specdec.engine.text import encode, tokenize

Progress = Callable[[int, int, str], None]
_BETWEEN = "\n\n"
_ANSWERED_TOGETHER = 16


@dataclass(frozen=True)
class Request:
    """A request that every arm is given alike.

    Attributes:
        id: unique in its workload.
        domain: source of its texts.
        prompt: token ids.
        max_new_tokens: new tokens, at most.
        seed: seed of its sampling.
        user: sender; a user's requests stand in their order.
        arrival_s: seconds after the start at which it is sent; None for "as soon as this user's
            one before is answered".
    """

    id: str
    domain: str
    prompt: list[int]
    max_new_tokens: int
    seed: int
    user: int = 0
    arrival_s: float | None = None

    @property
    def fingerprint(self) -> str:
        """A short hash of the prompt as the target reads it."""
        return fingerprint_of(self.prompt)


@dataclass(frozen=True)
class Group:
    """Requests whose results are one row of the table.

    Attributes:
        name: label for people.
        value: place on the axis: users, turn, or the largest number of tokens.
        calls: requests that are served together, call by call.
    """

    name: str
    value: int
    calls: list[list[Request]]

    @property
    def requests(self) -> list[Request]:
        """All requests, call after call."""
        return [request for call in self.calls for request in call]


def fingerprint_of(value: object) -> str:
    """A short hash of JSON values."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def make_groups(config: RunConfig, target: Target, progress: Progress) -> list[Group]:
    """Make the workload; `ValueError` for prompts that do not fit the context, or are too few."""
    prompts = load_prompts(**config.prompts.model_dump())
    if isinstance(config, BenchConfig):
        return [bench_group(config, prompts, target, progress)]
    pool = TextPool(prompts, target, config.seed)
    if isinstance(config, SingleTurnConfig):
        return single_turn_groups(config, pool)
    if isinstance(config, MultiTurnConfig):
        return multi_turn_groups(config, pool, target, progress)
    if isinstance(config, LongContextConfig):
        return long_context_groups(config, pool, target, progress)
    assert isinstance(config, ConcurrentConfig)
    return concurrent_groups(config, pool)


def bench_group(
    config: BenchConfig, prompts: Sequence[BenchPrompt], target: Target, progress: Progress
) -> Group:
    """Every prompt and every later turn as a request, `call_size` of them a call."""
    prompts = unfold_turns(prompts, target, config.max_new_tokens, progress)
    ids = encode_prompts(prompts, target)
    size = config.call_size
    calls = []
    for first in range(0, len(prompts), size):
        # transformers pads: the longest prompt of a call decides how many tokens all arms may add.
        room = target.max_context_len - max(map(len, ids[first : first + size]))
        limit = min(config.max_new_tokens, room)
        calls.append(
            [
                Request(prompts[i].id, prompts[i].domain, ids[i], limit, config.seed + i, i - first)
                for i in range(first, min(first + size, len(prompts)))
            ]
        )
    return Group("prompts", len(prompts), calls)


def unfold_turns(
    prompts: Sequence[BenchPrompt],
    target: Target,
    max_new_tokens: int,
    progress: Progress = lambda done, total, text: None,
) -> list[BenchPrompt]:
    """Make every follow-up a prompt of its own, asked after the target's own answer.

    The answers are decoded plainly and greedily before anything is measured, so that all arms
    are given the same second turn. Ids of later turns end in "-turn2", "-turn3", ...
    """
    unfolded: list[BenchPrompt] = []
    for done, prompt in enumerate(prompts):
        unfolded.append(replace(prompt, follow_ups=()))
        if prompt.follow_ups:
            progress(done, len(prompts), "answers to first turns")
        for number, question in enumerate(prompt.follow_ups, 2):
            asked = render(unfolded[-1], target.tokenizer)
            answer = generate_baseline(target, [asked], max_new_tokens=max_new_tokens)[0].text
            history = (
                *unfolded[-1].messages,
                {"role": "assistant", "content": answer},
                {"role": "user", "content": question},
            )
            unfolded.append(replace(unfolded[-1], id=f"{prompt.id}-turn{number}", messages=history))
    return unfolded


class TextPool:
    """Texts of a source, which become prompts as long as one wants.

    No text is cut, and none stands twice in a prompt. Seed and name of a prompt decide its length
    and its texts.
    """

    def __init__(self, prompts: Sequence[BenchPrompt], target: Target, seed: int = 0) -> None:
        if target.tokenizer is None:
            raise ValueError(
                "suites join texts, but the target has no tokenizer; give one that has"
            )
        self.prompts, self._target, self._seed = list(prompts), target, seed
        self.domains = list(dict.fromkeys(prompt.domain for prompt in prompts))

    def domain(self, index: int) -> str:
        """Domains in turn."""
        return self.domains[index % len(self.domains)]

    def encode(self, prompt: BenchPrompt) -> list[int]:
        """Token ids, chat template included; ValueError if they do not fit the context."""
        try:
            return encode(render(prompt, self._target.tokenizer), self._target)
        except ValueError as error:
            raise ValueError(f"prompt {prompt.id!r}: {error}") from error

    def draw(self, name: str, low: int, high: int) -> int:
        """A number from the range, both ends included, that the name decides."""
        return random.Random(f"{self._seed} {name}").randint(low, high)

    def order(self, name: str, domain: str) -> list[BenchPrompt]:
        """All texts in an order that the name decides, those of the domain first."""
        random_order = random.Random(f"{self._seed} {name} order")
        shuffled = random_order.sample(self.prompts, len(self.prompts))
        return sorted(shuffled, key=lambda prompt: prompt.domain != domain)

    def single_turn(self, name: str, domain: str, low: int, high: int) -> BenchPrompt:
        """One user turn of about as many tokens as the name draws from the range.

        Texts are added, a blank line between two, until the number is reached; one that would go
        beyond `high` is passed over.
        """
        goal = self.draw(f"{name} length", low, high)
        joined: list[str] = []
        length = 0
        for text in self.order(name, domain):
            longer = [*joined, last_words(text)]
            longer_len = self._num_tokens(_turn(name, domain, longer))
            if longer_len <= high:
                joined, length = longer, longer_len
            if length >= goal:
                break
        self._check_len(name, length, low, high)
        return _turn(name, domain, joined)

    def conversation(
        self, name: str, domain: str, low: int, high: int, answers: dict[str, str]
    ) -> BenchPrompt:
        """As many turns as fit into `high` tokens, each question with its text's own answer."""
        history: list[dict[str, str]] = []
        best, length = BenchPrompt(name, domain), 0
        for text in self.order(name, domain):
            question = {"role": "user", "content": last_words(text)}
            longer = BenchPrompt(name, domain, (*history, question))
            longer_len = self._num_tokens(longer)
            if longer_len <= high:
                best, length = longer, longer_len
                history += [question, {"role": "assistant", "content": answers[text.id]}]
        self._check_len(name, length, low, high)
        return best

    def _num_tokens(self, prompt: BenchPrompt) -> int:
        """Tokens, chat template included, whether they fit the context or not."""
        tokenizer = self._target.tokenizer
        return len(tokenize(render(prompt, tokenizer), tokenizer))

    def _check_len(self, name: str, length: int, low: int, high: int) -> None:
        if length < low:
            raise ValueError(
                f"prompt {name!r}: the {len(self.prompts)} texts of the source give {length} "
                f"tokens within {low} to {high}; give a larger pool (prompts.source, prompts.num) "
                "or another range"
            )


def last_words(prompt: BenchPrompt) -> str:
    """The last user turn, or the text."""
    return prompt.messages[-1]["content"] if prompt.messages else prompt.text


def _turn(name: str, domain: str, texts: list[str]) -> BenchPrompt:
    return BenchPrompt(name, domain, ({"role": "user", "content": _BETWEEN.join(texts)},))


def single_turn_groups(config: SingleTurnConfig, pool: TextPool) -> list[Group]:
    """A group for each bucket of lengths, with the pool's domains in turn."""
    groups = []
    seed = config.seed
    for bucket in config.buckets:
        calls = []
        for index in range(bucket.num):
            name, domain = f"{bucket.name}-{index}", pool.domain(index)
            prompt = pool.single_turn(name, domain, bucket.low, bucket.high)
            ids = pool.encode(prompt)
            calls.append([Request(name, domain, ids, config.max_new_tokens, seed)])
            seed += 1
        groups.append(Group(f"{bucket.name} ({bucket.low}-{bucket.high})", bucket.high, calls))
    return groups


def multi_turn_groups(
    config: MultiTurnConfig, pool: TextPool, target: Target, progress: Progress
) -> list[Group]:
    """A group for each turn; every turn is asked after the target's own greedy answers."""
    talks = [_talk(config.turns, pool, index) for index in range(config.conversations)]
    try:
        turns = unfold_turns(talks, target, config.max_new_tokens, progress)
        requests = [
            Request(p.id, p.domain, pool.encode(p), config.max_new_tokens, config.seed + number)
            for number, p in enumerate(turns)
        ]
    except ValueError as error:
        raise ValueError(f"{error}; or lower turns or max_new_tokens") from error
    return [
        Group(f"turn {turn + 1}", turn + 1, [[each] for each in requests[turn :: config.turns]])
        for turn in range(config.turns)
    ]


def _talk(num_turns: int, pool: TextPool, index: int) -> BenchPrompt:
    """A conversation: one text, its own follow-ups, then questions of its domain."""
    name, domain = f"talk-{index}", pool.domain(index)
    first, *others = pool.order(name, domain)
    questions = [*first.follow_ups, *map(last_words, others)]
    if len(questions) < num_turns - 1:
        raise ValueError(
            f"config turns is {num_turns} but the {len(pool.prompts)} texts of the source give "
            f"{1 + len(questions)}; lower it, or give a larger pool (prompts.source, prompts.num)"
        )
    opening = _turn(name, domain, [last_words(first)])
    return replace(opening, follow_ups=tuple(questions[: num_turns - 1]))


def long_context_groups(
    config: LongContextConfig, pool: TextPool, target: Target, progress: Progress
) -> list[Group]:
    """A group for each bin of positions: its prompts leave room in the bin for the answer alone.

    A prompt is a conversation of the pool's questions, each with the target's own greedy answer
    to it alone, so that no text stands there twice.
    """
    limit, new = _last_edge(config, target), config.max_new_tokens
    progress(0, 0, "answers to the pool's questions")
    questions = [pool.encode(_turn(p.id, p.domain, [last_words(p)])) for p in pool.prompts]
    results = generate_baseline(
        target, questions, max_new_tokens=new, batch_size=_ANSWERED_TOGETHER
    )
    answers = {text.id: result.text for text, result in zip(pool.prompts, results, strict=True)}
    groups = []
    for place in range(config.bins):
        low, high = limit * place // config.bins, limit * (place + 1) // config.bins
        calls = []
        for index in range(config.num):
            name, domain = f"context-{high}-{index}", pool.domain(index)
            prompt = pool.conversation(name, domain, max(1, low), high - new, answers)
            seed = config.seed + place * config.num + index
            calls.append([Request(name, domain, pool.encode(prompt), new, seed)])
        groups.append(Group(f"{low} to {high}", high, calls))
    return groups


def _last_edge(config: LongContextConfig, target: Target) -> int:
    limit = config.context_len or target.max_context_len
    if limit > target.max_context_len:
        raise ValueError(
            f"config context_len is {limit} but the target's context holds "
            f"{target.max_context_len}; lower it"
        )
    if limit // config.bins <= config.max_new_tokens:
        raise ValueError(
            f"config bins is {config.bins}, which makes them {limit // config.bins} tokens wide, "
            f"but a bin must hold a prompt and max_new_tokens, {config.max_new_tokens}; lower one"
        )
    return limit


def concurrent_groups(config: ConcurrentConfig, pool: TextPool) -> list[Group]:
    """A group for each number of users; the first user asks the same among two as among sixteen."""
    users = [_requests_of_user(config, pool, user) for user in range(max(config.users))]
    groups = []
    for num in config.users:
        # First requests of all users first: the order in which they arrive at the start.
        call = [request for turn in zip(*users[:num], strict=True) for request in turn]
        groups.append(Group(f"{num} user{'s' * (num > 1)}", num, [call]))
    return groups


def _requests_of_user(config: ConcurrentConfig, pool: TextPool, user: int) -> list[Request]:
    count, domain = config.requests_per_user, pool.domain(user)
    arrivals: list[float | None] = [None] * count
    if config.arrivals == "poisson":
        gaps = random.Random(f"{config.seed} user{user} arrivals")
        arrivals = list(accumulate(gaps.expovariate(config.rate) for _ in range(count)))
    requests = []
    for number in range(count):
        name = f"user{user}-{number}"
        prompt = pool.single_turn(name, domain, config.prompt_len.low, config.prompt_len.high)
        limit = pool.draw(f"{name} answer", config.answer_len.low, config.answer_len.high)
        seed = config.seed + user * count + number
        ids = pool.encode(prompt)
        requests.append(Request(name, domain, ids, limit, seed, user, arrivals[number]))
    return requests


def numbered(groups: Sequence[Group]) -> Iterator[tuple[int, Group]]:
    """Each group with the number of its first call in the run."""
    first = 0
    for group in groups:
        yield first, group
        first += len(group.calls)
