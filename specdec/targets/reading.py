"""A model's view of a text that is there already, by the same calls that decode."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.interfaces import Target, claimed
from specdec.verify import Draft, match

# Long texts are scored in chunks, which bounds the memory of masks and activations.
CHUNK = 512


@dataclass(frozen=True, eq=False)
class Reading:
    """One text as a model sees it, L tokens of which the last P were looked at.

    Attributes:
        logits: [P, V]; each row predicts the token behind its own.
        hidden: tap -> [L, H].
    """

    logits: Tensor
    hidden: dict[int, Tensor]


@torch.inference_mode()
def read_text(
    target: Target, tokens: Sequence[int], first: int, taps: Sequence[int] = ()
) -> Reading:
    """Teacher-force a text. The batch that the model was decoding is forgotten.

    Args:
        target: a target, or a draft model's own.
        tokens: L ids, at most its context.
        first: logits are wanted from this token on, in [1, L).
        taps: hidden states to return.

    Raises:
        RuntimeError: a loop has rows on the target.
    """
    with claimed(target):
        return _read(target, tokens, first, taps)


def _read(target: Target, tokens: Sequence[int], first: int, taps: Sequence[int]) -> Reading:
    output = target.prefill([tokens[:first]], taps)
    logits, hidden = [], [output.hidden]
    for start in range(first, len(tokens), CHUNK):
        root, *rest = tokens[start : start + CHUNK]
        draft = Draft.chain(torch.tensor([rest], dtype=torch.long, device=target.device))
        output = target.score(torch.tensor([root], device=target.device), draft, taps)
        logits.append(output.logits[0])
        hidden.append(output.hidden)
        accepted = torch.tensor([[*rest, 0]], device=target.device)
        target.commit(match(accepted, draft), [len(rest)])
    states = {tap: torch.cat([part[tap][0] for part in hidden]) for tap in taps}
    return Reading(torch.cat(logits), states)
