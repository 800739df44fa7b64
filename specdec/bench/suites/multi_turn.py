"""Conversations of many turns, by turn."""

from collections.abc import Callable

from specdec.bench.prompt import BenchPrompt
from specdec.bench.suites.ask import Ask, Group
from specdec.bench.suites.config import MultiTurnConfig
from specdec.bench.suites.texts import TextPool, last_words
from specdec.bench.turns import unfold_turns
from specdec.interfaces import Target

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
