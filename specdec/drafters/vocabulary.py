"""Tokens as byte strings: what two tokenizers share, and a text in the tokens of either.

Nothing is decoded and cleaned up on the way. A special token is its content between two bytes 0xFF,
which no valid text has; text that does have them costs acceptance at worst.
"""

import json
import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch

BACK = 8  # most tokens that are looked at again where text is added
MIN_SHARED = 0.05  # of the target's vocabulary
# A marked special token, or a run of bytes that are not UTF-8, as `surrogateescape` reads them.
_ODD = re.compile("(\udcff[^\udcff]*\udcff|[\udc80-\udcff]+)")
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
# The character that byte-level BPE writes for each byte, and back.
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + rank): byte for rank, byte in enumerate(sorted({*range(256)} - {*_PRINTABLE}))
}


class Vocabulary:
    """The tokens of a byte-level BPE or a SentencePiece tokenizer.

    Args:
        tokenizer: a fast tokenizer of transformers.
        size: of the model's vocabulary; other ids are left out.
        name: in errors.

    Attributes:
        pieces: bytes of each id; None for padding and for what has none.
        ids: the id that writes these bytes.
        start: bytes of what the tokenizer puts before a text.
    """

    def __init__(self, tokenizer: Any, size: int, name: str) -> None:
        to_bytes = _reader(tokenizer)
        if to_bytes is None:
            raise ValueError(
                f"the tokens of {name} cannot be mapped to bytes: its tokenizer is neither a "
                "byte-level BPE nor a SentencePiece one; use a model with vocabulary='same'"
            )
        self._tokenizer = tokenizer
        self.pieces: list[bytes | None] = [None] * size
        self.ids: dict[bytes, int] = {}
        added = tokenizer.added_tokens_decoder
        fallbacks: dict[bytes, int] = {}
        for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
            if not 0 <= index < size:
                continue
            if index in added:
                mark = b"\xff" if added[index].special else b""
                piece = mark + token.encode() + mark
            else:
                piece = to_bytes(token)
            if piece:
                self.pieces[index] = piece
                into = fallbacks if _BYTE.fullmatch(token) else self.ids
                into.setdefault(piece, index)
        self.ids = fallbacks | self.ids
        self._sizes = sorted({*map(len, self.ids)}, reverse=True)
        first = tokenizer("")["input_ids"][:1]
        self.start = b"".join(self.pieces[token] or b"" for token in first if token < size)

    def encode(self, text: bytes) -> tuple[list[int], list[int]]:
        """Tokens of any bytes, with the offset behind each; bytes without a token are left out."""
        tokens: list[int] = []
        ends: list[int] = []
        start = 0
        for index, part in enumerate(_ODD.split(text.decode("utf-8", "surrogateescape"))):
            data = part.encode("utf-8", "surrogateescape")
            found = None if index % 2 else self._tokenized(part, data)
            for token, end in self._matched(data) if found is None else found:
                tokens.append(token)
                ends.append(start + end)
            start += len(data)
        return tokens, ends

    def _tokenized(self, part: str, data: bytes) -> list[tuple[int, int]] | None:
        """The tokenizer's own tokens, or None where they do not spell the text."""
        for lead in ("", "\n"):  # behind which no space is put before the first word
            if not part:
                return []
            tokens = self._tokenizer(lead + part, add_special_tokens=False, verbose=False)
            tokens, end, found = tokens["input_ids"], len(data), []
            while tokens and end > 0:
                token = tokens.pop()
                piece = self.pieces[token] if token < len(self.pieces) else None
                if not piece or data[max(0, end - len(piece)) : end] != piece:
                    break
                found.append((token, end))
                end -= len(piece)
            if end == 0:
                return found[::-1]
        return None

    def _matched(self, data: bytes) -> list[tuple[int, int]]:
        """The longest token at each place, which needs no valid text."""
        found, start = [], 0
        while start < len(data):
            tokens = (self.ids.get(data[start : start + size]) for size in self._sizes)
            token = next((token for token in tokens if token is not None), None)
            if token is None:
                start += 1
                continue
            start += len(self.pieces[token] or b"")
            found.append((token, start))
        return found


