"""One prompt of a bench."""

import random
from dataclasses import dataclass

Message = dict[str, str]


@dataclass(frozen=True)
class BenchPrompt:
    """One prompt: chat messages, or text that is continued as it is.

    Attributes:
        id: unique in its source.
        domain: group of its results.
        messages: the conversation up to a user turn; empty for plain text.
        text: plain text; empty for a conversation.
        follow_ups: later user turns, each asked after the model's own answer.
    """

    id: str
    domain: str
    messages: tuple[Message, ...] = ()
    text: str = ""
    follow_ups: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        """True if there is nothing to answer or to continue."""
        last = self.messages[-1]["content"] if self.messages else self.text
        return not last.strip()


def shuffled(prompts: list[BenchPrompt], seed: int = 0) -> list[BenchPrompt]:
    """Another order of the same prompts, decided by the seed alone."""
    return random.Random(seed).sample(prompts, len(prompts))
