"""Conversations of several turns, as prompts that every arm reads alike."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from specdec.bench.prompt import BenchPrompt
from specdec.bench.prompts import render
from specdec.decode import generate_baseline
from specdec.interfaces import Target


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
