"""Conversations that end anywhere up to the context's limit, by position."""

from specdec.bench.suites.ask import Ask, Group
from specdec.bench.suites.config import LongContextConfig
from specdec.bench.suites.multi_turn import Progress
from specdec.bench.suites.texts import TextPool, last_words
from specdec.decode import generate_baseline
from specdec.interfaces import Target

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
