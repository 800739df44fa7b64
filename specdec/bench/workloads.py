"""Prompts of wanted lengths, made by joining whole texts of a pool."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from specdec.bench.config import (
    ConcurrentConfig,
    LengthBucket,
    LongContextConfig,
    MultiTurnConfig,
    SingleTurnConfig,
)
from specdec.bench.prompts import render
from specdec.common.messages import BenchPrompt
from specdec.engine.decode import generate_baseline
from specdec.engine.interfaces import Target
from specdec.engine.text import encode, tokenize

_BETWEEN = "\n\n"


class TextPool:
    """Texts of a source, which become prompts as long as one wants.

    No text is cut, and none stands twice in a prompt.

    Args:
        prompts: the pool.
        target: whose tokens are counted.
        seed: with a prompt's name it decides length and texts.
    """

    def __init__(self, prompts: Sequence[BenchPrompt], target: Target, seed: int = 0) -> None:
        if target.tokenizer is None:
            raise ValueError(
                "suites join texts, but the target has no tokenizer; give one that has"
            )
        self.prompts, self._target, self._seed = list(prompts), target, seed
        self.domains = list(dict.fromkeys(prompt.domain for prompt in prompts))

    def encode(self, prompt: BenchPrompt) -> list[int]:
        """Token ids, chat template included.

        Raises:
            ValueError: it does not fit the target's context.
        """
        try:
            return encode(render(prompt, self._target.tokenizer), self._target)
        except ValueError as error:
            raise ValueError(f"prompt {prompt.id!r}: {error}") from error

    def num_tokens(self, prompt: BenchPrompt) -> int:
        """Tokens, chat template included, whether they fit the context or not."""
        tokenizer = self._target.tokenizer
        return len(tokenize(render(prompt, tokenizer), tokenizer))

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

        Raises:
            ValueError: the pool's texts do not give `low` tokens.
        """
        goal = self.draw(f"{name} length", low, high)
        joined: list[str] = []
        length = 0
        for text in self.order(name, domain):
            longer = [*joined, _words(text)]
            longer_len = self.num_tokens(_turn(name, domain, longer))
            if longer_len <= high:
                joined, length = longer, longer_len
            if length >= goal:
                break
        self._check_len(name, length, low, high)
        return _turn(name, domain, joined)

    def conversation(
        self, name: str, domain: str, low: int, high: int, answer: Callable[[BenchPrompt], str]
    ) -> BenchPrompt:
        """As many turns as fit into `high` tokens, each question with its own answer.

        Args:
            name: of the prompt, which decides the order of its texts.
            domain: whose texts come first.
            low: tokens that must be reached.
            high: tokens that must not be exceeded.
            answer: of a text of the pool.

        Raises:
            ValueError: the pool's texts do not give `low` tokens.
        """
        history: list[dict[str, str]] = []
        best, length = _conversation(name, domain, []), 0
        for text in self.order(name, domain):
            question = {"role": "user", "content": _words(text)}
            longer = _conversation(name, domain, [*history, question])
            longer_len = self.num_tokens(longer)
            if longer_len > high:
                continue
            best, length = longer, longer_len
            history += [question, {"role": "assistant", "content": answer(text)}]
        self._check_len(name, length, low, high)
        return best

    def _check_len(self, name: str, length: int, low: int, high: int) -> None:
        if length < low:
            raise ValueError(
                f"prompt {name!r}: the {len(self.prompts)} texts of the source give {length} "
                f"tokens within {low} to {high}; give a larger pool (prompts.source, prompts.num) "
                "or another range"
            )


def last_words(prompt: BenchPrompt) -> BenchPrompt:
    """The prompt's last user turn alone, or its text."""
    return _turn(prompt.id, prompt.domain, [_words(prompt)])


def _words(prompt: BenchPrompt) -> str:
    return prompt.messages[-1]["content"] if prompt.messages else prompt.text


