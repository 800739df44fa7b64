"""Users at the same time, each with requests of its own lengths."""

import random
from itertools import accumulate

from specdec.bench.suites.ask import Ask, Group
from specdec.bench.suites.config import ConcurrentConfig
from specdec.bench.suites.texts import TextPool


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
