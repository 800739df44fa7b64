"""What is known of the texts themselves, whatever the drafter."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from specdec.analysis.evidence import Array
from specdec.analysis.laws import CHUNK, refuse_not_finite
from specdec.analysis.texts import Text
from specdec.interfaces import Target
from specdec.targets.reading import read_text

CLASSES = (
    "special",
    "newline",
    "space",
    "digit",
    "punctuation",
    "word_start",
    "word_piece",
    "other",
)
_WORD_MARKS = ("Ġ", "▁", " ")


@dataclass(frozen=True, eq=False)
class TextFacts:
    """One row a text, one column a step that might start there, as in `Evidence`.

    Attributes:
        entropy: [B, S] float32 of the target's law of the next token, in nats, at temperature 1.
        token_class: [B, S] int8 of the next token, an index into `CLASSES`; -1 without a
            tokenizer and behind a text's end.
    """

    entropy: Array
    token_class: Array


def gather_facts(target: Target, texts: Sequence[Text]) -> TextFacts:
    """One pass of the target over every text.

    Raises:
        FloatingPointError: NaN in the target's logits.
    """
    num_steps = max(1, *(len(text.tokens) - 1 for text in texts), 1)
    entropy = np.zeros((len(texts), num_steps), np.float32)
    token_class = np.full((len(texts), num_steps), -1, np.int8)
    for index, text in enumerate(texts):
        count = len(text.tokens) - 1
        if count:
            entropy[index, :count] = _entropies(target, text, index)
            if target.tokenizer is not None:
                token_class[index, :count] = classify(text.tokens, target.tokenizer)[1:]
    return TextFacts(entropy, token_class)


@torch.inference_mode()
def _entropies(target: Target, text: Text, index: int) -> Array:
    given = [*text.prompt, *text.tokens[:-1]]
    logits = read_text(target, given, len(text.prompt)).logits
    refuse_not_finite("target", logits, index)
    parts = [torch.special.entr(part.float().softmax(-1)).sum(-1) for part in logits.split(CHUNK)]
    entropies: Array = torch.cat(parts).cpu().numpy()
    return entropies


def classify(tokens: Sequence[int], tokenizer: Any) -> list[int]:
    """The class of every token, as an index into `CLASSES`."""
    special = set(getattr(tokenizer, "all_special_ids", ()))
    pieces = tokenizer.convert_ids_to_tokens(list(tokens))
    found, before = [], " "
    for token, piece in zip(tokens, pieces, strict=True):
        said = str(tokenizer.decode([token]))
        starts = str(piece or "").startswith(_WORD_MARKS) or not before[-1:].isalnum()
        name = "special" if token in special else _class(said, starts)
        found.append(CLASSES.index(name))
        before = said or before
    return found


def _class(said: str, starts_word: bool) -> str:
    core = said.strip()
    if not core:
        if not said:
            return "other"
        return "newline" if "\n" in said else "space"
    if core[0].isdigit():
        return "digit"
    if not any(letter.isalnum() for letter in core):
        # Half a character is no punctuation.
        return "other" if "\ufffd" in core else "punctuation"
    return "word_start" if starts_word else "word_piece"