def _turn(name: str, domain: str, texts: list[str]) -> BenchPrompt:
    return _conversation(name, domain, [{"role": "user", "content": _BETWEEN.join(texts)}])


def _conversation(name: str, domain: str, messages: list[dict[str, str]]) -> BenchPrompt:
    return replace(BenchPrompt(name, domain), messages=tuple(messages))


@dataclass(frozen=True)
class Ask:
    """A request that every arm is given alike.

    Attributes:
        id: unique in its suite.
        domain: of its texts.
        prompt: token ids.
        max_new_tokens: new tokens, at most.
        seed: of its sampling.
        user: who sends it; a user's requests stand in their order.
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


@dataclass(frozen=True)
class Group:
    """Requests whose results are one row of the table.

    Attributes:
        name: for people.
        value: its place on the axis: users, turn, or the largest number of tokens.
        calls: requests that are served together, call by call.
    """

    name: str
    value: int
    calls: list[list[Ask]]

    @property
    def asks(self) -> list[Ask]:
        """All requests, call after call."""
        return [ask for call in self.calls for ask in call]


def concurrent_groups(config: ConcurrentConfig, pool: TextPool) -> list[Group]:
    """A group for each number of users; the first user asks the same among two as among sixteen.

    Raises:
        ValueError: the pool does not give so many tokens, or they do not fit the context.
    """
    users = [_user(config, pool, user) for user in range(max(config.users))]
    groups = []
    for num in config.users:
        # First requests of all users first: the order in which they arrive at the start.
        call = [ask for turn in zip(*users[:num], strict=True) for ask in turn]
        groups.append(Group(f"{num} user{'s' * (num > 1)}", num, [call]))
    return groups


def _user(config: ConcurrentConfig, pool: TextPool, user: int) -> list[Ask]:
    arrivals = _arrivals(config, user)
    domain = pool.domains[user % len(pool.domains)]
    asks = []
    for number in range(config.requests_per_user):
        name = f"user{user}-{number}"
        prompt = pool.single_turn(name, domain, config.prompt_len.low, config.prompt_len.high)
        limit = pool.draw(f"{name} answer", config.answer_len.low, config.answer_len.high)
        seed = config.seed + user * config.requests_per_user + number
        ids = pool.encode(prompt)
        asks.append(Ask(name, domain, ids, limit, seed, user, arrivals[number]))
    return asks


def _arrivals(config: ConcurrentConfig, user: int) -> list[float | None]:
    """When a user's requests are sent; None for closed loops, where each follows the one before."""
    if config.arrivals == "closed":
        return [None] * config.requests_per_user
    gaps = random.Random(f"{config.seed} user{user} arrivals")
    pauses = (gaps.expovariate(config.rate) for _ in range(config.requests_per_user))
    return list(accumulate(pauses))


