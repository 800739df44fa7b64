"""The texts that acceptance is worked out along."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from specdec.decode import generate_baseline
from specdec.interfaces import Target
from specdec.sampling_config import SamplingConfig


@dataclass(frozen=True)
class Text:
    """A prompt and what came after it: what the loop would emit.

    Attributes:
        prompt: ids, at least one.
        tokens: ids that it went on with, at least one.
        max_tokens: that it was allowed, as the loop counts them.
    """

    prompt: list[int]
    tokens: list[int]
    max_tokens: int


def target_answers(
    target: Target,
    prompts: Sequence[list[int]],
    sampling: SamplingConfig,
    max_new_tokens: int,
    batch_size: int = 16,
) -> list[Text]:
    """What a target says to prompts, by plain decoding.

    Args:
        target: the model.
        prompts: ids.
        sampling: of all of them; prompt i draws from seed + i.
        max_new_tokens: of each.
        batch_size: rows decoded together.

    Raises:
        ValueError: a prompt that cannot be decoded.
        KeyboardInterrupt: while it decoded.
    """
    results = generate_baseline(
        target, prompts, sampling, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    if any(result.finish_reason == "interrupted" for result in results):
        raise KeyboardInterrupt
    room = [min(max_new_tokens, target.max_context_len - len(prompt)) for prompt in prompts]
    return [
        Text(list(prompt), result.tokens, limit)
        for prompt, result, limit in zip(prompts, results, room, strict=True)
    ]


def seeded(sampling: SamplingConfig, seed: int, index: int) -> SamplingConfig:
    """The settings of prompt `index`, which draws its own numbers, as in a bench."""
    return replace(sampling, seed=seed + index)


def check_texts(texts: Sequence[Text], target: Target) -> None:
    """Refuse texts that the target cannot have written.

    Raises:
        ValueError: no text, an empty one, one longer than the context or than it was allowed, or
            an id outside the vocabulary.
    """
    if not texts:
        raise ValueError("texts is empty but must hold at least one text")
    for index, text in enumerate(texts):
        if not text.prompt or not text.tokens:
            raise ValueError(
                f"text {index} has {len(text.prompt)} prompt tokens and {len(text.tokens)} new "
                "ones but needs at least one of each"
            )
        if len(text.tokens) > text.max_tokens:
            raise ValueError(
                f"text {index} has {len(text.tokens)} new tokens but was allowed "
                f"{text.max_tokens}; raise max_tokens"
            )
        num_tokens = len(text.prompt) + len(text.tokens)
        if num_tokens > target.max_context_len:
            raise ValueError(
                f"text {index} has {num_tokens} tokens but the target's context holds "
                f"{target.max_context_len}; cut it"
            )
        wrong = [t for t in (*text.prompt, *text.tokens) if not 0 <= t < target.vocab_size]
        if wrong:
            raise ValueError(
                f"text {index} holds token {wrong[0]} but ids of this target are in "
                f"[0, {target.vocab_size}); was it written by another target?"
            )
