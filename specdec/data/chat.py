"""What a target reads: conversations as its chat template writes them, in its own tokens."""

from collections.abc import Sequence
from typing import Any

from specdec.bench.prompt import Message
from specdec.demo import demo_path
from specdec.hub import find_checkpoint
from specdec.targets.load import load_tokenizer

# Stands for an answer in a rendered conversation; no template changes or holds it.
_MARK = "specdec\u2060answer"


class Chat:
    """A tokenizer with its chat template.

    Args:
        tokenizer: of the target.
        eos_token_ids: tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, eos_token_ids: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self._eos = frozenset(eos_token_ids)

    def text(self, messages: Sequence[Message]) -> str:
        """The conversation up to where the answer begins.

        Raises:
            ValueError: the template refuses it.
        """
        return self._render(messages, add_generation_prompt=True)

    def _render(self, messages: Sequence[Message], **options: bool) -> str:
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
        except TemplateError as error:
            raise ValueError(f"the chat template refuses it: {error}") from error
        return str(text)

    def tokens(self, text: str) -> list[int]:
        """Tokens of rendered text, which holds its special tokens already."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def raw_tokens(self, text: str) -> list[int]:
        """Tokens of a text that is continued as it is, with the special tokens in front."""
        return list(self.tokenizer(text)["input_ids"])

    def follow_up(self, asked: Sequence[Sequence[Message]], last_token: int) -> list[int] | None:
        """Tokens between an answer and the next one, the end of the turn left out.

        Args:
            asked: the messages in front of every answer, those of the next one last.
            last_token: of the answer, with which the target ended its turn.

        Returns:
            What to put behind the answer; None where the template does not go on behind that
            token, so that no conversation with this answer could look like that.

        Raises:
            ValueError: the template refuses the conversation.
        """
        mark: Message = {"role": "assistant", "content": _MARK}
        messages = [message for turn in asked for message in (*turn, mark)][:-1]
        _, found, tail = self.text(messages).rpartition(_MARK)
        tokens = self.tokens(tail)
        if not found or tokens[:1] != [last_token]:
            return None
        return tokens[1:]

    def is_end(self, tokens: Sequence[int]) -> bool:
        """Whether this is a token that ends an answer."""
        return len(tokens) == 1 and tokens[0] in self._eos

    def end_of_turn(self, messages: Sequence[Message]) -> int | None:
        """The token with which the target ends an answer to these messages; None for no such token.

        It is what the template puts behind an answer, the tokenizer's own end of text if it puts
        nothing there or if there are no messages.
        """
        if messages:
            mark: Message = {"role": "assistant", "content": _MARK}
            tail = self._render([*messages, mark]).rpartition(_MARK)[2]
            first = self.tokens(tail)[:1]
            if first and first[0] in self._eos:
                return first[0]
        own: int | None = self.tokenizer.eos_token_id
        return own


def load_chat(path: str) -> Chat:
    """The chat of a target whose weights are elsewhere.

    Args:
        path: "demo", a folder or a hub id with the target's tokenizer and, if there is one, its
            generation config.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it holds no tokenizer.
    """
    from transformers import GenerationConfig

    wanted = "a folder with the target's tokenizer"
    where = str(demo_path("target")) if path == "demo" else find_checkpoint(path, wanted)
    tokenizer = load_tokenizer(where, None, False)
    if tokenizer is None:
        raise ValueError(f"{path!r} holds no tokenizer; give a folder with the target's")
    try:
        ends = GenerationConfig.from_pretrained(where).eos_token_id
    except OSError:
        ends = None
    known = ends if isinstance(ends, list) else [ends]
    return Chat(tokenizer, [end for end in (*known, tokenizer.eos_token_id) if end is not None])