def unfold_turns(
    prompts: Sequence[BenchPrompt],
    target: Target,
    max_new_tokens: int,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> list[BenchPrompt]:
    """Make every follow-up a prompt of its own, asked after the target's own answer.

    The answers are decoded plainly and greedily before anything is measured, so that all arms
    are given the same second turn.

    Args:
        prompts: as `load_prompts` gives them.
        target: answers the earlier turns.
        max_new_tokens: of an answer.
        progress: called with conversations done, conversations in all, and a text.

    Returns:
        The prompts in order, each followed by its later turns; ids end in "-turn2", "-turn3", ...
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


Progress = Callable[[int, int, str], None]


def multi_turn_groups(
    config: MultiTurnConfig, pool: TextPool, target: Target, progress: Progress
) -> list[Group]:
    """A group for each turn; every turn is asked after the target's own greedy answers.

    Raises:
        ValueError: the pool is too small, or a conversation does not fit the context.
    """
    talks = [_talk(config, pool, index) for index in range(config.conversations)]
    try:
        unfolded = unfold_turns(talks, target, config.max_new_tokens, progress)
        asks = [
            Ask(p.id, p.domain, pool.encode(p), config.max_new_tokens, config.seed + number)
            for number, p in enumerate(unfolded)
        ]
    except ValueError as error:
        raise ValueError(f"{error}; or lower turns or max_new_tokens") from error
    return [
        Group(f"turn {turn + 1}", turn + 1, [[ask] for ask in asks[turn :: config.turns]])
        for turn in range(config.turns)
    ]


def _talk(config: MultiTurnConfig, pool: TextPool, index: int) -> BenchPrompt:
    """A conversation: one text, its own follow-ups, then questions of its domain."""
    name, domain = f"talk-{index}", pool.domains[index % len(pool.domains)]
    first, *others = pool.order(name, domain)
    questions = [*first.follow_ups, *(last_words(text).messages[0]["content"] for text in others)]
    if len(questions) < config.turns - 1:
        raise ValueError(
            f"config turns is {config.turns} but the {len(pool.prompts)} texts of the source give "
            f"{1 + len(questions)}; lower it, or give a larger pool (prompts.source, prompts.num)"
        )
    opening = last_words(first).messages
    return BenchPrompt(name, domain, opening, follow_ups=tuple(questions[: config.turns - 1]))


_ANSWERED_TOGETHER = 16


def long_context_groups(
    config: LongContextConfig, pool: TextPool, target: Target, progress: Progress
) -> list[Group]:
    """A group for each bin of positions: its prompts leave room in the bin for the answer alone.

    A prompt is a conversation of the pool's questions, each with the target's own greedy answer
    to it alone, so that no text stands there twice.

    Raises:
        ValueError: the bins are too narrow, or the pool too small.
    """
    limit = _limit(config, target)
    progress(0, 0, "answers to the pool's questions")
    answers = _answers(config, pool, target)
    groups = []
    for place in range(config.bins):
        low, high = limit * place // config.bins, limit * (place + 1) // config.bins
        calls = []
        for index in range(config.num):
            domain = pool.domains[index % len(pool.domains)]
            prompt = pool.conversation(
                f"context-{high}-{index}",
                domain,
                max(1, low),
                high - config.max_new_tokens,
                lambda text: answers[text.id],
            )
            seed = config.seed + place * config.num + index
            ids = pool.encode(prompt)
            calls.append([Ask(prompt.id, domain, ids, config.max_new_tokens, seed)])
        groups.append(Group(f"{low} to {high}", high, calls))
    return groups


def _limit(config: LongContextConfig, target: Target) -> int:
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


def _answers(config: LongContextConfig, pool: TextPool, target: Target) -> dict[str, str]:
    prompts = [pool.encode(last_words(text)) for text in pool.prompts]
    results = generate_baseline(
        target, prompts, max_new_tokens=config.max_new_tokens, batch_size=_ANSWERED_TOGETHER
    )
    return {text.id: result.text for text, result in zip(pool.prompts, results, strict=True)}


def single_turn_groups(config: SingleTurnConfig, pool: TextPool) -> list[Group]:
    """A group for each bucket of lengths, with the pool's domains in turn.

    Raises:
        ValueError: the pool does not give so many tokens, or they do not fit the context.
    """
    groups: list[Group] = []
    for bucket in config.buckets:
        first = sum(len(group.calls) for group in groups)
        calls = [[_ask(config, pool, bucket, i, first + i)] for i in range(bucket.num)]
        name = f"{bucket.name} ({bucket.low}-{bucket.high})"
        groups.append(Group(name, bucket.high, calls))
    return groups


def _ask(
    config: SingleTurnConfig, pool: TextPool, bucket: LengthBucket, index: int, number: int
) -> Ask:
    name, domain = f"{bucket.name}-{index}", pool.domains[index % len(pool.domains)]
    prompt = pool.single_turn(name, domain, bucket.low, bucket.high)
    return Ask(name, domain, pool.encode(prompt), config.max_new_tokens, config.seed + number)
