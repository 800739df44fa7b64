"""Prompts of wanted lengths, made by joining whole texts of a pool."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from specdec.bench.prompt import BenchPrompt
from specdec.bench.prompts import render
from specdec.interfaces import Target
from specdec.request import encode, tokenize

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
