"""Prompts of one turn, by how long they are."""

from specdec.bench.suites.ask import Ask, Group
from specdec.bench.suites.config import SingleTurnConfig
from specdec.bench.suites.lengths import LengthBucket
from specdec.bench.suites.texts import TextPool


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