def _reader(tokenizer: Any) -> Any:
    """The function from a token to its bytes; None if there is none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    known = json.loads(backend.to_str())
    parts = json.dumps([known.get("pre_tokenizer"), known.get("decoder")], ensure_ascii=False)
    if '"ByteLevel"' in parts:
        return _from_byte_level
    if any(mark in parts for mark in ('"Metaspace"', '"ByteFallback"', "\u2581")):
        return _from_sentencepiece
    return None


def _from_byte_level(token: str) -> bytes | None:
    found = [_BYTES.get(each) for each in token]
    return None if None in found else bytes(each for each in found if each is not None)


def _from_sentencepiece(token: str) -> bytes:
    if byte := _BYTE.fullmatch(token):
        return bytes([int(byte[1], 16)])
    return token.replace("\u2581", " ").encode()


class Context:
    """A row's committed text, in tokens of the draft model.

    Attributes:
        tokens: never empty, as something must be read before the first draft.
        ends: offset in the text behind each token.
        num_committed: tokens of the target.
    """

    def __init__(self, vocabulary: Vocabulary, text: bytes, num_committed: int) -> None:
        self._vocabulary, self._text = vocabulary, bytearray()
        self.tokens: list[int] = []
        self.ends: list[int] = []
        self.num_committed = 0
        start = vocabulary.start
        self.add(text if text.startswith(start) else start + text, num_committed)

    def add(self, text: bytes, num_committed: int, fed: Sequence[int] = ()) -> int:
        """Add committed text; `fed` stands behind `tokens` in the model's cache.

        Tokens that the text begins with are kept, but the last word is tokenized anew.

        Returns:
            The number of tokens that are what they were.
        """
        self._text += text
        self.num_committed += num_committed
        for token in fed:
            piece, start = self._vocabulary.pieces[token], self._end(len(self.tokens))
            if not piece or self._text[start : start + len(piece)] != piece:
                break
            self.tokens.append(token)
            self.ends.append(start + len(piece))
        cut = self._cut()
        start, before = self._end(cut), self.tokens[cut:]
        del self.tokens[cut:], self.ends[cut:]
        tokens, ends = self._vocabulary.encode(bytes(self._text[start:]))
        self.tokens += tokens
        self.ends += [start + end for end in ends]
        if not self.tokens:
            self.tokens, self.ends = [0], [0]
        same = 0
        while same < min(len(before), len(tokens)) and before[same] == tokens[same]:
            same += 1
        return cut + same

    def _end(self, count: int) -> int:
        return self.ends[count - 1] if count else 0

    def _cut(self) -> int:
        """Count the tokens before the last word, or before what is looked at again."""
        places = range(max(0, len(self.tokens) - BACK), len(self.tokens) + 1)
        ends = [(place, self._end(place)) for place in places]
        following = [(place, self._text[end : end + 1]) for place, end in ends]
        whole = [(place, byte) for place, byte in following if not b"\x80" <= byte < b"\xc0"]
        words = [place for place, byte in whole if byte in (b" ", b"\n", b"\xff")]
        return words[-1] if words else whole[0][0] if whole else places[0]


class Bridge:
    """Both vocabularies of a draft model and its target.

    Args:
        draft, target: the two of them.
        mode: "intersect" or "retokenize"; "auto" intersects where half of the target's vocabulary
            is shared, or where `makes_trees` says so.

    Attributes:
        target_ids, draft_ids: [S] int64, what both of them have, in the ids of each.
        to_draft: [V] int64, the draft model's id of a target's; 0 for what is not shared.

    Source: Timor et al. 2025, arXiv 2502.05202, TLI and SLEM.
    """

    def __init__(
        self,
        draft: Vocabulary,
        target: Vocabulary,
        mode: str,
        makes_trees: bool = False,
        device: Any = None,
    ) -> None:
        self.draft, self.target = draft, target
        shared = [(i, draft.ids[piece]) for piece, i in target.ids.items() if piece in draft.ids]
        share = len(shared) / max(1, len(target.ids))
        if mode == "auto":
            mode = "intersect" if share >= 0.5 or makes_trees else "retokenize"
        if mode == "retokenize" and makes_trees:
            raise ValueError(
                "vocabulary is 'retokenize', which drafts chains, but width is more than 1; use "
                "width=1, or vocabulary='intersect'"
            )
        if mode == "intersect" and share < MIN_SHARED:
            raise ValueError(
                f"vocabulary is 'intersect' but only {len(shared)} of the target's "
                f"{len(target.ids)} tokens are shared, and {MIN_SHARED:.0%} must be; use "
                "vocabulary='retokenize'"
            )
        self.mode = mode
        pairs = torch.tensor(shared, dtype=torch.long, device=device).reshape(-1, 2)
        self.target_ids, self.draft_ids = pairs.unbind(1)
        self.to_draft = torch.zeros(len(target.pieces), dtype=torch.long, device=device)
        self.to_draft[self.target_ids] = self.draft_ids
        # What the draft model reads of each of the target's tokens.
        self._read = [
            piece if piece and (piece in draft.ids or not _is_special(piece)) else b""
            for piece in target.pieces
        ]

    def text(self, tokens: Sequence[int]) -> bytes:
        """Bytes of the target's tokens, without special ones that the draft model does not have."""
        return b"".join([self._read[token] for token in tokens])

    def context(self, tokens: Sequence[int]) -> Context:
        return Context(self.draft, self.text(tokens), len(tokens))

    def fed(self, tokens: Sequence[int]) -> list[int]:
        """The draft model's ids of the target's, up to the first that is not shared."""
        found = (self.draft.ids.get(self.target.pieces[token] or b"", -1) for token in tokens)
        return [*takewhile(lambda token: token >= 0, found)]

    def retokenized(self, tokens: Sequence[int]) -> list[int]:
        """The draft model's tokens in those of the target, up to the first that it cannot say."""
        text = b""
        for token in tokens:
            piece = self.draft.pieces[token]
            if piece is None or (_is_special(piece) and piece not in self.target.ids):
                break
            text += piece
        return self.target.encode(text)[0]


def _is_special(piece: bytes) -> bool:
    return len(piece) > 2 and piece[:1] == piece[-1:] == b"\xff"
